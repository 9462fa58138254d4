-- What `coffer audit` compares with the volumes. Each page is an index range, so no run holds more than a page in memory.

-- name: page_of_paths
-- Where the bytes of the $2 files after an id ($1) lie, and how many those are, by volume: one text each, in the same order, which takes a
-- third of the time of as many rows. Without those known to be damaged. `last` is the last id of each volume.
select volume_id, string_agg(file_path, e'\n') filter (where damaged_at is null) as paths,
       string_agg(file_size::text, ' ') filter (where damaged_at is null) as sizes, (array_agg(id))[count(*)] as last
  from (select id, volume_id, file_path, file_size, damaged_at from user_files where id > $1 order by id limit $2) page
 group by volume_id;

-- name: get_stored
-- What the rows of some files say of their bytes.
select id, user_id, volume_id, file_path, file_size, sha256, damaged_at from user_files where id = any ($1);

-- name: known_paths
-- The paths on a volume ($1) of the files with these ids, as one text; so are the ids ($2), with spaces between, which costs the caller a third
-- of what as many values do.
select string_agg(file_path, e'\n') as paths from user_files where id = any (string_to_array($2, ' ')::uuid[]) and volume_id = $1;

-- name: unknown_previews
-- Those of some paths on a volume ($1) that are no preview's, of the files with these ids ($3) and by these names ($4).
select p.path from unnest($2::text[], $3::uuid[], $4::text[]) p (path, id, name)
 where (select substring(f.file_path from '^users/[^/]+') || '/previews/' || f.id || '/' || v.file_name
          from user_files f join previews v on v.file_id = f.id and v.file_name = p.name
         where f.id = p.id and f.volume_id = $1) is distinct from p.path;

-- name: claimed_files
-- Those of some paths that have no row and yet are wanted, or will go by themselves: an upload of that id may still publish them, a
-- tombstone names them or the directory that they are in, or they were set aside as damaged.
select p.path from unnest($2::text[], $3::uuid[]) p (path, id)
 where exists (select from uploads u where u.id = p.id)
    or exists (select from resumable_uploads r where r.id = p.id)
    or exists (select from tombstones t where t.file_id = p.id and t.volume_id = $1 and (t.file_path = p.path or starts_with(p.path, t.file_path || '/')))
    or exists (select from user_files f where f.id = p.id and f.volume_id = $1 and f.damaged_at is not null and f.file_path || '.damaged' = p.path);

-- name: note_suspects
-- Remembers files without a row, as seen by the audit that began at $1.
insert into audit_suspects as s (volume_id, file_path, size_bytes, first_seen_at, last_seen_at)
select $2, n.path, n.size_bytes, $1, $1 from unnest($3::text[], $4::bigint[]) n (path, size_bytes)
on conflict (volume_id, file_path) do update set last_seen_at = excluded.last_seen_at, size_bytes = excluded.size_bytes;

-- name: forget_suspects
-- Forgets the suspects of a volume ($2) that the audit which began at $1 has not seen: they are gone, or have a row by now.
delete from audit_suspects where volume_id = $2 and last_seen_at < $1;

-- name: drop_suspects
-- Forgets suspects that have been dealt with.
delete from audit_suspects where volume_id = $1 and file_path = any ($2);

-- name: page_of_suspects
-- The $3 suspects of a volume ($1) after a path ($2). `seen_before`: by an earlier audit than the one that began at $4.
select file_path, size_bytes, first_seen_at < $4 as seen_before from audit_suspects
 where volume_id = $1 and file_path > $2 order by file_path limit $3;

-- name: page_of_previews
-- Where the $3 previews after one ($1, $2; null: from the first on) should lie. That the files come after it, too, is for a merge of both to begin there.
select p.file_id, p.variant, p.file_name, p.size_bytes, f.user_id, f.volume_id, f.file_path
  from (select file_id, variant, file_name, size_bytes from previews
         where (file_id, variant) > (coalesce($1::uuid, '00000000-0000-0000-0000-000000000000'), coalesce($2, '')) order by file_id, variant limit $3) p
  left join user_files f on f.id = p.file_id and f.id >= coalesce($1::uuid, '00000000-0000-0000-0000-000000000000')
 order by p.file_id, p.variant;

-- name: preview_is_stored
-- Whether a preview still has its row, and its file is where it was. Not while the file waits for its previews: somebody may be making them,
-- and their rows come last.
select exists (select from previews p join user_files f on f.id = p.file_id and f.preview_state is distinct from 'pending'
                where p.file_id = $1 and p.file_name = $2 and f.volume_id = $3 and f.file_path = $4) as yes;

-- name: page_of_counters
-- The $2 users after one ($1): what is counted of them, and what the rows sum up to, all as of one moment. The previews of each file are looked
-- up (`offset 0`): a join would read everybody's for each user.
select u.user_id, u.total_bytes, u.file_count, u.reserved_bytes, u.preview_bytes,
       f.bytes as total_sum, f.files as file_sum, r.bytes as reserved_sum, p.bytes as preview_sum,
       coalesce(h.total_bytes, 0) as last_of_history,
       (select coalesce(sum(t.total_bytes), 0)::bigint from user_storage_by_type t where t.user_id = u.user_id) as typed_bytes,
       f.types_agree
  from (select user_id, total_bytes, file_count, reserved_bytes, preview_bytes from user_storage
         where user_id > $1 order by user_id limit $2) u
 cross join lateral (
       select coalesce(sum(k.bytes), 0)::bigint as bytes, coalesce(sum(k.files), 0)::bigint as files,
              coalesce(bool_and((k.files, k.bytes) is not distinct from
                       ((select t.file_count from user_storage_by_type t
                          where t.user_id = u.user_id and t.file_type = k.file_type and t.mime_type = k.mime_type),
                        (select t.total_bytes from user_storage_by_type t
                          where t.user_id = u.user_id and t.file_type = k.file_type and t.mime_type = k.mime_type))), true) as types_agree
         from (select o.file_type, o.mime_type, count(*) as files, sum(o.file_size)::bigint as bytes
                 from user_files o where o.user_id = u.user_id group by o.file_type, o.mime_type) k) f
 cross join lateral (select coalesce(sum(o.reserved_bytes), 0)::bigint as bytes from uploads o where o.user_id = u.user_id) r
 cross join lateral (select coalesce(sum(v.size_bytes), 0)::bigint as bytes
                       from user_files o cross join lateral (select size_bytes from previews where file_id = o.id offset 0) v
                      where o.user_id = u.user_id) p
  left join lateral (select l.total_bytes from usage_ledger l where l.user_id = u.user_id order by l.id desc limit 1) h on true
 order by u.user_id;

-- name: correct_counters
-- Puts a user's counters right, and tells what they were and are.
insert into counter_corrections (user_id) values ($1) returning was, became;

-- name: count_stored
-- How many files there are and how many bytes, as the users' counters say.
select coalesce(sum(file_count), 0)::bigint as files, coalesce(sum(total_bytes), 0)::bigint as bytes from user_storage;

-- name: old_reservations
-- Reservations that housekeeping should have released $1 seconds ago.
select id, user_id, reserved_bytes from uploads where expires_at < clock_timestamp() - make_interval(secs => $1) order by expires_at limit $2;

-- name: old_tombstones
-- Deleted files whose bytes housekeeping should have removed $1 seconds ago. Not those that a backup holds, and not copies, whose files are on
-- another volume (moves.sql).
select t.id, t.volume_id, t.file_path from tombstones t
 where t.created_at < clock_timestamp() - make_interval(secs => $1)
   and not (t.is_withheld and exists (select from backups where holds_until > clock_timestamp()))
   and not exists (select from user_files f where f.id = t.file_id and f.generation = t.generation and f.volume_id <> t.volume_id offset 0)
 order by t.id limit $2;
