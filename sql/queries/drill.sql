-- What a drill asks of a dump that was restored to scratch. The table is made there only, and goes with it.

-- name: create_listing
-- What a backup holds, by volume and path.
create table coffer_listing (volume_id uuid, path text, size_bytes bigint, sha256 bytea, primary key (volume_id, path));

-- name: note_listing
-- Some of it. What was withheld has the path withheld/<name>.
insert into coffer_listing (volume_id, path, size_bytes, sha256) select $1, * from unnest($2::text[], $3::bigint[], $4::bytea[]) on conflict do nothing;

-- name: missing_in_listing
-- Of the $2 files after an id ($1), those that the backup does not hold with their length, and with their bytes where those were read. One
-- more line, without a path, tells the last id looked at and how many files there were.
with page as materialized (
    select id, user_id, volume_id, file_path, file_size, sha256, damaged_at from user_files where id > $1 order by id limit $2
)
select p.id, p.user_id, p.volume_id, p.file_path, p.file_size, p.sha256, p.damaged_at, null::bigint as looked_at, null::uuid as last from page p
 where p.damaged_at is null
   and not exists (select from coffer_listing l
                    where l.volume_id = p.volume_id
                      and l.path in (p.file_path, 'withheld/' || substring(p.file_path from '[^/]+$'))
                      and l.size_bytes = p.file_size and (l.sha256 is null or l.sha256 = p.sha256))
union all
select null, null, null, null, null, null, null, (select count(*) from page), (select id from page order by id desc limit 1);

-- name: sample_files
-- Some files by chance.
select id, user_id, volume_id, file_path, file_size, sha256, damaged_at from user_files where damaged_at is null order by random() limit $1;

-- name: withheld_paths
-- Of these paths ($2), those that the backup holds as withheld.
select p as path from unnest($2::text[]) p
 where exists (select from coffer_listing l where l.volume_id = $1 and l.path = 'withheld/' || substring(p from '[^/]+$'))
   and not exists (select from coffer_listing l where l.volume_id = $1 and l.path = p);

