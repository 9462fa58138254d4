-- API keys. {key} stands for the columns of server.ledger.models.ApiKeyRow.

-- name: create_api_key
-- Adds a key.
insert into api_keys (key_id, name, secret_sha256, scopes) values ($1, $2, $3, $4);

-- name: find_api_key
-- One key, revoked or not.
select {key} from api_keys where key_id = $1;

-- name: list_api_keys
-- All keys, oldest first.
select {key} from api_keys order by created_at, key_id;

-- name: revoke_api_key
-- Ends a key; the first revocation's time stays.
update api_keys set revoked_at = clock_timestamp() where key_id = $1 and revoked_at is null returning key_id;
