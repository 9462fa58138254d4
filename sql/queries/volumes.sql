-- Volumes. What changes one records it in audit_log; its last parameter is the actor, as JSON.

-- name: add_volume
-- Registers a volume, or its new mount path. With a user ($3), it is that user's alone from now on.
with added as (
    insert into volumes as v (id, mount_path, reserved_for) values ($1, $2, $3)
    on conflict (id) do update set mount_path = excluded.mount_path, reserved_for = coalesce(excluded.reserved_for, v.reserved_for)
    returning *
)
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select 'volume.added', v.reserved_for, null, jsonb_build_object('volume_id', v.id, 'mount_path', v.mount_path), a.* from added v, actor_of_v1($4) a;

-- name: list_volumes
-- All volumes, oldest first.
select id, mount_path, state, draining_since is not null as is_draining, reserved_for, created_at from volumes order by created_at, id;

-- name: set_volume_state
-- Opens a volume for writing or closes it.
with changed as (
    update volumes set state = $2 where id = $1 returning id, state
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'volume.changed', null, null, jsonb_build_object('volume_id', c.id, 'state', c.state), a.* from changed c, actor_of_v1($3) a
)
select id from changed;

-- name: drain_volume
-- Has a volume take no new users any more, or take them again.
with changed as (
    update volumes set draining_since = case when $2 then coalesce(draining_since, now()) end where id = $1 returning id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'volume.changed', null, null, jsonb_build_object('volume_id', c.id, 'draining', $2::boolean), a.* from changed c, actor_of_v1($3) a
)
select id from changed;

-- name: volume_contents
-- How many users are placed on each volume, and what they store wherever it lies.
select volume_id, count(*) as users, sum(total_bytes + preview_bytes)::bigint as bytes
  from user_storage where volume_id is not null group by volume_id;

-- name: count_left
-- What keeps a volume from being retired. Looks at every file's row: there is no index by volume, which every upload would pay for.
select (select count(*) from user_storage where volume_id = $1) as users,
       (select count(*) from user_files where volume_id = $1) as files,
       (select count(*) from uploads where volume_id = $1) + (select count(*) from resumable_uploads where volume_id = $1) as uploads,
       (select count(*) from tombstones where volume_id = $1) as unremoved;

-- name: retire_volume
-- Forgets a volume that is being drained and that nothing needs any more; with $2 also the names of bytes that could not be removed from it.
-- Foreign keys keep it from going while anything is on it.
with gone as (
    delete from volumes v
     where v.id = $1 and v.draining_since is not null
       and not exists (select from resumable_uploads r where r.volume_id = v.id)
       and ($2 or not exists (select from tombstones t where t.volume_id = v.id))
    returning id, mount_path
), left_behind as (
    delete from tombstones t using gone g where t.volume_id = g.id
), unsuspected as (
    delete from audit_suspects s using gone g where s.volume_id = g.id
), unscrubbed as (
    delete from volume_scrubs s using gone g where s.volume_id = g.id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'volume.retired', null, null, jsonb_build_object('volume_id', g.id, 'mount_path', g.mount_path), a.* from gone g, actor_of_v1($3) a
)
select id from gone;
