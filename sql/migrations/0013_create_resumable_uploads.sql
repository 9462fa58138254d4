-- Resumable uploads: what is known of one between its requests. Its quota is held by its row of `uploads`, of the same id.

-- Who writes holds the row: `held_by` until `held_until`, which the holder's process renews. `fence` is another for each holder, and every
-- statement of a holder names its own: one that was given up for dead changes nothing any more.
create table resumable_uploads (
    id uuid constraint resumable_uploads_pkey primary key,
    user_id varchar(255) not null constraint resumable_uploads_user_fkey references user_storage (user_id) on delete cascade,
    volume_id uuid not null,
    -- Under this name its bytes lie in incoming/.
    incoming_name uuid not null,
    length_bytes bigint constraint resumable_uploads_length_bytes_not_negative check (length_bytes >= 0),
    -- Synced, and never more than the file has.
    offset_bytes bigint not null default 0,
    -- What the client sent at the creation, word for word, and what we made of it.
    upload_metadata text not null,
    details jsonb not null,
    kinds text[],
    -- A partial upload is never published itself; one made of partial ones names them, in order.
    is_partial boolean not null default false,
    parts uuid[],
    -- The upload that this one is part of.
    joined_as uuid,
    -- What the upload link said that brought it.
    link jsonb,
    held_by uuid,
    held_until timestamptz,
    fence bigint not null default 0,
    -- What lies beyond offset_bytes was written since this boot of the machine and counts after a crash; null: it does not.
    boot_id text,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    constraint resumable_uploads_offset_bytes_within check (offset_bytes >= 0 and offset_bytes <= length_bytes)
);

create index resumable_uploads_user on resumable_uploads (user_id);
create index resumable_uploads_expires on resumable_uploads (expires_at);
-- An array of a thousand ids is too long for an index.
create index resumable_uploads_parts on resumable_uploads ((parts[1])) where parts is not null;
create index resumable_uploads_joined on resumable_uploads (joined_as) where joined_as is not null;
create index resumable_uploads_incoming on resumable_uploads (incoming_name);

-- They have a limit of their own.
alter table uploads add is_resumable boolean not null default false;

create or replace function limit_uploads_v1(p_user_id text, p_most_uploads integer, p_most_links integer) returns void
language plpgsql as $$
-- Invariant: who calls this in the transaction that opens or claims an upload never leaves the user with more of them than the limits.
-- Called by: open_upload_v1, claim_link_v1, when the row that is to be counted is there. A null limit is none.
-- Locks: the user's row of user_storage, FOR NO KEY UPDATE, to the end of the transaction, after the upload's, as the quota triggers do.
--   So two that would each be the last one wait for each other, and the count, a statement of its own, sees what the first one did.
-- Cost: one probe, and as many entries of one index as the user has uploads, which the limits bound; about 30 microseconds
--   for 10, 300 for 1,000.
-- Why not Python: two servers would count the same rows and both find room.
--
-- A reservation whose lease has run out is nobody's upload, even if housekeeping has not come round yet. A resumable upload has a limit of
-- its own (create_resumable_upload_v1): nobody may be sending it at this moment.
declare
    found_uploads integer;
    found_links integer;
begin
    if p_most_uploads is null and p_most_links is null then
        return;
    end if;
    perform from user_storage where user_id = p_user_id for no key update;
    select count(*) filter (where (u.link is null or u.claimed_until > clock_timestamp()) and not u.is_resumable),
           count(*) filter (where u.link is not null)
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

create function create_resumable_upload_v1(
    p_id uuid, p_user_id text, p_volume_id uuid, p_length_bytes bigint, p_reserved_bytes bigint, p_upload_metadata text, p_details jsonb,
    p_kinds text[], p_is_partial boolean, p_lifetime_seconds double precision, p_most integer
) returns timestamptz
language plpgsql set search_path = public, pg_temp as $$
-- Reserves quota for a resumable upload and remembers it; tells when it expires. `p_most` limits the user's unfinished ones; they do not
-- count as uploads under way, which somebody is sending at this moment.
-- A function, because the count must come after the insert's triggers, which lock the user's row: of two that would each be the last one,
-- the second sees the first.
declare
    expires constant timestamptz := clock_timestamp() + make_interval(secs => p_lifetime_seconds);
    unfinished bigint;
begin
    insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at, is_resumable)
    values (p_id, p_user_id, p_volume_id, p_reserved_bytes, expires, true);
    insert into resumable_uploads (id, user_id, volume_id, incoming_name, length_bytes, upload_metadata, details, kinds, is_partial, expires_at)
    values (p_id, p_user_id, p_volume_id, p_id, p_length_bytes, p_upload_metadata, p_details, p_kinds, p_is_partial, expires);
    select count(*) into unfinished from uploads u
     where u.user_id = p_user_id and u.is_resumable and u.expires_at > clock_timestamp();
    if unfinished > p_most then
        raise exception 'user % has % unfinished resumable uploads', p_user_id, unfinished - 1
            using errcode = 'CF005', detail = p_most::text, hint = 'Finish or delete some of them.';
    end if;
    return expires;
end
$$;

create function join_resumable_uploads_v1(
    p_id uuid, p_user_id text, p_parts uuid[], p_upload_metadata text, p_details jsonb, p_kinds text[], p_lifetime_seconds double precision
) returns timestamptz
language plpgsql set search_path = public, pg_temp as $$
-- Makes one upload of whole partial ones and gives it their reservations, in one transaction: nothing is charged twice, and nobody else
-- takes the quota in between. Null unless every part is there, whole, unjoined and held by nobody.
-- Locks: the parts in the order of their ids, then what the quota triggers lock.
declare
    expires constant timestamptz := clock_timestamp() + make_interval(secs => p_lifetime_seconds);
    whole bigint;
    total bigint;
    volume uuid;
begin
    with locked as materialized (
        select r.id, r.length_bytes, r.volume_id from resumable_uploads r
         where r.id = any (p_parts) and r.user_id = p_user_id and r.is_partial and r.joined_as is null
           and r.offset_bytes = r.length_bytes and r.expires_at > clock_timestamp()
           and (r.held_by is null or r.held_until < clock_timestamp())
         order by r.id for update
    )
    select count(*), coalesce(sum(l.length_bytes), 0), (array_agg(l.volume_id order by l.id))[1] into whole, total, volume from locked l;
    if whole = 0 or whole <> cardinality(p_parts) then
        return null;
    end if;
    delete from uploads where id = any (p_parts);
    insert into uploads (id, user_id, volume_id, reserved_bytes, expires_at, is_resumable) values (p_id, p_user_id, volume, total, expires, true);
    insert into resumable_uploads (id, user_id, volume_id, incoming_name, length_bytes, upload_metadata, details, kinds, parts, expires_at)
    values (p_id, p_user_id, volume, p_id, total, p_upload_metadata, p_details, p_kinds, p_parts, expires);
    update resumable_uploads set joined_as = p_id, expires_at = expires where id = any (p_parts);
    return expires;
end
$$;
