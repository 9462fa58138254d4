-- Keys of app backends. Only the SHA-256 of a key's secret is stored.
create table api_keys (
    key_id text constraint api_keys_pkey primary key,
    name text not null,
    secret_sha256 bytea not null constraint api_keys_secret_sha256_is_32_bytes check (octet_length(secret_sha256) = 32),
    scopes text[] not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
);
