-- Linked assets: media that lives elsewhere, by its URL; whether it can still be reached; and its way into the vault, if it is imported.

create table linked_assets (
    id uuid constraint linked_assets_pkey primary key,
    user_id varchar(255) not null constraint linked_assets_owner references user_storage on delete cascade,
    -- As it was given, and where its bytes come from.
    url text not null,
    fetch_url text not null,
    -- Counts the URLs that it has had: what is found out about one must not be said of the next, nor be taken for it.
    version integer not null default 1,
    -- What the file becomes when it is imported.
    details jsonb not null,
    -- Where it is of a known kind, it is media too: see generated_media.
    media_type text,
    entity_type varchar(64),
    entity_id varchar(255),
    project_id varchar(255),
    state text not null default 'unchecked'
        constraint linked_assets_state_known check (state in ('unchecked', 'reachable', 'unreachable')),
    reason text,
    mime_type text,
    size_bytes bigint,
    failures integer not null default 0,
    last_checked_at timestamptz,
    last_reachable_at timestamptz,
    -- When it is looked at next; null: never again, as it was imported. Whoever looks moves it on first.
    check_at timestamptz default clock_timestamp(),
    import_state text constraint linked_assets_import_state_known check (import_state in ('pending', 'done', 'failed')),
    import_reason text,
    -- Who wished for it, and of which kinds their credentials were.
    import_actor jsonb,
    import_kinds text[],
    -- As check_at, while it is pending.
    import_at timestamptz,
    file_id uuid,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    constraint linked_assets_entity_is_whole check ((entity_type is null) = (entity_id is null)),
    constraint linked_assets_entity_has_media_type check (entity_id is null or media_type is not null)
);

create index linked_assets_by_user on linked_assets (user_id, id);
create index linked_assets_check on linked_assets (check_at) where check_at is not null;
create index linked_assets_import on linked_assets (import_at) where import_state = 'pending';

create function remember_asset_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: the memory of making says of linked media what is known of the asset with its id: where it lives, whether it can be reached,
--   and which file it was imported as. With that file it is forgotten, and with the asset where it never became a file.
-- Fires: after each row of an INSERT or a DELETE, and of an UPDATE that changes one of these. Locks: the media's row, after the asset's.
-- Cost: about 100 microseconds; none where a worker only takes an asset in hand.
-- Why not Python: a look, an import, a replacement and a deletion come from several processes.
begin
    if tg_op = 'DELETE' then
        delete from generated_media where id = old.id and file_id is null;
        return null;
    end if;
    insert into generated_media as m (id, user_id, file_id, entity_type, entity_id, project_id, media_type, source_type, original_url,
                                      is_accessible, last_checked_at, root_id, created_at)
    values (new.id, new.user_id, new.file_id, new.entity_type, new.entity_id, new.project_id, new.media_type,
            case when new.version > 1 then 'replaced' else 'linked' end, new.url, new.state <> 'unreachable', new.last_checked_at, new.id,
            new.created_at)
    on conflict (id) do update
       set file_id = excluded.file_id, source_type = excluded.source_type, original_url = excluded.original_url,
           is_accessible = excluded.is_accessible, last_checked_at = excluded.last_checked_at;
    return null;
end
$$;

create trigger remember_added after insert on linked_assets for each row
    when (new.media_type is not null) execute function remember_asset_v1();
create trigger remember_changed after update on linked_assets for each row
    when (new.media_type is not null
          and (old.version <> new.version or old.state <> new.state or old.last_checked_at is distinct from new.last_checked_at
               or old.file_id is distinct from new.file_id))
    execute function remember_asset_v1();
create trigger remember_deleted after delete on linked_assets for each row
    when (old.media_type is not null) execute function remember_asset_v1();
