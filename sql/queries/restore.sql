-- Making a store of what was restored.

-- name: settle_restored
-- Run once by psql, in the transaction that restores the dump: nobody ever sees the rows without the stop, or with the places of another
-- store's volumes. What was under way then is over: its bytes were not saved. Upload links stay, unclaimed.
insert into upload_stops (reason) values ({reason});
update volumes v set mount_path = p.path, state = 'open' from (values {places}) p (id, path) where v.id = p.id;
delete from resumable_uploads;
delete from uploads where link is null;
update uploads set claimed_until = null;
update backups set state = 'failed', ended_at = clock_timestamp(), holds_until = null, error = 'it saved itself while it ran' where state = 'running';
delete from audit_suspects;

-- name: forget_restored_previews
-- As settle_restored, of a backup without previews: they are made again.
delete from previews;
update user_files set preview_state = 'pending', preview_reason = null, preview_tries = 0 where preview_state in ('ready', 'failed');

-- name: is_empty_database
-- Whether there is no table of anybody's.
select not exists (select from pg_catalog.pg_tables where schemaname not in ('pg_catalog', 'information_schema')) as yes;

-- name: server_version
-- PostgreSQL's, such as 160004.
select current_setting('server_version_num')::integer as version;
