-- The trash as a key that is restricted to some kinds sees it: one index range for each kind, as lists have them (0004). The index of the
-- whole trash would be walked to its end for a kind that is not in it. Only rows in the trash pay for it.
create index user_files_trash_kind on user_files ((file_type || ':' || user_id), deleted_at, id) where deleted_at is not null;
