-- Contact sheets: `POST /api/compose` asks for one, a worker makes it (server/generation/sheets.py).

-- name: find_sheet_file
-- The file that a sheet ($2, its idempotency key) became, unless its bytes have been replaced since.
select {file} from user_files
 where user_id = $1 and idempotency_key = $2 and content_changed_at = upload_date and deleted_at is null;

-- name: wish_for_sheet
-- Asks for a sheet: with its user's ($2) pictures ($4) laid out like that ($5), to become such a file ($6), wished for by $7. What was asked for already stays, but for
-- why it could not be made. $8 is the key that its file will have, which a file whose bytes were replaced gives up. Returns its id.
with freed as (
    update user_files set idempotency_key = null
     where user_id = $2 and idempotency_key = $8 and content_changed_at <> upload_date
)
insert into sheets as s (id, user_id, digest, pictures, sheet, details, actor)
values ($1, $2, $3, $4, $5::jsonb, $6::jsonb, $7::jsonb)
on conflict (user_id, digest) do update set problem = null, requested_at = clock_timestamp()
returning s.id;

-- name: get_sheet
-- One that is to be made, or cannot be.
select id, user_id, digest, pictures, sheet::text as sheet, details::text as details, actor::text as actor, problem::text as problem
  from sheets where id = $1;

-- name: refuse_sheet
-- Says why it cannot be made.
update sheets set problem = $2::jsonb where id = $1;

-- name: end_sheet
-- It has been made.
delete from sheets where id = $1;

-- name: purge_sheets
-- Forgets up to $2 that nobody has asked for in $1 seconds.
delete from sheets where id in
    (select s.id from sheets s where s.requested_at < now() - make_interval(secs => $1) order by s.requested_at limit $2);
