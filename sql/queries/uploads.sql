-- Reservations: quota held by uploads under way.

-- name: open_reservation
-- Charges the quota for an upload. The lease is in seconds.
insert into uploads (id, user_id, volume_id, reserved_bytes, idempotency_key, expires_at)
values ($1, $2, $3, $4, $5, clock_timestamp() + make_interval(secs => $6));

-- name: resize_reservation
-- Makes a reservation larger, which the trigger may refuse, or smaller.
update uploads set reserved_bytes = $2 where id = $1 returning id;

-- name: renew_reservations
-- Moves the end of the lease of live reservations. In the order of ids, as every statement that locks several.
with mine as materialized (select id from uploads where id = any ($1) order by id for update)
update uploads u set expires_at = clock_timestamp() + make_interval(secs => $2) from mine where u.id = mine.id;

-- name: release_reservation
-- Gives the bytes of one reservation back.
delete from uploads where id = $1;

-- name: release_expired
-- Gives the bytes of abandoned reservations back; one that somebody is using at this moment is left alone.
with expired as materialized (
    select id from uploads where expires_at < clock_timestamp() order by expires_at limit $1 for update skip locked
)
delete from uploads u using expired where u.id = expired.id returning u.id;

-- name: live_uploads
-- Which of the ids still hold a reservation.
select id from uploads where id = any ($1);
