-- Linked assets. {asset} stands for the columns of server.ledger.models.Asset, of the table l. What a client changes is recorded in
-- audit_log; the last parameter is then the actor, as JSON. URLs are not: whoever knows one may read what it leads to.

-- name: add_asset
-- Links an asset, unless the user has $6 already. $7 to $10 are what it is remembered as: kind, entity and project.
with l as (
    insert into linked_assets (id, user_id, url, fetch_url, details, media_type, entity_type, entity_id, project_id)
    select $1, $2::varchar, $3, $4, $5, $7, $8, $9, $10 where (select count(*) from linked_assets o where o.user_id = $2::varchar) < $6
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'asset.linked', l.user_id, null, jsonb_build_object('asset_id', l.id), a.* from l, actor_of_v1($11) a
)
select {asset} from l;

-- name: get_asset
-- One asset of one user.
select {asset} from linked_assets l where l.user_id = $1 and l.id = $2;

-- name: list_assets
-- A page of a user's assets after an id, of one state or ($4 null) of all.
select {asset} from linked_assets l where l.user_id = $1 and l.id > $2 and ($4::text is null or l.state = $4) order by l.id limit $3;

-- name: replace_asset
-- Gives an asset another URL: what was known of the old one is not of this one.
with l as (
    update linked_assets
       set url = $3, fetch_url = $4, version = version + 1, state = 'unchecked', reason = null, mime_type = null, size_bytes = null,
           failures = 0, last_checked_at = null, last_reachable_at = null, check_at = clock_timestamp(), import_state = null,
           import_reason = null, import_actor = null, import_kinds = null, import_at = null, file_id = null, updated_at = clock_timestamp()
     where user_id = $1 and id = $2
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'asset.replaced', l.user_id, null, jsonb_build_object('asset_id', l.id), a.* from l, actor_of_v1($5) a
)
select {asset} from l;

-- name: delete_asset
-- Forgets an asset. A file that was made of it stays.
with l as (
    delete from linked_assets where user_id = $1 and id = $2 returning id, user_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'asset.deleted', l.user_id, null, jsonb_build_object('asset_id', l.id), a.* from l, actor_of_v1($3) a
)
select id from l;

-- name: ask_for_asset_check
-- Has an asset looked at now, unless it was within $3 seconds, or is imported. Tells when it was asked for.
update linked_assets set check_at = clock_timestamp()
 where user_id = $1 and id = $2 and check_at is distinct from null
   and (last_checked_at is null or last_checked_at < clock_timestamp() - make_interval(secs => $3))
returning clock_timestamp() as asked_at;

-- name: ask_for_asset_import
-- Has an asset imported, unless it is or is about to be. One that failed is tried again.
with l as (
    update linked_assets
       set import_state = 'pending', import_reason = null, import_actor = $4, import_kinds = $3, import_at = clock_timestamp(),
           updated_at = clock_timestamp()
     where user_id = $1 and id = $2 and (import_state is null or import_state = 'failed')
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'asset.imported', l.user_id, null, jsonb_build_object('asset_id', l.id), a.* from l, actor_of_v1($4) a
)
select {asset} from l;

-- name: claim_asset_checks
-- Takes up to $1 assets that are to be looked at; they come back after $2 seconds.
with due as materialized (
    select id from linked_assets where check_at <= now() order by check_at limit $1 for update skip locked
)
update linked_assets l set check_at = clock_timestamp() + make_interval(secs => $2) from due where l.id = due.id
returning {asset};

-- name: finish_asset_check
-- What was found of the URL that the asset has had as its $2-th, if it still has it; when it is looked at next; and tells who waits.
with l as (
    update linked_assets
       set state = $3, reason = $4, mime_type = case when $3 = 'reachable' then $5 else mime_type end,
           size_bytes = case when $3 = 'reachable' then $6 else size_bytes end,
           failures = case when $3 = 'reachable' then 0 else failures + 1 end, last_checked_at = clock_timestamp(),
           last_reachable_at = case when $3 = 'reachable' then clock_timestamp() else last_reachable_at end,
           check_at = case when check_at is not null then clock_timestamp() + make_interval(secs => $7) end
     where id = $1 and version = $2
    returning id
)
select pg_notify('coffer_notice', 'asset/' || l.id) from l;

-- name: claim_asset_imports
-- Takes up to $1 assets that are to be imported; they come back after $2 seconds unless that is renewed.
with due as materialized (
    select id from linked_assets where import_state = 'pending' and import_at <= now() order by import_at limit $1
       for update skip locked
)
update linked_assets l set import_at = clock_timestamp() + make_interval(secs => $2) from due where l.id = due.id
returning {asset};

-- name: put_off_asset_imports
-- These come back $2 seconds from now.
update linked_assets set import_at = clock_timestamp() + make_interval(secs => $2) where id = any ($1) and import_state is not distinct from 'pending';

-- name: finish_asset_import
-- The asset of the $2-th URL became the file $3, or $4 says why not. What was imported is not looked at any more.
with l as (
    update linked_assets
       set import_state = case when $3::uuid is null then 'failed' else 'done' end, file_id = $3, import_reason = $4, import_at = null,
           check_at = case when $3::uuid is null then check_at end, updated_at = clock_timestamp()
     where id = $1 and version = $2 and import_state is not distinct from 'pending'
    returning id
)
select pg_notify('coffer_notice', 'asset/' || l.id) from l;
