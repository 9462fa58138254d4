-- Files: publish, replace, read, change, delete. {file} stands for the columns of server.ledger.models.File. What changes one also records
-- it in audit_log; its last parameter is the actor, as JSON. What is in the trash is only seen by what says so.

-- name: publish_file
-- Ends the reservation if there is one, then inserts the file and its event. The insert reads the count of released rows, so the
-- reservation's bytes are back before the file is charged: its trigger is queued first. Inserts nothing when the user is not the one
-- who was there when the upload began: an erasure in between has removed the bytes; nor when it is a resumable upload that the writer
-- with the fence $18 does not hold any more; nor, with $19, when the reservation is gone: the upload link or the job that it was for has
-- ended. Returns only what the caller does not know.
with held as materialized (
    select r.id from resumable_uploads r where r.id = $1 and r.fence = $18 and r.held_by is not null for update
), released as (
    delete from uploads where id = $1 and user_id = $2 and ($18::bigint is null or exists (select from held)) returning id
), published as (
    insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, generation,
                            package_name, tags, metadata, idempotency_key, preview_state)
    select $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $17 from (select count(*) from released) first (released)
    where first.released >= 0 and ($18::bigint is null or (exists (select from held) and first.released = 1))
      and (not $19::boolean or first.released = 1)
      and ($15::timestamptz is null or exists (select from user_storage u where u.user_id = $2 and u.created_at = $15))
    returning *
), noted as (
    insert into events (user_id, type, file_id, payload)
    select user_id, 'file.created', id,
           jsonb_build_object('file_name', file_name, 'file_type', file_type, 'mime_type', mime_type, 'file_size', file_size)
      from published
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.created', p.user_id, p.id, jsonb_build_object('mime_type', p.mime_type, 'file_size', p.file_size), a.*
      from published p, actor_of_v1($16) a
)
select upload_date from published;

-- name: publish_files
-- Inserts files that hold no reservation, with their events and records, each by its own actor. Leaves out those whose user is not the one who was there when the upload
-- began, and those whose user somebody else has locked: nobody's upload waits for another user.
with news as (
    select * from unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bytea[],
                         $9::uuid[], $10::text[], $11::integer[], $12::text[], $13::jsonb[], $14::jsonb[], $15::jsonb[], $16::text[])
             as n (id, user_id, user_since, file_name, file_type, mime_type, file_size, sha256,
                   volume_id, file_path, generation, package_name, tags, metadata, actor, preview_state)
), admitted as materialized (
    select user_id, created_at from user_storage where user_id = any ($2) for no key update skip locked
), published as (
    insert into user_files (id, user_id, file_name, file_type, mime_type, file_size, sha256, volume_id, file_path, generation,
                            package_name, tags, metadata, preview_state)
    select n.id, n.user_id, n.file_name, n.file_type, n.mime_type, n.file_size, n.sha256, n.volume_id, n.file_path, n.generation,
           n.package_name, array(select jsonb_array_elements_text(n.tags)), n.metadata, n.preview_state
      from news n join admitted a on a.user_id = n.user_id and (n.user_since is null or a.created_at = n.user_since)
    returning *
), noted as (
    insert into events (user_id, type, file_id, payload)
    select user_id, 'file.created', id,
           jsonb_build_object('file_name', file_name, 'file_type', file_type, 'mime_type', mime_type, 'file_size', file_size)
      from published
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.created', p.user_id, p.id, jsonb_build_object('mime_type', p.mime_type, 'file_size', p.file_size), a.*
      from published p join news n on n.id = p.id cross join lateral actor_of_v1(n.actor) a
)
select id, upload_date from published;

-- name: replace_content
-- Ends the reservation, then points the row at other bytes if it still has the generation that the caller saw. The trigger leaves a
-- tombstone for the old bytes. What was generated is remembered as replaced. Also tells whether the file exists at all.
with released as (
    delete from uploads where id = $4 and user_id = $1 returning id
), replaced as (
    update user_files f
       set mime_type = $5, file_size = $6, sha256 = $7, volume_id = $8, file_path = $9, generation = $10,
           thumbnail_path = null, resolution = null, width = null, height = null, duration = null, duration_seconds = null,
           preview_state = case when f.preview_state is not null then 'pending' end, preview_reason = null, preview_tries = 0, thumbhash = null,
           average_color = null, frame_rate = null, video_codec = null, audio_codec = null, damaged_at = null,
           content_changed_at = clock_timestamp(), updated_at = clock_timestamp()
      from (select count(*) from released) first (released)
     where first.released >= 0 and f.user_id = $1 and f.id = $2 and f.generation = $3 and f.deleted_at is null
    returning f.*
), noted as (
    insert into events (user_id, type, file_id, payload)
    select user_id, 'file.replaced', id,
           jsonb_build_object('file_name', file_name, 'file_type', file_type, 'mime_type', mime_type, 'file_size', file_size)
      from replaced
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.replaced', r.user_id, r.id, jsonb_build_object('mime_type', r.mime_type, 'file_size', r.file_size), a.*
      from replaced r, actor_of_v1($11) a
), outdated as (
    delete from previews p using replaced r where p.file_id = r.id
), remade as (
    update generated_media m
       set source_type = case when m.source_type = 'generated' then 'replaced' else m.source_type end,
           marks = '{}', marking = null, marking_reason = null
      from replaced r where m.file_id = r.id and (m.source_type = 'generated' or m.marking is not null)
), queued as (
    insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
    select 0, 'queued', 'preview', convert_to(id::text, 'UTF8'), 'preview:' || id from replaced where preview_state = 'pending'
    on conflict do nothing
)
select {file} from replaced;

-- name: get_file
-- One file of one user.
select {file} from user_files where user_id = $1 and id = $2 and deleted_at is null;

-- name: ids_of_kinds
-- Those of the ids that are the user's and of these kinds, in the trash or not.
select id from user_files where user_id = $1 and id = any ($2) and file_type = any ($3);

-- name: find_file_by_idempotency_key
-- The file that an earlier request with this key published.
select {file} from user_files where user_id = $1 and idempotency_key = $2;

-- name: find_file_anywhere
-- One file, whoever owns it, in the trash or not.
select {file} from user_files where id = $1;

-- name: update_file
-- Sets those of name, package and metadata whose flag is true.
with changed as (
    update user_files
       set file_name = case when $3 then $4 else file_name end,
           package_name = case when $5 then $6 else package_name end,
           metadata = case when $7 then $8 else metadata end,
           updated_at = clock_timestamp()
     where user_id = $1 and id = $2 and deleted_at is null
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.updated', c.user_id, c.id,
           jsonb_build_object('fields', array_remove(array[
               case when $3 then 'file_name' end, case when $5 then 'package_name' end, case when $7 then 'metadata' end], null)),
           a.*
      from changed c, actor_of_v1($9) a
)
select {file} from changed;

-- name: set_favorite
-- Sets the flag; null turns it over.
with changed as (
    update user_files
       set is_favorite = coalesce($3, not is_favorite), updated_at = clock_timestamp()
     where user_id = $1 and id = $2 and deleted_at is null
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.updated', c.user_id, c.id, '{"fields": ["is_favorite"]}', a.* from changed c, actor_of_v1($4) a
)
select {file} from changed;

-- name: set_tags
-- Replaces the tags.
with changed as (
    update user_files set tags = $3, updated_at = clock_timestamp() where user_id = $1 and id = $2 and deleted_at is null returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.updated', c.user_id, c.id, '{"fields": ["tags"]}', a.* from changed c, actor_of_v1($4) a
)
select {file} from changed;

-- name: delete_files
-- Deletes those of the ids that are the user's and in the trash ($3), or not in it; one row per tombstone.
select file_id, tombstone_id, volume_id, file_path
  from delete_files_v3($1, array(
           select f.id from user_files f where f.user_id = $1 and f.id = any ($2) and (f.deleted_at is not null) = $3 order by f.id for update), $4, '{}');

-- name: get_files
-- Those of the ids that are the user's.
select {file} from user_files where user_id = $1 and id = any ($2) and deleted_at is null;

-- name: get_files_of_users
-- Those of the ids that belong to the user in the same place.
select {file} from unnest($1::text[], $2::uuid[]) w (wanted_user, wanted_id)
  join user_files f on f.user_id = w.wanted_user and f.id = w.wanted_id and f.deleted_at is null;

-- name: get_linked_files
-- The files that links name, if their links have not been revoked, neither by generation nor by their user's epoch.
select {file}, wanted_epoch from unnest($1::uuid[], $2::integer[], $3::integer[]) w (wanted_id, wanted_generation, wanted_epoch)
  join user_files f on f.id = w.wanted_id and f.generation = w.wanted_generation
 where f.deleted_at is null
   and exists (select from user_storage u where u.user_id = f.user_id and u.link_epoch = w.wanted_epoch and u.erasing_at is null);

-- name: get_public_file
-- The file of a public URL.
select {file} from user_files f
 where f.public_id = $1 and f.deleted_at is null and exists (select from user_storage u where u.user_id = f.user_id and u.erasing_at is null);

-- name: set_public
-- Makes a file public under $3 unless it is already, or private when $3 is null. What changes nothing is not recorded.
with found as (
    select id, public_id is not null as was_public from user_files where user_id = $1 and id = $2 and deleted_at is null for no key update
), changed as (
    update user_files f
       set public_id = case when $3::text is null then null else coalesce(f.public_id, $3) end, updated_at = clock_timestamp()
      from found where f.id = found.id
    returning f.*, found.was_public
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select case when c.was_public then 'file.made_private' else 'file.made_public' end, c.user_id, c.id, '{}', a.*
      from changed c, actor_of_v1($4) a where c.was_public <> (c.public_id is not null)
)
select {file} from changed;

-- name: rename_generation
-- Points a row at another name of the same bytes, on the same volume ($6), which ends its links. The trigger leaves a tombstone for the old name.
with renamed as (
    update user_files set generation = $4, file_path = $5, updated_at = clock_timestamp()
     where user_id = $1 and id = $2 and generation = $3 and volume_id = $6 and deleted_at is null
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'links.revoked', r.user_id, r.id, '{}', a.* from renamed r, actor_of_v1($7) a
)
select {file} from renamed;
