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

-- name: page_of_user_jobs
-- The $5 generation jobs of a user ($1) after a position ($2, $3), made until $4: what was asked for, with prompts, and nothing that opens anything.
select j.created_at, j.id, (to_jsonb(j) - '{user_id,pipeline,remote_id,callback_url,callback_secret,callback_state,idempotency_key}'::text[])::text as record
  from generation_jobs j
 where j.user_id = $1 and j.created_at <= $4
   and (j.created_at, j.id) > (coalesce($2::timestamptz, '-infinity'), coalesce($3::uuid, '00000000-0000-0000-0000-000000000000'))
 order by j.created_at, j.id limit $5;

-- name: page_of_user_media
-- The same of what is remembered of a user's media.
select m.created_at, m.id, (to_jsonb(m) - '{user_id,prompt_words}'::text[])::text as record
  from generated_media m
 where m.user_id = $1 and m.created_at <= $4
   and (m.created_at, m.id) > (coalesce($2::timestamptz, '-infinity'), coalesce($3::uuid, '00000000-0000-0000-0000-000000000000'))
 order by m.created_at, m.id limit $5;

-- name: page_of_user_assets
-- The same of a user's linked assets. Their ids begin with their time.
select l.created_at, l.id, (to_jsonb(l) - '{user_id,fetch_url,import_actor,import_kinds,check_at,import_at}'::text[])::text as record
  from linked_assets l
 where l.user_id = $1 and l.created_at <= $4
   and l.id > case when $2::timestamptz is null then '00000000-0000-0000-0000-000000000000' else $3::uuid end
 order by l.id limit $5;
