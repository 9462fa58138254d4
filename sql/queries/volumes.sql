-- Volumes.

-- name: add_volume
-- Registers a volume, or its new mount path.
insert into volumes (id, mount_path) values ($1, $2) on conflict (id) do update set mount_path = excluded.mount_path;

-- name: list_volumes
-- All volumes, oldest first.
select id, mount_path, state, created_at from volumes order by created_at, id;

-- name: set_volume_state
-- Opens a volume for writing or closes it.
update volumes set state = $2 where id = $1 returning id;
