-- The trash: rows of user_files that have deleted_at. They count and keep their bytes. {file} stands for the columns of
-- server.ledger.models.File.

-- name: trash_files
-- Moves some of a user's files to the trash, under the names that their bytes have got on a volume ($2); $7 is the rule by which, or null; $8 the
-- actor.
select file_id, tombstone_id, volume_id, file_path from trash_files_v1($1, $2, $3, $4, $5, $6, $7, $8);

-- name: list_trash
-- A page of what is in a user's trash, newest first, after a position ($2, $3).
select {file} from user_files
 where user_id = $1 and deleted_at is not null
   and (deleted_at, id) < (coalesce($2::timestamptz, 'infinity'), coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
 order by deleted_at desc, id desc limit $4;

-- name: list_trash_of_kinds
-- The same of some kinds ($5): a page of each, and the newest of these.
select {file}
  from unnest($5::text[]) k (kind)
 cross join lateral (
       select * from user_files f
        where f.file_type || ':' || f.user_id = k.kind || ':' || $1 and f.deleted_at is not null
          and (f.deleted_at, f.id) < (coalesce($2::timestamptz, 'infinity'), coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
        order by f.deleted_at desc, f.id desc limit $4) theirs
 order by deleted_at desc, id desc limit $4;

-- name: restore_from_trash
-- Takes a file out of the trash. $3 is the actor.
with restored as (
    update user_files set deleted_at = null, restored_at = now(), updated_at = clock_timestamp()
     where user_id = $1 and id = $2 and deleted_at is not null returning *
), noted as (
    insert into events (user_id, type, file_id, payload)
    select user_id, 'file.restored', id, jsonb_build_object('file_type', file_type, 'file_size', file_size) from restored
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.restored', r.user_id, r.id, jsonb_build_object('file_type', r.file_type, 'file_size', r.file_size), a.*
      from restored r, actor_of_v1($3) a
)
select {file} from restored;

-- name: page_of_old_trash
-- Of all users, the $4 files after a position ($2, $3) that have been in the trash for $1 days; without those that a rule deletes, whose
-- they are: a rehearsal would count them twice.
select f.user_id, f.id, f.file_size, f.deleted_at, u.held_at is not null as is_held
  from (select t.user_id, t.id, t.file_size, t.deleted_at from user_files t
         where deleted_at is not null and deleted_at < now() - make_interval(days => $1)
           and (deleted_at, id) > (coalesce($2::timestamptz, '-infinity'), coalesce($3::uuid, '00000000-0000-0000-0000-000000000000'))
           and not exists (select from lifecycle_rules r where r.action = 'delete' and lifecycle_applies_v1(r, t))
         order by deleted_at, id limit $4) f
  join user_storage u on u.user_id = f.user_id and u.erasing_at is null
 order by f.deleted_at, f.id;

-- name: delete_old_trash
-- Deletes those of a user's files that are still in the trash, and have been for $3 days. $4 is the actor.
select file_id, tombstone_id, volume_id, file_path
  from delete_files_v3($1, array(
           select f.id from user_files f
            where f.user_id = $1 and f.id = any ($2) and f.deleted_at < now() - make_interval(days => $3) order by f.id for update), $4,
           jsonb_build_object('trash_days', $3));
