-- Stored files whose rows are gone.

-- name: pending_tombstones
-- The oldest tombstones that there is something to do about. Those of copies, whose files are on another volume, are `coffer rebalance`'s
-- alone (moves.sql). Each file is looked up (`offset 0`): a join would read all files, and all tombstones, for any of them.
select t.id, t.volume_id, t.file_path from tombstones t
 where not exists (select from user_files f where f.id = t.file_id and f.generation = t.generation and f.volume_id <> t.volume_id offset 0)
 order by t.id limit $1;

-- name: tombstones_of
-- The tombstones of a file, of one generation.
select id, volume_id, file_path from tombstones where file_id = $1 and generation = $2;

-- name: drop_tombstones
-- Forgets stored files that are gone from the volume.
delete from tombstones where id = any ($1);
