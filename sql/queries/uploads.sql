-- Reservations: quota held by uploads under way.

-- name: open_reservation
-- Charges the quota for an upload, or for an upload link ($7), which is recorded as made by the actor in $9. The lease is in seconds.
-- $8 limits how many the user may have.
select open_upload_v2($1, $2, $3, $4, $5, $6, $7, $8, $9);

-- name: resize_reservation
-- Makes a reservation larger, which the trigger may refuse, or smaller.
update uploads set reserved_bytes = $2 where id = $1 returning id;

-- name: renew_reservations
-- Moves the end of the lease of live reservations; one of an upload link stays at least until the link ends. In the order of ids, as
-- every statement that locks several.
with mine as materialized (select id from uploads where id = any ($1) order by id for update)
update uploads u
   set expires_at = greatest(case when u.link is not null then u.expires_at end, clock_timestamp() + make_interval(secs => $2)),
       claimed_until = case when u.claimed_until is not null then clock_timestamp() + make_interval(secs => $2) end
  from mine where u.id = mine.id;

-- name: claim_link
-- Takes an upload link's reservation for one upload, until the lease of $2 seconds ends. Nothing when it is gone or in use. $3 limits how
-- many uploads the user may have under way.
select user_id, reserved_bytes, link from claim_link_v1($1, $2, $3);

-- name: unclaim_link
-- Leaves an upload link to be tried again.
update uploads set claimed_until = null where id = $1;

-- name: release_reservation
-- Gives the bytes of one reservation back.
delete from uploads where id = $1;

-- name: close_link
-- Gives up a user's upload link that nobody is using; of those that were made for some kinds ($3) alone, unless that is null. $4 is the
-- actor.
with closed as (
    delete from uploads
     where id = $1 and user_id = $2 and link is not null and (claimed_until is null or claimed_until < clock_timestamp())
       and ($3::text[] is null or (jsonb_typeof(link -> 'kinds') = 'array' and (link -> 'kinds') <@ to_jsonb($3::text[])))
    returning id, user_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'upload_link.closed', c.user_id, c.id, '{}', a.* from closed c, actor_of_v1($4) a
)
select id from closed;

-- name: release_expired
-- Gives the bytes of abandoned reservations back, and tells under which names theirs lie; one that somebody is using at this moment is
-- left alone.
with expired as materialized (
    select id from uploads where expires_at < clock_timestamp() order by expires_at limit $1 for update skip locked
)
delete from uploads u using expired where u.id = expired.id
returning u.id, coalesce((select r.incoming_name from resumable_uploads r where r.id = u.id), u.id) as incoming_name;

-- name: live_uploads
-- Which of the ids still hold a reservation, or name the bytes of a resumable upload that does. A part's is held by what it was joined to.
select id from uploads where id = any ($1)
union
select r.incoming_name from resumable_uploads r
 where r.incoming_name = any ($1) and exists (select from uploads u where u.id = coalesce(r.joined_as, r.id));

-- name: record_infected
-- Appends the event of an upload that was refused as infected. Not for a user who is being erased: the lock keeps the erasure from
-- beginning before this is there for it to find.
insert into events (user_id, type, file_id, payload)
select user_id, 'file.infected', $2, $3::jsonb from user_storage where user_id = $1 and erasing_at is null for share;
