-- Lists. Each is one index range in its order, read from a cursor; sql/migrations/0004 tells why each filter has its own source.
-- {file} stands for the columns of server.ledger.models.File, {key} for the column to sort by, {direction} for asc or desc, {more} for
-- the cursor's and the residual conditions. $1 is the user, $2 the limit; the conditions use what follows.

-- name: list_all
-- All files of a user.
select {file}, f.{key} as sort_key
  from user_files f
 where f.user_id = $1 {more}
 order by f.{key} {direction}, f.id {direction}
 limit $2;

-- name: list_by_type
-- Files of a type ($3), of a MIME type ($4), or of both: one range for each pair that the user has, merged.
select {file}, f.{key} as sort_key
  from user_storage_by_type t
 cross join lateral (
           select * from user_files f
            where f.file_type || ':' || f.mime_type || ':' || f.user_id = t.file_type || ':' || t.mime_type || ':' || t.user_id {more}
            order by f.{key} {direction}, f.id {direction}
            limit $2
       ) f
 where t.user_id = $1 and ($3::text is null or t.file_type = $3) and ($4::text is null or t.mime_type = $4) and t.file_count > 0
 order by f.{key} {direction}, f.id {direction}
 limit $2;

-- name: list_favorites
-- Favourite files.
select {file}, f.{key} as sort_key
  from user_files f
 where case when f.is_favorite then f.user_id end = $1 and f.is_favorite {more}
 order by f.{key} {direction}, f.id {direction}
 limit $2;

-- name: list_package
-- Files of a package ($3).
select {file}, f.{key} as sort_key
  from user_files f
 where f.user_id || E'\x1f' || f.package_name = $1 || E'\x1f' || $3 and f.package_name is not null {more}
 order by f.{key} {direction}, f.id {direction}
 limit $2;

-- name: list_tag
-- Files with a tag ($3).
select {file}, s.{key} as sort_key
  from user_file_tags s join user_files f on f.id = s.file_id
 where s.user_id = $1 and s.tag = $3 {more}
 order by s.{key} {direction}, s.file_id {direction}
 limit $2;

-- name: list_name
-- Files with words in their names that begin as $3 does. A file that matches at several words is listed at the first of them in the order.
select {file}, s.{key} as sort_key
  from user_file_words s join user_files f on f.id = s.file_id
 where s.user_id = $1
   and s.suffix_key >= search_key_v1(name_words_v1($3))
   and s.suffix_key < search_key_v1(name_words_v1($3)) || chr(1114111)
   and s.suffix_key = (
           select min(suffix collate "C") from name_suffixes_v1(f.file_name) suffix
            where suffix collate "C" >= search_key_v1(name_words_v1($3))) {more}
 order by s.{key} {direction}, s.file_id {direction}
 limit $2;
