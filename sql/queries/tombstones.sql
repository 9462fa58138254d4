-- Stored files whose rows are gone.

-- name: pending_tombstones
-- The oldest tombstones.
select id, volume_id, file_path from tombstones order by id limit $1;

-- name: drop_tombstones
-- Forgets stored files that are gone from the volume.
delete from tombstones where id = any ($1);
