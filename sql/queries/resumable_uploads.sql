-- Resumable uploads. {row} stands for the columns of server.ledger.models.ResumableUpload, of the table called r.

-- name: create_resumable_upload
-- Reserves quota for an upload and remembers it. $11 limits how many unfinished ones the user may have. Tells when it expires.
select create_resumable_upload_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) as expires_at;

-- name: create_linked_upload
-- Remembers an upload by an upload link, whose reservation has been claimed for it and lasts as long as this row, or longer. What an
-- earlier one by the link left, which expired, is forgotten.
with claimed as (
    update uploads
       set is_resumable = true, expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $6)),
           claimed_until = clock_timestamp() + make_interval(secs => $6)
     where id = $1 returning id, user_id, volume_id
)
insert into resumable_uploads
       (id, user_id, volume_id, incoming_name, length_bytes, upload_metadata, details, kinds, link, expires_at)
select c.id, c.user_id, c.volume_id, $7, $2, $3, $4, $5, $8, clock_timestamp() + make_interval(secs => $6) from claimed c
on conflict (id) do update
   set volume_id = excluded.volume_id, incoming_name = excluded.incoming_name, length_bytes = excluded.length_bytes, offset_bytes = 0,
       upload_metadata = excluded.upload_metadata, details = excluded.details, kinds = excluded.kinds, link = excluded.link,
       held_by = null, held_until = null, boot_id = null, expires_at = excluded.expires_at
returning expires_at;

-- name: get_resumable_upload
-- One upload of a user, and what has become of it. A part's quota is held by what it was joined to.
select {row},
       exists (select from uploads u where u.id = coalesce(r.joined_as, r.id)) as has_reservation,
       exists (select from user_files f where f.id = r.id) as has_file,
       r.held_by is not null as is_held, r.held_by is not null and r.held_until > clock_timestamp() as is_written,
       r.expires_at <= clock_timestamp() as is_expired
  from resumable_uploads r where r.id = $1 and r.user_id = $2;

-- name: claim_resumable_upload
-- Takes an upload for one writer ($3), until the lease of $4 seconds ends, and keeps it from expiring before. Nothing when another has it,
-- or when its reservation is gone or its life over: it is published, joined, or has expired. What comes to lie beyond the offset counts
-- after a crash in this boot of the machine ($5), or not at all. $6 is the fence, which no other holder may ever have had: a crash of
-- PostgreSQL may forget the claim, for which nobody waits on the disk, and its holder then finds that the upload is not its own.
with old as (
    select r.id, r.boot_id, u.reserved_bytes from resumable_uploads r join uploads u on u.id = r.id
     where r.id = $1 and r.user_id = $2 and r.expires_at > clock_timestamp() and (r.held_by is null or r.held_until < clock_timestamp())
       for update of r, u
), kept as (
    update uploads u
       set expires_at = clock_timestamp() + make_interval(secs => $4),
           claimed_until = case when u.claimed_until is not null then clock_timestamp() + make_interval(secs => $4) end
      from old where u.id = old.id and u.expires_at < clock_timestamp() + make_interval(secs => $4)
)
update resumable_uploads r
   set held_by = $3, held_until = clock_timestamp() + make_interval(secs => $4), fence = $6, boot_id = $5,
       expires_at = greatest(r.expires_at, clock_timestamp() + make_interval(secs => $4))
  from old where r.id = old.id
returning {row}, old.boot_id as boot_id_before, old.reserved_bytes,
          case when $5::text is not null then set_config('synchronous_commit', 'off', true) end;

-- name: renew_resumable_uploads
-- Moves the end of leases to $3 seconds from now, and with it that of uploads which would expire before, in the order of ids. Returns
-- those that are still held by these writers.
with mine as materialized (
    select r.id, r.fence from resumable_uploads r join unnest($1::uuid[], $2::bigint[]) as held (id, fence) on r.id = held.id and r.fence = held.fence
     where r.held_by is not null order by r.id for update of r
), kept as (
    update uploads u
       set expires_at = clock_timestamp() + make_interval(secs => $3),
           claimed_until = case when u.claimed_until is not null then clock_timestamp() + make_interval(secs => $3) end
      from mine where u.id = mine.id and u.expires_at < clock_timestamp() + make_interval(secs => $3)
)
update resumable_uploads r
   set held_until = clock_timestamp() + make_interval(secs => $3),
       expires_at = greatest(r.expires_at, clock_timestamp() + make_interval(secs => $3))
  from mine where r.id = mine.id returning r.id, r.fence;

-- name: checkpoint_resumable_upload
-- Records that so many bytes ($3) are synced under a name ($4), and lets the upload live $5 seconds from now, with its parts. With $6 the
-- writer lets go of it, and those who wait are told. Returns nothing when another writer has it.
with saved as (
    update resumable_uploads
       set offset_bytes = $3, incoming_name = $4, expires_at = greatest(expires_at, clock_timestamp() + make_interval(secs => $5)),
           held_by = case when not $6 then held_by end, held_until = case when not $6 then held_until end
     where id = $1 and fence = $2 and held_by is not null
    returning id, parts, expires_at
), kept as (
    update uploads u
       set expires_at = greatest(case when u.link is not null then u.expires_at end, s.expires_at),
           claimed_until = case when u.claimed_until is not null then s.expires_at end
      from saved s where u.id = s.id
), parts_kept as (
    update resumable_uploads p set expires_at = s.expires_at from saved s where p.id = any (s.parts) and p.joined_as = s.id
)
select expires_at, case when $6 then pg_notify('coffer_notice', 'released/' || id) end from saved;

-- name: declare_resumable_length
-- Says how long an upload is going to be, once. Returns nothing when another writer has it or the length is known.
update resumable_uploads set length_bytes = $3 where id = $1 and fence = $2 and held_by is not null and length_bytes is null returning id;

-- name: leave_resumable_upload
-- Ends a lease without a word on how far the upload is: whoever comes next looks at its file. With $3 what lies beyond the offset does not
-- count.
with left_alone as (
    update resumable_uploads set held_until = clock_timestamp(), boot_id = case when not $3 then boot_id end
     where id = $1 and fence = $2 and held_by is not null returning id
)
select pg_notify('coffer_notice', 'released/' || id) from left_alone;

-- name: end_resumable_upload
-- Forgets an upload that its writer holds, with its quota and its parts; an upload link may be used again. Tells the names of their bytes.
with gone as (
    delete from resumable_uploads where id = $1 and fence = $2 and held_by is not null returning id, volume_id, incoming_name, parts, link
), parts_gone as (
    delete from resumable_uploads p using gone g where p.id = any (g.parts) and p.joined_as = g.id returning p.volume_id, p.incoming_name
), released as (
    delete from uploads u using gone g where u.id = g.id and g.link is null
), unclaimed as (
    update uploads u set claimed_until = null, is_resumable = false from gone g where u.id = g.id and g.link is not null
)
select volume_id, incoming_name, pg_notify('coffer_notice', 'released/' || id) from gone
union all
select volume_id, incoming_name, null from parts_gone;

-- name: forget_published_upload
-- Forgets an upload whose file has been published.
delete from resumable_uploads r
 where r.id = $1 and r.user_id = $2 and not exists (select from uploads u where u.id = coalesce(r.joined_as, r.id));

-- name: measure_parts
-- How long these uploads of a user are together, as far as that has been declared.
select coalesce(sum(length_bytes), 0)::bigint as total_bytes from resumable_uploads where id = any ($2) and user_id = $1;

-- name: find_joined_upload
-- The upload that was made of these parts, in this order.
select {row} from resumable_uploads r where r.parts[1] = ($2::uuid[])[1] and r.parts = $2 and r.user_id = $1 limit 1;

-- name: join_resumable_uploads
-- Makes one upload ($1) of whole partial ones ($3), whose quota it takes over; their bytes stay until it is published. Returns nothing
-- unless every part is there, whole and held by nobody.
select join_resumable_uploads_v1($1, $2, $3, $4, $5, $6, $7) as expires_at;

-- name: end_parts
-- Forgets the parts of an upload that has been published, and tells the names of their bytes.
delete from resumable_uploads p using resumable_uploads r
 where r.id = $1 and r.user_id = p.user_id and p.id = any (r.parts) and p.joined_as = r.id returning p.volume_id, p.incoming_name;

-- name: want_resumable_upload
-- Asks whoever writes an upload at this moment, and nobody who comes after, to let go of it.
select pg_notify('coffer_notice', 'wanted/' || id || '/' || fence) from resumable_uploads where id = $1 and held_by is not null;

-- name: purge_resumable_uploads
-- Forgets uploads that ended more than $1 seconds ago, $2 at once: till then they are answered as expired. Forgets also parts of what was
-- published or is over, which a crash may leave. Tells the names of their bytes.
with old as (
    select id from resumable_uploads where expires_at < clock_timestamp() - make_interval(secs => $1) order by expires_at limit $2
), left_over as (
    select r.id from resumable_uploads r
     where r.joined_as is not null and not exists (select from uploads u where u.id = r.joined_as) order by r.joined_as limit $2
)
delete from resumable_uploads where id in (select id from old union select id from left_over) returning volume_id, incoming_name;

-- name: user_of_upload_link
-- Whose an upload link is: by its reservation, or by the resumable upload that used it.
select user_id from uploads where id = $1 and link is not null
union
select user_id from resumable_uploads where id = $1 and link is not null;

-- name: list_resumable_bytes
-- Where the bytes of a user's uploads lie.
select volume_id, incoming_name from resumable_uploads where user_id = $1;
