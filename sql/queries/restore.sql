-- Making a store of what was restored.

-- name: settle_restored
-- Run once by psql, in the transaction that restores the dump: nobody ever sees the rows without the stop, or with the places of another
-- store's volumes. What was under way then is over: its bytes were not saved. Upload links stay, unclaimed.
insert into upload_stops (reason) values ({reason});
update volumes v set mount_path = p.path, state = 'open' from (values {places}) p (id, path) where v.id = p.id;
delete from resumable_uploads;
delete from uploads where link is null;
update uploads set claimed_until = null;
update backups set state = 'failed', ended_at = clock_timestamp(), holds_until = null, error = 'it saved itself while it ran' where state = 'running';
delete from audit_suspects;

-- name: forget_restored_previews
-- As settle_restored, of a backup without previews: they are made again.
delete from previews;
update user_files set preview_state = 'pending', preview_reason = null, preview_tries = 0 where preview_state in ('ready', 'failed');

-- name: is_empty_database
-- Whether there is no table of anybody's.
select not exists (select from pg_catalog.pg_tables where schemaname not in ('pg_catalog', 'information_schema')) as yes;

-- name: server_version
-- PostgreSQL's, such as 160004.
select current_setting('server_version_num')::integer as version;

-- name: saved_user
-- A user as the dump has them.
select tier, max_bytes from user_storage where user_id = $1;

-- name: saved_files
-- The $3 files of a user ($1) after an id ($2), each with its whole row as JSON, and that of how it was made.
select id, volume_id, file_type, file_path, file_size, sha256, to_jsonb(f) as record,
       (select to_jsonb(m) from generated_media m where m.file_id = f.id) as media
  from user_files f where user_id = $1 and id > $2 and damaged_at is null order by id limit $3;

-- name: set_tier
-- The tier of a user who was restored.
update user_storage set tier = $2 where user_id = $1;

-- name: latest_generation
-- The youngest name of a file that was deleted and may still lie there.
select coalesce(max(generation), 0) as generation from tombstones where file_id = $1;

-- name: restore_file
-- A file's row ($1, as to_jsonb gave it) at a new place ($2, $3, $4), charged as any other; nothing when there is a file of that id. Its previews
-- are made again. $5 is the actor, $6 how it was made, if that is known (by an older version's
-- backup, without marks): the primary of an entity that has another one by now it is no more.
with restored as (
    insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, generation, resolution, width,
                            height, duration, duration_seconds, package_name, tags, is_favorite, metadata, idempotency_key, upload_date,
                            content_changed_at, created_at, updated_at, preview_state)
    select r.id, r.user_id, r.file_name, r.file_type, r.mime_type, r.file_size, r.sha256, $2, $3, $4, r.resolution, r.width,
           r.height, r.duration, r.duration_seconds, r.package_name, r.tags, r.is_favorite, r.metadata,
           case when not exists (select from user_files o where o.user_id = r.user_id and o.idempotency_key = r.idempotency_key)
                then r.idempotency_key end,
           r.upload_date, r.content_changed_at, r.created_at, clock_timestamp(), case when r.preview_state is not null then 'pending' end
      from jsonb_populate_record(null::user_files, $1) r
    on conflict (id) do nothing
    returning id, user_id, file_size
), remembered as (
    insert into generated_media (id, user_id, file_id, job_id, output_index, entity_type, entity_id, project_id, media_type, source_type,
                                 model_used, prompt_used, generation_params, credits_used, original_url, is_accessible, last_checked_at,
                                 reference_ids, parent_id, root_id, wanted_marks, marking, marking_reason, marks, is_primary, created_at)
    select m.id, m.user_id, m.file_id, m.job_id, m.output_index, m.entity_type, m.entity_id, m.project_id, m.media_type, m.source_type,
           m.model_used, m.prompt_used, m.generation_params, m.credits_used, m.original_url, m.is_accessible, m.last_checked_at,
           m.reference_ids, m.parent_id, m.root_id, coalesce(m.wanted_marks, '{}'), m.marking, m.marking_reason, coalesce(m.marks, '{}'),
           m.is_primary and not exists (select from generated_media o where o.user_id = m.user_id and o.entity_type = m.entity_type
                                                                        and o.entity_id = m.entity_id and o.is_primary),
           m.created_at
      from restored r join jsonb_populate_record(null::generated_media, $6) m on m.file_id = r.id
    on conflict do nothing
), noted as (
    insert into events (user_id, type, file_id, payload)
    select r.user_id, 'file.restored', r.id, jsonb_build_object('file_size', r.file_size) from restored r
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.restored', r.user_id, r.id, '{}', a.* from restored r, actor_of_v1($5) a
)
select id from restored;

-- name: saved_assets
-- The $3 linked assets of a user ($1) after an id ($2), each as JSON.
select l.id, to_jsonb(l) as record from linked_assets l where l.user_id = $1 and l.id > $2 order by l.id limit $3;

-- name: restore_asset
-- A linked asset ($1, as to_jsonb gave it), to be looked at soon; nothing when there is one of that id. It is imported if the file is there
-- that it became, and can be imported again if not. $2 is the actor.
with restored as (
    insert into linked_assets (id, user_id, url, fetch_url, version, details, media_type, entity_type, entity_id, project_id, state, reason,
                               mime_type, size_bytes, failures, last_checked_at, last_reachable_at, check_at, import_state, file_id, created_at)
    select r.id, r.user_id, r.url, r.fetch_url, r.version, r.details, r.media_type, r.entity_type, r.entity_id, r.project_id, r.state, r.reason,
           r.mime_type, r.size_bytes, r.failures, r.last_checked_at, r.last_reachable_at, case when f.id is null then clock_timestamp() end,
           case when f.id is not null then 'done' end, f.id, r.created_at
      from jsonb_populate_record(null::linked_assets, $1) r left join user_files f on f.id = r.file_id and f.user_id = r.user_id
    on conflict (id) do nothing
    returning id, user_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'asset.restored', r.user_id, null, jsonb_build_object('asset_id', r.id), a.* from restored r, actor_of_v1($2) a
)
select id from restored;
