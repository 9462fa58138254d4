-- Several volumes: which of them take new users, and which users are being moved from one to another (server/decisions/0019).

alter table volumes
    -- Since then it takes no new users, and those that it has are to be moved away.
    add draining_since timestamptz,
    -- The one user who may be placed on it. No foreign key: the volume may be there before its user.
    add reserved_for varchar(255);
create unique index volumes_reserved_for on volumes (reserved_for) where reserved_for is not null;

-- Set when `volume_id` is changed, and null again once nothing of the user's lies on another volume. Where a file lies is in its own row alone.
alter table user_storage add moving_since timestamptz;
create index user_storage_moving on user_storage (user_id) where moving_since is not null;

-- How a copy is named that no row names (yet, or any more): by a tombstone whose file has a row of the same generation on another volume.
-- Nobody but `coffer rebalance` removes such bytes, one process at a time: the path may be the file's again. All others remove the bytes of
-- names that no row will ever have again.
