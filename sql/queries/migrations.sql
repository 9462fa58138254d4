-- The record of applied migrations. The runner creates its table itself, so it is in no migration.

-- name: create_schema_migrations
-- One row per applied file.
create table if not exists schema_migrations (
    name text constraint schema_migrations_pkey primary key,
    sha256 bytea not null,
    applied_at timestamptz not null default now()
);

-- name: has_schema_migrations
-- Whether any migration was ever applied here.
select to_regclass('schema_migrations') is not null as present;

-- name: applied_migrations
-- What was applied.
select name, sha256 from schema_migrations;

-- name: record_migration
-- Records a file, in the transaction that applies it.
insert into schema_migrations (name, sha256) values ($1, $2);
