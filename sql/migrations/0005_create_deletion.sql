-- Deleting files in one round trip that also tells which stored files to remove.

create function delete_files_v1(p_user_id text, p_ids uuid[])
returns table (file_id uuid, tombstone_id bigint, volume_id uuid, file_path text)
language plpgsql set search_path = public, pg_temp as $$
-- Deletes those of the user's files, appends an event for each, and returns the tombstone that the trigger left for each.
-- A function, because the rows that a trigger inserts are invisible to the statement that fired it.
-- Locks: the files' rows in the order of their ids, so that two overlapping deletions wait for each other instead of deadlocking;
--   then what user_files_deleted_v1 locks.
#variable_conflict use_column
declare
    deleted_ids uuid[];
    deleted_generations integer[];
begin
    with locked as materialized (
        select f.id from user_files f where f.user_id = p_user_id and f.id = any (p_ids) order by f.id for update
    ), gone as (
        delete from user_files f using locked l where f.id = l.id returning f.id, f.generation, f.file_type, f.file_size
    ), noted as (
        insert into events (user_id, type, file_id, payload)
        select p_user_id, 'file.deleted', g.id, jsonb_build_object('file_type', g.file_type, 'file_size', g.file_size) from gone g
    )
    select array_agg(g.id), array_agg(g.generation) into deleted_ids, deleted_generations from gone g;
    return query
        select t.file_id, t.id, t.volume_id, t.file_path
          from unnest(deleted_ids, deleted_generations) g (id, generation)
          join tombstones t on t.file_id = g.id and t.generation = g.generation;
end
$$;
