-- Lists. Each reads one index range in its order, from a position on; sql/migrations/0004 tells why each filter has its own source.
--
-- {file} stands for the columns of server.ledger.models.File, {key} for the column to sort by, {direction} for asc or desc, {bounds}
-- for conditions on the range, {others} for the filters that are not the source's. $1 is the user, $2 how many matching rows to return,
-- $3 how many rows to read for them at most: the last of those is returned even if it does not match, to go on from. PostgreSQL stops
-- reading as soon as `found` or `place` is past its bound (a run condition of the window). Values of filters and conditions follow. What
-- is in the trash does not match.

-- name: list_all
-- All files of a user.
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, f.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_files f cross join lateral (select f.deleted_at is null {others} as matches) m
         where f.user_id = $1 {bounds}
        window reading as (order by f.{key} {direction}, f.id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};

-- name: list_by_type
-- Files of types ($5), of a MIME type ($6), or of both: one range for each pair that the user has, merged. $4 is how many rows of each
-- range to read, for the merge reads them all; and as many more as the user has in the trash, which may lie among them.
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, f.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_storage_by_type t
         cross join lateral (
                   select * from user_files f
                    where f.file_type || ':' || f.mime_type || ':' || f.user_id = t.file_type || ':' || t.mime_type || ':' || t.user_id
                          {bounds}
                    order by f.{key} {direction}, f.id {direction}
                    limit least($3, $4 + (select count(*) from (select from user_files d
                                                                 where d.user_id = $1 and d.deleted_at is not null limit $3) trash))
               ) f
         cross join lateral (select f.deleted_at is null {others} as matches) m
         where t.user_id = $1 and ($5::text[] is null or t.file_type = any ($5)) and ($6::text is null or t.mime_type = $6) and t.file_count > 0
        window reading as (order by f.{key} {direction}, f.id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};

-- name: list_favorites
-- Favourite files.
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, f.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_files f cross join lateral (select f.deleted_at is null {others} as matches) m
         where case when f.is_favorite then f.user_id end = $1 and f.is_favorite {bounds}
        window reading as (order by f.{key} {direction}, f.id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};

-- name: list_package
-- Files of a package ($4).
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, f.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_files f cross join lateral (select f.deleted_at is null {others} as matches) m
         where f.user_id || E'\x1f' || f.package_name = $1 || E'\x1f' || $4 and f.package_name is not null {bounds}
        window reading as (order by f.{key} {direction}, f.id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};

-- name: list_tag
-- Files with a tag ($4).
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, s.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_file_tags s join user_files f on f.id = s.file_id cross join lateral (select f.deleted_at is null {others} as matches) m
         where s.user_id = $1 and s.tag = $4 {bounds}
        window reading as (order by s.{key} {direction}, s.file_id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};

-- name: list_name
-- Files with words in their names that begin as $4 does. A file that matches at several words matches at the {first} of them alone.
-- Each sub-select of $4 is evaluated once; without it the words would be taken apart again for every row. `offset 0` keeps the sub-selects
-- out of the window's function, where PostgreSQL 15 fails on them.
select {file}, f.sort_key, f.matches, f.place
  from (select f.*, s.{key} as sort_key, m.matches,
               count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from user_file_words s join user_files f on f.id = s.file_id
         cross join lateral (
                   select s.suffix_key = (
                              select {first}(suffix collate "C") from name_suffixes_v1(f.file_name) suffix
                               where suffix collate "C" >= (select search_key_v1($4))
                                 and suffix collate "C" < (select search_key_v1($4) || chr(1114111)))
                          and f.deleted_at is null {others} as matches
                   offset 0
               ) m
         where s.user_id = $1
           and s.suffix_key >= (select search_key_v1($4))
           and s.suffix_key < (select search_key_v1($4) || chr(1114111)) {bounds}
        window reading as (order by s.{key} {direction}, s.file_id {direction} rows unbounded preceding)) f
 where f.found <= $2 and f.place <= $3 and (f.matches or f.place = $3)
 order by f.sort_key {direction}, f.id {direction};
