-- API keys. {key} stands for the columns of server.ledger.models.ApiKeyRow. What makes or ends one records it in audit_log; its last
-- parameter is the actor, as JSON.

-- name: create_api_key
-- Adds a key.
with made as (
    insert into api_keys (key_id, name, secret_sha256, scopes, user_ids, kinds, networks, expires_at)
    values ($1, $2, $3, $4, $5, $6, $7, now() + $8::interval)
    returning *
)
insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
select 'key.created', null, null, jsonb_build_object('key_id', m.key_id, 'scopes', m.scopes), a.* from made m, actor_of_v1($9) a;

-- name: find_api_key
-- One key, revoked or not.
select {key} from api_keys where key_id = $1;

-- name: list_api_keys
-- All keys, oldest first.
select {key} from api_keys order by created_at, key_id;

-- name: revoke_api_key
-- Ends a key; the first revocation's time stays.
with ended as (
    update api_keys set revoked_at = clock_timestamp() where key_id = $1 and revoked_at is null returning key_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'key.revoked', null, null, jsonb_build_object('key_id', e.key_id), a.* from ended e, actor_of_v1($2) a
)
select key_id from ended;

-- name: rotate_api_key
-- Adds a key with the rights of an old one that still works, and lets that one expire after the overlap if not before.
with old as (
    select * from api_keys where key_id = $1 and revoked_at is null and (expires_at is null or expires_at > now()) for update
), ending as (
    update api_keys k set expires_at = least(k.expires_at, now() + $4::interval) from old where k.key_id = old.key_id
), made as (
    insert into api_keys (key_id, name, secret_sha256, scopes, user_ids, kinds, networks, expires_at)
    select $2, name, $3, scopes, user_ids, kinds, networks, now() + coalesce($5::interval, expires_at - created_at) from old
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'key.rotated', null, null, jsonb_build_object('key_id', m.key_id, 'old_key_id', $1::text, 'scopes', m.scopes), a.*
      from made m, actor_of_v1($6) a
)
select {key} from made;

-- name: note_api_keys_used
-- Keeps when keys ($1) were last used ($2). Locks in the order of ids, as every process does.
with used as (
    select * from unnest($1::text[], $2::timestamptz[]) as u (key_id, at)
), locked as (
    select key_id from api_keys where key_id = any ($1) order by key_id for no key update
)
update api_keys k set last_used_at = greatest(k.last_used_at, u.at) from used u join locked using (key_id) where k.key_id = u.key_id;
