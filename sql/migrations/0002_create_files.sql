-- Files, uploads under way, stored bytes to remove, and events.

-- One row per stored file. `file_path` is relative to its volume's mount. `name_key` is what lists sort names by; 100 characters keep
-- every index row under PostgreSQL's limit of 2,704 bytes whatever the user's id and package are: (255 + 255 + 100) * 4 + 16 = 2,456.
create table user_files (
    id uuid constraint user_files_pkey primary key,
    user_id varchar(255) not null constraint user_files_owner references user_storage on delete cascade,
    file_name varchar(500) not null constraint user_files_file_name_not_empty check (file_name <> ''),
    file_type text not null
        constraint user_files_file_type_known check (file_type in ('video', 'image', 'scene', 'project', 'audio')),
    mime_type varchar(127) not null constraint user_files_mime_type_plain check (mime_type ~ '^[a-z0-9.+-]+/[a-z0-9.+_-]+$'),
    file_size bigint not null constraint user_files_file_size_not_negative check (file_size >= 0),
    sha256 bytea not null constraint user_files_sha256_is_32_bytes check (octet_length(sha256) = 32),
    volume_id uuid not null constraint user_files_volume references volumes,
    file_path text not null,
    generation integer not null default 1 constraint user_files_generation_positive check (generation > 0),
    thumbnail_path text,
    resolution text,
    width integer constraint user_files_width_positive check (width > 0),
    height integer constraint user_files_height_positive check (height > 0),
    duration text,
    duration_seconds double precision constraint user_files_duration_seconds_not_negative check (duration_seconds >= 0),
    package_name varchar(255),
    tags text[] not null default '{}',
    is_favorite boolean not null default false,
    metadata jsonb not null default '{}' constraint user_files_metadata_is_object check (jsonb_typeof(metadata) = 'object'),
    idempotency_key varchar(255),
    upload_date timestamptz not null default now(),
    content_changed_at timestamptz not null default now(),
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    name_key text collate "C" not null generated always as (left(lower(file_name), 100)) stored,
    -- Two rows that name one stored file would let the deletion of one take the bytes of the other. The name holds the row's key,
    -- so this check does what a unique index on the path would do, for nothing.
    constraint user_files_path_names_the_row check (position('/' || id || '.' || generation || '.' in file_path) > 0)
);

create unique index user_files_idempotency_key on user_files (user_id, idempotency_key) where idempotency_key is not null;

-- An upload under way and the quota it holds. A process that dies stops renewing `expires_at`; housekeeping then releases the row.
create table uploads (
    id uuid constraint uploads_pkey primary key,
    user_id varchar(255) not null constraint uploads_owner references user_storage on delete cascade,
    volume_id uuid not null constraint uploads_volume references volumes,
    reserved_bytes bigint not null constraint uploads_reserved_bytes_not_negative check (reserved_bytes >= 0),
    idempotency_key varchar(255),
    expires_at timestamptz not null,
    created_at timestamptz not null default now()
);

create unique index uploads_idempotency_key on uploads (user_id, idempotency_key);
create index uploads_expires_at on uploads (expires_at);

-- A stored file whose row is gone or names another path, and whose bytes must go too. Written by triggers (0003).
-- The row outlives a crash between the commit and the unlink.
create table tombstones (
    id bigint generated always as identity constraint tombstones_pkey primary key,
    volume_id uuid not null,
    file_path text not null,
    file_id uuid not null,
    generation integer not null,
    created_at timestamptz not null default now()
);

create index tombstones_by_file on tombstones (file_id, generation);

-- What happened, in order, for webhooks and jobs to come. Appended by the statement that makes it happen.
create table events (
    id bigint generated always as identity constraint events_pkey primary key,
    user_id varchar(255) not null,
    type text not null,
    file_id uuid,
    payload jsonb not null default '{}',
    created_at timestamptz not null default now()
);

create index events_by_user on events (user_id, id);
