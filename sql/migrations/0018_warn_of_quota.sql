-- Tells apps, by an event, that a user's storage is nearly full, once per crossing of 80, 90 and 100 % of the quota.

-- The highest of these that the user has been warned of and has not fallen well below since; 0: none.
alter table user_storage add column warned_percent smallint not null default 0;
-- For the count in /metrics. An update that leaves warned_percent alone stays a HOT update.
create index user_storage_warned on user_storage (warned_percent) where warned_percent > 0;

create function warn_of_quota_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: warned_percent is the highest of 80, 90 and 100 that the user's use has reached, or had reached and is less than ten
--   percentage points below now. So a user who deletes and uploads around a mark is warned once.
-- Fires: before each UPDATE of a user's row in which that may change; all others pay for the comparison in the trigger's WHEN alone,
--   less than a microsecond. Users' rows change with every file, quota and preview, whoever changes them.
-- Locks: none beyond the row that is being updated. Cost: 30 microseconds, at a crossing; the event is undone with what caused it.
-- Why not Python: files come and go by many doors, processes and psql; only here none is missed, and none is told of that was undone.
declare
    used bigint := new.total_bytes;
    level smallint := 0;
begin
    if new.preview_bytes > 0 and coalesce((select r.counts_previews from quota_rules r), true) then
        used := used + new.preview_bytes;
    end if;
    if new.max_bytes is not null and used > 0 then
        level := case
            when used >= new.max_bytes or (new.warned_percent >= 100 and used >= new.max_bytes * 0.90::float8) then 100
            when used >= new.max_bytes * 0.90::float8 or (new.warned_percent >= 90 and used >= new.max_bytes * 0.80::float8) then 90
            when used >= new.max_bytes * 0.80::float8 or (new.warned_percent >= 80 and used >= new.max_bytes * 0.70::float8) then 80
            else 0
        end;
    end if;
    if level > new.warned_percent and new.erasing_at is null then
        insert into events (user_id, type, payload)
        values (new.user_id, 'quota.warning', jsonb_build_object('percent', level, 'used_bytes', used, 'limit_bytes', new.max_bytes));
    end if;
    new.warned_percent := level;
    return new;
end
$$;

-- Where previews do not count, used is less than what is compared here: then the function looks, and finds nothing to do.
create trigger warn_of_quota before update on user_storage for each row
when (
    (new.warned_percent < 80 and new.total_bytes + new.preview_bytes >= new.max_bytes * 0.80::float8)
    or (new.warned_percent < 90 and new.total_bytes + new.preview_bytes >= new.max_bytes * 0.90::float8)
    or (new.warned_percent < 100 and new.total_bytes + new.preview_bytes >= new.max_bytes)
    or (new.warned_percent > 0 and (new.max_bytes is null or new.total_bytes < new.max_bytes * ((new.warned_percent - 10) / 100.0::float8)))
)
execute function warn_of_quota_v1();
