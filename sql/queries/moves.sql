-- What `coffer rebalance` asks and changes (server/decisions/0019). A copy is a stored name on another volume than its file's row says: there
-- is a tombstone for it, whose file has a row of the same generation.

-- name: begin_move
-- Places a user ($1) on another volume ($2) from now on, with upload links that nobody has used. Not on one that takes no new users or is
-- somebody else's, and not one who is being erased. What the user stores is moved afterwards.
with begun as (
    update user_storage u set volume_id = $2, moving_since = clock_timestamp()
     where u.user_id = $1 and u.volume_id is distinct from $2 and u.erasing_at is null
       and exists (select from volumes v where v.id = $2 and v.draining_since is null and coalesce(v.reserved_for, $1) = $1)
    returning u.user_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'user.moving', b.user_id, null, jsonb_build_object('volume_id', $2::uuid), a.* from begun b, actor_of_v1($3) a
)
select user_id from begun;

-- name: resume_move
-- A user of whom something lies on another volume than the user's is being moved (again).
update user_storage set moving_since = clock_timestamp() where user_id = $1 and moving_since is null and volume_id is not null and erasing_at is null;

-- name: relabel_uploads
-- Upload links that nobody is using, and resumable uploads that are over: nothing that anybody needs lies on any volume.
with links as (
    update uploads u set volume_id = s.volume_id from user_storage s
     where s.user_id = $1 and u.user_id = $1 and u.volume_id <> s.volume_id and u.link is not null and not u.is_resumable
       and (u.claimed_until is null or u.claimed_until < clock_timestamp())
)
update resumable_uploads r set volume_id = s.volume_id from user_storage s
 where s.user_id = $1 and r.user_id = $1 and r.volume_id <> s.volume_id and not exists (select from uploads u where u.id = coalesce(r.joined_as, r.id));

-- name: finish_move
-- Says that a user has been moved, when that began $2 seconds ago or more and nothing of the user's lies, or is being received, elsewhere.
with finished as (
    update user_storage s set moving_since = null
     where s.user_id = $1 and s.moving_since < clock_timestamp() - make_interval(secs => $2)
       and not exists (select from user_files f where f.user_id = $1 and f.volume_id <> s.volume_id)
       and not exists (select from uploads u where u.user_id = $1 and u.volume_id <> s.volume_id)
       and not exists (select from resumable_uploads r where r.user_id = $1 and r.volume_id <> s.volume_id)
    returning s.user_id, s.volume_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'user.moved', f.user_id, null, jsonb_build_object('volume_id', f.volume_id), a.* from finished f, actor_of_v1($3) a
)
select user_id from finished;

-- name: users_being_moved
-- The $2 users after one ($1) whose move has begun and not ended.
select user_id from user_storage where moving_since is not null and user_id > $1 order by user_id limit $2;

-- name: users_to_move
-- The $3 users after one ($2) who are placed on a volume ($1), or of whom something lies there; and what they store. The latter looks at the
-- files' rows of each user who is placed elsewhere: all pages together at each row once (`offset 0`; as a join, each page at all).
select u.user_id, u.volume_id, u.file_count, u.total_bytes + u.preview_bytes as bytes
  from user_storage u
 where u.erasing_at is null and u.user_id > $2
   and (u.volume_id = $1
        or exists (select from user_files f where f.user_id = u.user_id and f.volume_id = $1 offset 0)
        or u.user_id in (select l.user_id from uploads l where l.volume_id = $1)
        or u.user_id in (select r.user_id from resumable_uploads r where r.volume_id = $1))
 order by u.user_id limit $3;

-- name: user_to_move
-- The same of one user.
select user_id, volume_id, file_count, total_bytes + preview_bytes as bytes from user_storage where user_id = $1 and erasing_at is null;

-- name: users_astray
-- Users who are on a volume that is not theirs: another one is reserved for them, or theirs is reserved for somebody else.
select u.user_id, u.volume_id, u.file_count, u.total_bytes + u.preview_bytes as bytes
  from volumes v join user_storage u on (u.user_id = v.reserved_for and u.volume_id <> v.id) or (u.volume_id = v.id and u.user_id <> v.reserved_for)
 where v.reserved_for is not null and u.erasing_at is null and u.user_id > $1 order by u.user_id limit $2;

-- name: largest_user
-- The user of a volume ($1) who stores the most, and at most $2 bytes; not one of some ($3), and nobody who is being moved already.
select user_id, volume_id, file_count, total_bytes + preview_bytes as bytes
  from user_storage
 where volume_id = $1 and total_bytes + preview_bytes between 1 and $2 and user_id <> all ($3::text[]) and erasing_at is null and moving_since is null
 order by total_bytes + preview_bytes desc, user_id limit 1;

-- name: page_to_move
-- The $4 files of a user ($1) after one (by $2 and $3, its date and id) that are not on the user's volume, in the order in which they came,
-- which has an index.
select f.id, f.user_id, f.volume_id, f.file_path, f.file_size, f.sha256, f.damaged_at, f.generation, f.upload_date
  from user_files f join user_storage u on u.user_id = f.user_id
 where f.user_id = $1 and (f.upload_date, f.id) > ($2, $3) and f.volume_id <> u.volume_id
 order by f.upload_date, f.id limit $4;

-- name: previews_to_move
-- The previews of some files.
select file_id, file_name, size_bytes from previews where file_id = any ($1) order by file_id, variant;

-- name: copies_on
-- Names on a volume ($1) that tombstones keep of some files ($2).
select id, volume_id, file_path from tombstones where volume_id = $1 and file_id = any ($2);

-- name: announce_copies
-- Before a copy gets its name on a volume ($1): so it is known whatever happens next, and goes with its file. A file that is deleted, or
-- whose links are revoked, takes the tombstone of every copy along. Returns those files ($2, with their generations) that are still elsewhere.
with wanted as (
    select f.id, f.generation, f.file_path
      from unnest($2::uuid[], $3::integer[]) w (id, generation)
      join user_files f on f.id = w.id and f.generation = w.generation and f.volume_id <> $1
), announced as (
    insert into tombstones (volume_id, file_path, file_id, generation)
    select $1, w.file_path, w.id, w.generation from wanted w
    union all
    select $1, substring(w.file_path from '^users/[^/]+') || '/previews/' || w.id, w.id, w.generation from wanted w
)
select id from wanted;

-- name: lock_files_to_move
-- Those of some files that are still on a volume ($1), of the generations $3, and sound; they stay so until the transaction ends. In the order of
-- ids, as all who lock several. Not a join, which would read all files in the order of their ids rather than sort some.
select f.id from user_files f
 where f.id = any ($2::uuid[]) and f.generation = ($3::integer[])[array_position($2::uuid[], f.id)] and f.volume_id = $1 and f.damaged_at is null
 order by f.id for update;

-- name: switch_files
-- From now on these files ($3) are on another volume ($2) than before ($1). Their names there are no copies any more; those that they had become
-- some, by the quota trigger's tombstones and, of their previews, by these.
with switched as (
    update user_files set volume_id = $2 where id = any ($3) and volume_id = $1 returning id, generation, file_path
), named as (
    delete from tombstones t using switched s where t.volume_id = $2 and t.file_id = s.id
)
insert into tombstones (volume_id, file_path, file_id, generation)
select $1, substring(s.file_path from '^users/[^/]+') || '/previews/' || s.id, s.id, s.generation from switched s;

-- name: old_copies
-- Up to $2 copies that are older than $1 seconds.
select t.id, t.volume_id, t.file_path
  from tombstones t join user_files f on f.id = t.file_id and f.generation = t.generation and f.volume_id <> t.volume_id
 where t.created_at < clock_timestamp() - make_interval(secs => $1) order by t.id limit $2;

-- name: count_copies
-- How many copies there are, and how old the oldest is.
select count(*) as copies, extract(epoch from clock_timestamp() - min(t.created_at))::double precision as oldest_seconds
  from tombstones t join user_files f on f.id = t.file_id and f.generation = t.generation and f.volume_id <> t.volume_id;

-- name: resumables_to_move
-- Resumable uploads of a user that are not on the user's volume, and that nobody is writing to. Of one that is part of another the bytes are
-- being read.
select {row} from resumable_uploads r join user_storage u on u.user_id = r.user_id
 where r.user_id = $1 and r.volume_id <> u.volume_id and r.held_by is null and r.joined_as is null order by r.id;

-- name: switch_resumable_upload
-- From now on the bytes of an upload lie on another volume ($5), under another name ($6), unless somebody has had the upload since it was looked
-- at: with that fence ($2), offset ($3) and name ($4).
with switched as (
    update resumable_uploads set volume_id = $5, incoming_name = $6
     where id = $1 and fence = $2 and offset_bytes = $3 and incoming_name = $4 and held_by is null and joined_as is null returning id
), relabelled as (
    update uploads u set volume_id = $5 from switched s where u.id = s.id
)
select id from switched;
