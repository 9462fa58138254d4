-- Users: quota, usage, erasure. {user} stands for the columns of server.ledger.models.User. What changes one records it in audit_log; its
-- last parameter is the actor, as JSON. `= now()` holds for what this very transaction has set.

-- name: get_user
-- One user.
select {user} from user_storage where user_id = $1;

-- name: ensure_user
-- Adds a user seen for the first time; gives an existing one a volume if it has none: the one that is reserved for the user, or else $3, if
-- it may be. Who chose that may not have heard yet that it is being drained.
with place as (
    select coalesce((select r.id from volumes r where r.reserved_for = $1),
                    (select v.id from volumes v where v.id = $3 and v.reserved_for is null and v.draining_since is null)) as volume_id
), ensured as (
    insert into user_storage as u (user_id, max_bytes, volume_id) select $1, $2, p.volume_id from place p
    on conflict (user_id) do update set volume_id = coalesce(u.volume_id, excluded.volume_id)
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'user.created', e.user_id, null, jsonb_build_object('max_bytes', e.max_bytes), a.*
      from ensured e, actor_of_v1($4) a where e.created_at = now()
)
select {user} from ensured;

-- name: list_users
-- A page of users after the given id.
select {user} from user_storage where user_id > $1 order by user_id limit $2;

-- name: set_quota
-- Sets the quota of a user, who is added if unknown.
with changed as (
    insert into user_storage as u (user_id, max_bytes, volume_id) values ($1, $2, $3)
    on conflict (user_id) do update
       set max_bytes = excluded.max_bytes, volume_id = coalesce(u.volume_id, excluded.volume_id), updated_at = clock_timestamp()
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select case when c.created_at = now() then 'user.created' else 'quota.changed' end, c.user_id, null,
           jsonb_build_object('max_bytes', c.max_bytes), a.*
      from changed c, actor_of_v1($4) a
)
select {user} from changed;

-- name: set_quota_rules
-- Tells the triggers whether the quota counts previews. Brings the row back where somebody has deleted it: without it they count.
with changed as (
    update quota_rules set counts_previews = $1 where counts_previews <> $1
)
insert into quota_rules (counts_previews) select $1 where not exists (select from quota_rules) on conflict do nothing;

-- name: usage_by_type
-- Files and bytes per type.
select file_type, sum(file_count)::bigint as file_count, sum(total_bytes)::bigint as total_bytes
  from user_storage_by_type where user_id = $1 group by file_type having sum(file_count) > 0;

-- name: begin_erasing
-- From its commit on, the triggers admit nothing new for the user.
select {user} from begin_erasing_v1($1, $2, null, null, null);

-- name: begin_erasing_unseen
-- The same for a user who has stored nothing, and whose row nobody has changed for $3 days; who has the default quota ($4), unless $5.
select {user} from begin_erasing_v1($1, $2, $3, $4, $5);

-- name: unseen_users
-- A page of those users after an id ($1), by the same conditions.
select {user} from user_storage u
 where u.user_id > $1 and u.erasing_at is null and u.file_count = 0 and u.reserved_bytes = 0 and u.held_at is null
   and u.updated_at < now() - make_interval(days => $2)
   and ($4 or (u.max_bytes is not distinct from $3 and u.tier = 'standard'))
 order by u.user_id limit $5;

-- name: hold_user
-- From its commit on, the triggers let nothing of the user's go. Another reason ($2) takes the place of the one before. The lock waits for those
-- whose statements have seen no hold (refuse_held_change_v1).
with found as materialized (
    select user_id from user_storage where user_id = $1 for update
), held as (
    update user_storage u set held_at = coalesce(u.held_at, now()), hold_reason = $2, updated_at = clock_timestamp()
      from found f where u.user_id = f.user_id
    returning u.*
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'user.held', h.user_id, null, jsonb_build_object('reason', h.hold_reason), a.* from held h, actor_of_v1($3) a
)
select {user} from held;

-- name: release_user
-- Ends the hold on a user. What changes nothing is not recorded.
with found as (
    select user_id, held_at is not null as was_held from user_storage where user_id = $1 for no key update
), released as (
    update user_storage u set held_at = null, hold_reason = null, updated_at = clock_timestamp()
      from found f where u.user_id = f.user_id
    returning u.*, f.was_held
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'user.released', r.user_id, null, '{}', a.* from released r, actor_of_v1($2) a where r.was_held
)
select {user} from released;

-- name: erase_batch
-- Deletes some of the files of a user who is being erased, those in the trash too.
select d.file_id, d.tombstone_id, d.volume_id, d.file_path
  from delete_files_v3($1, array(
           select f.id from user_files f join user_storage u using (user_id)
            where f.user_id = $1 and u.erasing_at is not null order by f.upload_date, f.id limit $2), $3, '{}') d;

-- name: erase_events
-- Deletes some of the events of a user who is being erased, and tells how many.
with gone as (
    delete from events where id in (
        select e.id from events e join user_storage u using (user_id)
         where e.user_id = $1 and u.erasing_at is not null order by e.id limit $2)
    returning 1
)
select count(*) from gone;

-- name: erase_usage
-- Deletes some of the history of usage of a user who is being erased, and tells how many.
with gone as (
    delete from usage_ledger where id in (
        select l.id from usage_ledger l join user_storage u using (user_id)
         where l.user_id = $1 and u.erasing_at is not null order by l.id limit $2)
    returning 1
)
select count(*) from gone;

-- name: erase_usage_days
-- The same of what it was summed up to. Whoever is about to write more of it has to be waited for first (await_usage_pages).
with gone as (
    delete from usage_days where user_id = $1 and day in (
        select d.day from usage_days d join user_storage u using (user_id)
         where d.user_id = $1 and u.erasing_at is not null order by d.day limit $2)
    returning 1
)
select count(*) from gone;

-- name: erase_addresses
-- Takes the clients' addresses out of some of the records of a user who is being erased, and tells how many.
with named as materialized (
    select l.at, l.id from audit_log l join user_storage u using (user_id)
     where l.user_id = $1 and l.address is not null and u.erasing_at is not null order by l.at, l.id limit $2
), blanked as (
    update audit_log l set address = null from named n where l.at = n.at and l.id = n.id returning 1
)
select count(*) from blanked;

-- name: lock_user
-- One user, who stays as found until the transaction ends.
select {user} from user_storage where user_id = $1 for update;

-- name: finish_erasing
-- Deletes the user, uploads under way included.
with erased as (
    delete from user_storage where user_id = $1 returning user_id
)
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select 'user.erased', e.user_id, null, '{}', a.* from erased e, actor_of_v1($2) a;

-- name: users_being_erased
-- Users whose erasure has begun and not ended.
select user_id from user_storage where erasing_at is not null order by user_id;

-- name: raise_link_epoch
-- Ends every link to the user's files that was made before.
with raised as (
    update user_storage set link_epoch = link_epoch + 1, updated_at = clock_timestamp() where user_id = $1 returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'links.revoked', r.user_id, null, '{}', a.* from raised r, actor_of_v1($2) a
)
select {user} from raised;

-- name: link_epochs
-- The epoch of each user who ever raised it, for whoever must judge links without asking again. No link is of a user's who is being erased.
select user_id, case when erasing_at is null then link_epoch else 4294967295 end as link_epoch
from user_storage
where link_epoch > 0 or erasing_at is not null
order by user_id;
