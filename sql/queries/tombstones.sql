-- Stored files whose rows are gone.

-- name: pending_tombstones
-- The oldest tombstones that there is something to do about. While a backup holds the bytes, those are the ones still in their places; and
-- those of copies, whose files are on another volume, are `coffer rebalance`'s alone (moves.sql). Each file is looked up (`offset 0`): a join
-- would read all files, and all tombstones, for any of them.
select t.id, t.volume_id, t.file_path from tombstones t
 where not (t.is_withheld and exists (select from backups where holds_until > clock_timestamp()))
   and not exists (select from user_files f where f.id = t.file_id and f.generation = t.generation and f.volume_id <> t.volume_id offset 0)
 order by t.id limit $1;

-- name: tombstones_of
-- The tombstones of a file, of one generation.
select id, volume_id, file_path from tombstones where file_id = $1 and generation = $2;

-- name: drop_tombstones
-- Forgets stored files that are gone from the volume.
delete from tombstones where id = any ($1);

-- name: tombstones_below
-- Those of what lies below a directory ($1, with its slash) and has not been taken out of its place.
select id, volume_id, file_path from tombstones where starts_with(file_path, $1) and not is_withheld order by id;

-- name: mark_withheld
-- These have been taken out of their places, and are kept for a backup.
update tombstones set is_withheld = true where id = any ($1);
