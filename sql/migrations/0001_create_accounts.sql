-- Volumes, users and what each user uses.

-- One mounted file system. `id` equals the UUID in the mount's sentinel file.
create table volumes (
    id uuid constraint volumes_pkey primary key,
    mount_path text not null constraint volumes_mount_path_absolute check (mount_path like '/%'),
    state text not null default 'open' constraint volumes_state_known check (state in ('open', 'read_only')),
    created_at timestamptz not null default now()
);

-- One row per user: what the user may store and what the user stores. `max_bytes` null is unlimited.
-- `total_bytes`, `reserved_bytes` and `file_count` are kept by triggers (0003) and cannot be set by hand.
-- `credit_xid` and `credit_bytes`: bytes of reservations which that transaction has released and not yet turned into files.
-- They let an upload publish what it holds a reservation for after `max_bytes` was lowered.
create table user_storage (
    user_id varchar(255) constraint user_storage_pkey primary key
        constraint user_storage_user_id_printable check (user_id ~ '^[^\x01-\x1f\x7f]+$'),
    tier text not null default 'standard',
    max_bytes bigint default 10737418240 constraint user_storage_max_bytes_not_negative check (max_bytes >= 0),
    total_bytes bigint not null default 0 constraint user_storage_total_bytes_not_negative check (total_bytes >= 0),
    reserved_bytes bigint not null default 0 constraint user_storage_reserved_bytes_not_negative check (reserved_bytes >= 0),
    file_count bigint not null default 0 constraint user_storage_file_count_not_negative check (file_count >= 0),
    credit_xid xid8,
    credit_bytes bigint not null default 0 constraint user_storage_credit_bytes_not_negative check (credit_bytes >= 0),
    volume_id uuid constraint user_storage_volume references volumes,
    erasing_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
) with (fillfactor = 70);
-- The fill factor leaves room on the page, so that the triggers' updates of this row touch no index (HOT).

create index user_storage_erasing on user_storage (user_id) where erasing_at is not null;

-- What a user stores per type, so that neither a report nor a list has to look at every file. Kept by triggers (0003).
create table user_storage_by_type (
    user_id varchar(255) not null constraint user_storage_by_type_owner references user_storage on delete cascade,
    file_type text not null,
    mime_type text not null,
    file_count bigint not null constraint user_storage_by_type_file_count_not_negative check (file_count >= 0),
    total_bytes bigint not null constraint user_storage_by_type_total_bytes_not_negative check (total_bytes >= 0),
    constraint user_storage_by_type_pkey primary key (user_id, file_type, mime_type)
) with (fillfactor = 70);

-- One row per change of `total_bytes`, written by triggers (0003): byte-hours are the sum of total_bytes * (next changed_at - changed_at).
-- No foreign key: only the trigger writes here, and it holds the user's row; the history of a user removed by hand stays.
create table usage_ledger (
    id bigint generated always as identity constraint usage_ledger_pkey primary key,
    user_id varchar(255) not null,
    changed_at timestamptz not null,
    delta_bytes bigint not null,
    total_bytes bigint not null
);

create index usage_ledger_by_user on usage_ledger (user_id, id);
