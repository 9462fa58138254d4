-- Signed links, public files and upload links.

-- Links carry the epoch of their user; raising it ends all that were made before.
alter table user_storage add link_epoch integer not null default 0 constraint user_storage_link_epoch_not_negative check (link_epoch >= 0);
create index user_storage_link_epoch on user_storage (user_id) where link_epoch > 0;

-- The unguessable part of a public file's URL: 128 random bits in base64url. Null: not public.
alter table user_files add public_id text constraint user_files_public_id_is_random check (public_id ~ '^[A-Za-z0-9_-]{22}$');
create unique index user_files_public_id on user_files (public_id) where public_id is not null;

-- A reservation made for an upload link: `link` says what may be uploaded. One upload at a time may use it, until `claimed_until`, which
-- its process keeps moving; one that has failed leaves the link to be tried again until `expires_at`.
alter table uploads add link jsonb;
alter table uploads add claimed_until timestamptz;
