-- The audit trail: lists, records of reading, ageing. What changes something records it itself.

-- name: list_trail
-- Records of a filter, newest first. One index range is read in its order: {bounds} are the conditions on it, {others} the filters on what it
-- yields. $1 is how many matching rows to return, $2 how many to read for them at most: the last of those is returned even if it does not
-- match, to go on from.
select {record}, l.matches, l.place
  from (select l.*, m.matches, count(*) filter (where m.matches) over reading as found, row_number() over reading as place
          from audit_log l cross join lateral (select true {others} as matches) m
         where true {bounds}
        window reading as (order by l.at desc, l.id desc rows unbounded preceding)) l
 where l.found <= $1 and l.place <= $2 and (l.matches or l.place = $2)
 order by l.at desc, l.id desc;

-- name: record_reads
-- Records an action ($1) that changes nothing, once for each of a user's files ($3). $4 is the actor, as JSON.
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select $1, $2, f.id, '{}', a.* from unnest($3::uuid[]) f (id), actor_of_v1($4) a;

-- name: purge_trail
-- Deletes the oldest records ($2 at most) of those older than $1 days, and tells how many. One process at a time: $3 is the key of the lock.
with old as materialized (
    select l.at, l.id from audit_log l
     where l.at < now() - make_interval(days => $1) and (select pg_try_advisory_xact_lock($3))
     order by l.at, l.id limit $2
), gone as (
    delete from audit_log l using old o where l.at = o.at and l.id = o.id returning 1
)
select count(*) from gone;
