-- What an export of a user's files reads. {file} stands for the columns of server.ledger.models.File.

-- name: page_of_user_files
-- The $5 files of a user after a position ($2, $3), in the trash or not, uploaded until $4.
select {file} from user_files
 where user_id = $1 and upload_date <= $4
   and (upload_date, id) > (coalesce($2::timestamptz, '-infinity'), coalesce($3::uuid, '00000000-0000-0000-0000-000000000000'))
 order by upload_date, id limit $5;

-- name: get_exported_file
-- One file of one user, in the trash or not.
select {file} from user_files where user_id = $1 and id = $2;

-- name: record_export
-- Records that all of a user's files are given out, and tells the time: files that come later are not in it.
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select 'user.exported', u.user_id, null, jsonb_build_object('file_count', u.file_count, 'total_bytes', u.total_bytes), a.*
  from user_storage u, actor_of_v1($2) a where u.user_id = $1
returning clock_timestamp() as began_at;
