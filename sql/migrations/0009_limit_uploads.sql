-- A user's uploads under way and upload links, counted where nobody can slip past the count.
-- SQLSTATE of its own: CF005 too many (DETAIL is the limit).

create function limit_uploads_v1(p_user_id text, p_most_uploads integer, p_most_links integer) returns void
language plpgsql as $$
-- Invariant: who calls this in the transaction that opens or claims an upload never leaves the user with more of them than the limits.
-- Called by: open_upload_v1, claim_link_v1, when the row that is to be counted is there. A null limit is none.
-- Locks: the user's row of user_storage, FOR NO KEY UPDATE, to the end of the transaction, after the upload's, as the quota triggers do.
--   So two that would each be the last one wait for each other, and the count, a statement of its own, sees what the first one did.
-- Cost: one probe, and as many entries of one index as the user has uploads, which the limits bound; about 30 microseconds
--   for 10, 300 for 1,000.
-- Why not Python: two servers would count the same rows and both find room.
--
-- A reservation whose lease has run out is nobody's upload, even if housekeeping has not come round yet.
declare
    found_uploads integer;
    found_links integer;
begin
    if p_most_uploads is null and p_most_links is null then
        return;
    end if;
    perform from user_storage where user_id = p_user_id for no key update;
    select count(*) filter (where u.link is null or u.claimed_until > clock_timestamp()), count(*) filter (where u.link is not null)
      into found_uploads, found_links
      from uploads u where u.user_id = p_user_id and u.expires_at > clock_timestamp();
    if found_uploads > p_most_uploads then
        raise exception 'user % has too many uploads under way', p_user_id
            using errcode = 'CF005', detail = p_most_uploads::text, hint = 'Wait until one ends, or raise the limit.';
    end if;
    if found_links > p_most_links then
        raise exception 'user % has too many upload links', p_user_id
            using errcode = 'CF005', detail = p_most_links::text, hint = 'Use or give up one of them, or raise the limit.';
    end if;
end
$$;

create function open_upload_v1(
    p_id uuid, p_user_id text, p_volume_id uuid, p_reserved_bytes bigint, p_idempotency_key text, p_lease_seconds double precision, p_link jsonb,
    p_most integer
) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Opens a reservation, and counts it against `p_most` of its sort: uploads, or upload links.
-- A function, because the count must come after the insert's triggers, which lock the user's row, and no part of a statement does.
begin
    insert into uploads (id, user_id, volume_id, reserved_bytes, idempotency_key, expires_at, link)
    values (p_id, p_user_id, p_volume_id, p_reserved_bytes, p_idempotency_key, clock_timestamp() + make_interval(secs => p_lease_seconds), p_link);
    perform limit_uploads_v1(p_user_id, case when p_link is null then p_most end, case when p_link is not null then p_most end);
end
$$;

create function claim_link_v1(p_id uuid, p_lease_seconds double precision, p_most_uploads integer)
returns table (user_id text, reserved_bytes bigint, link jsonb)
language plpgsql set search_path = public, pg_temp as $$
-- Takes an upload link's reservation for one upload, until its lease ends, and counts that. Nothing when it is gone or in use.
#variable_conflict use_column
declare
    claimed uploads;
begin
    update uploads
       set claimed_until = clock_timestamp() + make_interval(secs => p_lease_seconds)
     where id = p_id and link is not null and expires_at > clock_timestamp() and (claimed_until is null or claimed_until < clock_timestamp())
    returning * into claimed;
    if found then
        perform limit_uploads_v1(claimed.user_id, p_most_uploads, null);
        return query select claimed.user_id::text, claimed.reserved_bytes, claimed.link;
    end if;
end
$$;
