-- The memory of making. {media} stands for the columns of server.ledger.models.Media, of the table called m. {kept} is true of all but what
-- lies in the trash.

-- name: list_media
-- A user's media, newest first: $2 is how many to return, $3 how many rows to read for them at most. The last of those is returned even if
-- it does not match, to go on from.
select {media}, m.matches, m.place
  from (select m.*, l.matches, count(*) filter (where l.matches) over reading as found, row_number() over reading as place
          from generated_media m cross join lateral (select true {others} as matches) l
         where m.user_id = $1 and {kept} {bounds}
        window reading as (order by m.created_at desc, m.id desc rows unbounded preceding)) m
 where m.found <= $2 and m.place <= $3 and (m.matches or m.place = $3)
 order by m.created_at desc, m.id desc;

-- name: get_media
-- One piece of media of one user; with $3, only of those types.
select {media} from generated_media m where m.user_id = $1 and m.id = $2 and {kept} and ($3::text[] is null or m.media_type = any ($3));

-- name: add_uploaded_media
-- Remembers a file ($2) of a user as media that they have uploaded, of an entity and a project, or of others than before. Nothing for a file
-- that is media in another way. The file is locked, so that a deletion at the same moment finds what it has to forget.
with f as materialized (
    select f.id, f.user_id, f.file_type from user_files f where f.user_id = $1 and f.id = $2 and f.deleted_at is null for key share
)
insert into generated_media as m (id, user_id, file_id, entity_type, entity_id, project_id, media_type, source_type, root_id)
select f.id, f.user_id, f.id, $3, $4, $5, f.file_type, 'uploaded', f.id from f
on conflict (file_id) where file_id is not null do update
   set entity_type = excluded.entity_type, entity_id = excluded.entity_id, project_id = excluded.project_id,
       is_primary = m.is_primary and (m.entity_type, m.entity_id) is not distinct from (excluded.entity_type, excluded.entity_id)
 where m.source_type = 'uploaded'
returning {media};

-- name: media_ancestors
-- What a piece of media was made anew from, and that from, nearest first; $3 at most.
with recursive line (id, depth) as (
    select m.parent_id, 1 from generated_media m where m.user_id = $1 and m.id = $2
    union all
    select m.parent_id, l.depth + 1 from line l join generated_media m on m.user_id = $1 and m.id = l.id where l.depth < $3
)
select {media} from line l join generated_media m on m.user_id = $1 and m.id = l.id where {kept} order by l.depth;

-- name: set_primary
-- Makes a piece of media the one that stands for its entity, or no longer. Another one that did is put back first: the index holds one.
with wanted as materialized (
    select m.id, m.user_id, m.entity_type, m.entity_id from generated_media m where m.user_id = $1 and m.id = $2 and {kept} for update
), others as (
    update generated_media o set is_primary = false from wanted w
     where $3 and o.user_id = w.user_id and o.entity_type = w.entity_type and o.entity_id = w.entity_id and o.is_primary and o.id <> w.id
    returning o.id
)
update generated_media m set is_primary = $3 from wanted w, (select count(*) as put_back from others) o
 where m.id = w.id and o.put_back >= 0 returning {media};
