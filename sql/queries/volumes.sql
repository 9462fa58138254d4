-- Volumes. What changes one records it in audit_log; its last parameter is the actor, as JSON.

-- name: add_volume
-- Registers a volume, or its new mount path.
with added as (
    insert into volumes (id, mount_path) values ($1, $2) on conflict (id) do update set mount_path = excluded.mount_path returning *
)
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select 'volume.added', null, null, jsonb_build_object('volume_id', v.id, 'mount_path', v.mount_path), a.* from added v, actor_of_v1($3) a;

-- name: list_volumes
-- All volumes, oldest first.
select id, mount_path, state, created_at from volumes order by created_at, id;

-- name: set_volume_state
-- Opens a volume for writing or closes it.
with changed as (
    update volumes set state = $2 where id = $1 returning id, state
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'volume.changed', null, null, jsonb_build_object('volume_id', c.id, 'state', c.state), a.* from changed c, actor_of_v1($3) a
)
select id from changed;
