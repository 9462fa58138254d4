-- What a key is good for, besides its scopes: users, kinds of files, networks of its callers. Null is no restriction. A server of the
-- release before does not know these columns and lets such a key do all that its scopes say: upgrade it before making one.
alter table api_keys
    add column user_ids text[] constraint api_keys_user_ids_not_empty check (cardinality(user_ids) > 0),
    add column kinds text[]
        constraint api_keys_kinds_known check (kinds <@ array['video', 'image', 'scene', 'project', 'audio'] and cardinality(kinds) > 0),
    add column networks cidr[] constraint api_keys_networks_not_empty check (cardinality(networks) > 0),
    -- An admin's routes are not about one user's files, so such a key would promise a restriction that it does not have.
    add constraint api_keys_admins_see_all check (not ('admin' = any (scopes)) or (user_ids is null and kinds is null));
