-- The scrub: files in the order in which they were verified last, and what it found.

-- name: begin_scrub
-- Where the scrub of a volume goes on, after which id. Without a row it begins.
insert into volume_scrubs as s (volume_id) values ($1) on conflict (volume_id) do update set volume_id = excluded.volume_id
returning after_id, round_started_at, last_round_ended_at;

-- name: list_scrubs
-- When the last round over each volume ended.
select volume_id, last_round_ended_at from volume_scrubs;

-- name: page_to_scrub
-- Of the $3 files after an id ($2; null: from the first on), those on a volume ($1). One more line, without a path, tells the last id looked at.
with page as materialized (
    select id, user_id, volume_id, file_path, file_size, sha256, damaged_at from user_files
     where id > coalesce($2::uuid, '00000000-0000-0000-0000-000000000000') order by id limit $3
)
select id, user_id, volume_id, file_path, file_size, sha256, damaged_at, null::uuid as last from page where volume_id = $1
union all
select null, null, null, null, null, null, null, (select id from page order by id desc limit 1);

-- name: remember_scrub
-- The scrub of a volume has come to an id ($2).
update volume_scrubs set after_id = $2 where volume_id = $1;

-- name: finish_scrub
-- A round over a volume has ended; the next begins with the oldest file.
update volume_scrubs set after_id = null, last_round_ended_at = now(), round_started_at = now() where volume_id = $1;

-- name: mark_damaged
-- Marks a file whose stored bytes are wrong, unless it has other bytes by now, with an event and a record. $5 tells what is wrong, $6 is the actor.
with marked as (
    update user_files set damaged_at = now()
     where id = $1 and volume_id = $2 and file_path = $3 and sha256 = $4 and damaged_at is null returning id, user_id, file_size
), noted as (
    insert into events (user_id, type, file_id, payload)
    select m.user_id, 'file.damaged', m.id, jsonb_build_object('reason', $5::text, 'file_size', m.file_size) from marked m
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.damaged', m.user_id, m.id, jsonb_build_object('reason', $5::text), a.* from marked m, actor_of_v1($6) a
)
select id from marked;

-- name: unmark_damaged
-- The stored bytes of a file are right again, with an event and a record. $5 is the actor.
with unmarked as (
    update user_files set damaged_at = null
     where id = $1 and volume_id = $2 and file_path = $3 and sha256 = $4 and damaged_at is not null returning id, user_id, file_size
), noted as (
    insert into events (user_id, type, file_id, payload)
    select u.user_id, 'file.recovered', u.id, jsonb_build_object('file_size', u.file_size) from unmarked u
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'file.recovered', u.user_id, u.id, '{}', a.* from unmarked u, actor_of_v1($5) a
)
select id from unmarked;

-- name: page_of_damaged
-- The $2 damaged files after an id ($1; null: from the first on).
select id, user_id, volume_id, file_path, file_size, sha256, damaged_at from user_files
 where damaged_at is not null and id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') order by id limit $2;
