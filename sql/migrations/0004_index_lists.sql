-- Lists: every filter and sort that the API offers is one index range, read from a cursor (server/ledger/listing.py).
--
-- A sort without a filter walks (user_id, <sort>, id). A filter has its own indexes whose first column is one key made of the filter
-- and the user. Queries name that key and not user_id, so the planner cannot walk the user's whole list and filter it instead, which
-- would cost a million rows for a user whose files hardly ever match.

create index user_files_created on user_files (user_id, upload_date, id);
create index user_files_name on user_files (user_id, name_key, id);
create index user_files_size on user_files (user_id, file_size, id);

-- Serves the filters by type and by MIME type: the few pairs that a user has stand in user_storage_by_type.
create index user_files_type_created on user_files ((file_type || ':' || mime_type || ':' || user_id), upload_date, id);
create index user_files_type_name on user_files ((file_type || ':' || mime_type || ':' || user_id), name_key, id);
create index user_files_type_size on user_files ((file_type || ':' || mime_type || ':' || user_id), file_size, id);

create index user_files_favorite_created on user_files ((case when is_favorite then user_id end), upload_date, id) where is_favorite;
create index user_files_favorite_name on user_files ((case when is_favorite then user_id end), name_key, id) where is_favorite;
create index user_files_favorite_size on user_files ((case when is_favorite then user_id end), file_size, id) where is_favorite;

-- A user_id holds no control character (user_storage_user_id_printable), so the separator keeps the two parts apart.
create index user_files_package_created on user_files ((user_id || E'\x1f' || package_name), upload_date, id)
    where package_name is not null;
create index user_files_package_name on user_files ((user_id || E'\x1f' || package_name), name_key, id) where package_name is not null;
create index user_files_package_size on user_files ((user_id || E'\x1f' || package_name), file_size, id) where package_name is not null;

-- One row per file and tag, with a copy of what lists sort by. Kept by triggers.
create table user_file_tags (
    user_id varchar(255) not null,
    tag varchar(255) not null,
    upload_date timestamptz not null,
    name_key text collate "C" not null,
    file_size bigint not null,
    file_id uuid not null,
    constraint user_file_tags_pkey primary key (user_id, tag, upload_date, file_id)
);

create index user_file_tags_name on user_file_tags (user_id, tag, name_key, file_id);
create index user_file_tags_size on user_file_tags (user_id, tag, file_size, file_id);

-- One row per word of a file's name: the name from that word on, so a search for `beach` is a range that finds `Sunset-Beach.jpg`.
-- Kept by triggers.
create table user_file_words (
    user_id varchar(255) not null,
    suffix_key text collate "C" not null,
    file_id uuid not null,
    constraint user_file_words_pkey primary key (user_id, suffix_key, file_id)
);

create function name_suffixes_v1(p_name text) returns setof text
language sql immutable parallel safe rows 4 as $$
-- What a name is found by: its lower-cased words from each of the first eight on, joined by spaces, 64 characters at most (which bounds
-- the index row). ASCII punctuation, spaces and the ideographic space separate words; everything else belongs to one, whatever the
-- database's locale says about letters. No search_path of its own, so that PostgreSQL puts the body into the query that calls it.
select distinct left(array_to_string(w.words[i:], ' '), 64)
  from (select array_remove(regexp_split_to_array(lower(p_name), '[\x01-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]+'), '')) w (words),
       generate_series(1, least(8, cardinality(w.words))) i
$$;

create function search_key_v1(p_search text) returns text
language sql immutable parallel safe as $$
-- What the suffixes of matching names begin with.
select left(array_to_string(array_remove(
    regexp_split_to_array(lower(p_search), '[\x01-\x2f\x3a-\x40\x5b-\x60\x7b-\x7f\u3000]+'), ''), ' '), 64)
$$;

create function user_files_index_inserted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: user_file_tags and user_file_words hold exactly what the rows of user_files say.
-- Fires: after each INSERT or COPY into user_files, once per statement, after the quota trigger (triggers fire by name).
-- Locks: the new rows only. Cost: per tag four index entries, per word two writes; about 65 microseconds for a name of four words.
-- Why not Python: lists must stay true after direct SQL.
begin
    insert into user_file_tags (user_id, tag, upload_date, name_key, file_size, file_id)
    select distinct n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag);
    insert into user_file_words (user_id, suffix_key, file_id)
    select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix);
    return null;
end
$$;

create function user_files_index_deleted_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant, locks and reason: as user_files_index_inserted_v1.
-- Fires: after each DELETE from user_files, once per statement. Cost: one index probe per tag and per word.
begin
    delete from user_file_tags d
     using (select distinct o.user_id, t.tag, o.upload_date, o.id from old_rows o, unnest(o.tags) t (tag)) gone
     where d.user_id = gone.user_id and d.tag = gone.tag and d.upload_date = gone.upload_date and d.file_id = gone.id;
    delete from user_file_words d
     using (select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix)) gone
     where d.user_id = gone.user_id and d.suffix_key = gone.suffix and d.file_id = gone.id;
    return null;
end
$$;

create function user_files_index_updated_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant, locks and reason: as user_files_index_inserted_v1.
-- Fires: after each UPDATE of user_files, once per statement. Cost: about 20 microseconds when nothing indexed changes.
begin
    if exists (
        select from old_rows o full join new_rows n using (id)
         where (o.user_id, o.tags, o.upload_date, o.name_key, o.file_size)
               is distinct from (n.user_id, n.tags, n.upload_date, n.name_key, n.file_size)
    ) then
        delete from user_file_tags d
         using (select o.user_id, t.tag, o.upload_date, o.name_key, o.file_size, o.id from old_rows o, unnest(o.tags) t (tag)
                except
                select n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag)) gone
         where d.user_id = gone.user_id and d.tag = gone.tag and d.upload_date = gone.upload_date and d.file_id = gone.id;
        insert into user_file_tags (user_id, tag, upload_date, name_key, file_size, file_id)
        select n.user_id, t.tag, n.upload_date, n.name_key, n.file_size, n.id from new_rows n, unnest(n.tags) t (tag)
        except
        select o.user_id, t.tag, o.upload_date, o.name_key, o.file_size, o.id from old_rows o, unnest(o.tags) t (tag);
    end if;
    if exists (
        select from old_rows o full join new_rows n using (id) where (o.user_id, o.file_name) is distinct from (n.user_id, n.file_name)
    ) then
        delete from user_file_words d
         using (select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix)
                except
                select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix)) gone
         where d.user_id = gone.user_id and d.suffix_key = gone.suffix and d.file_id = gone.id;
        insert into user_file_words (user_id, suffix_key, file_id)
        select n.user_id, w.suffix, n.id from new_rows n, name_suffixes_v1(n.file_name) w (suffix)
        except
        select o.user_id, w.suffix, o.id from old_rows o, name_suffixes_v1(o.file_name) w (suffix);
    end if;
    return null;
end
$$;

create trigger search_inserted after insert on user_files
    referencing new table as new_rows for each statement execute function user_files_index_inserted_v1();
create trigger search_deleted after delete on user_files
    referencing old table as old_rows for each statement execute function user_files_index_deleted_v1();
create trigger search_updated after update on user_files
    referencing old table as old_rows new table as new_rows for each statement execute function user_files_index_updated_v1();
