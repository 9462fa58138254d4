-- Events out: who is told of events, and what is still to be told. `events` is the outbox: its rows are written by the statements that make
-- things happen. Here each becomes a delivery for each endpoint that wants it, in the same transaction (server/decisions/0026-webhooks.md).

create table webhook_endpoints (
    id uuid constraint webhook_endpoints_pkey primary key,
    url text not null,
    -- Null: of all types.
    types text[] constraint webhook_endpoints_types_not_empty check (cardinality(types) > 0),
    description text not null,
    -- `whsec_` and 32 random bytes in base64. The one before still signs, too, for a while.
    secret text not null,
    old_secret text,
    old_secret_until timestamptz,
    last_sent_at timestamptz,
    last_failed_at timestamptz,
    last_failure text,
    created_at timestamptz not null default clock_timestamp()
);

-- A row goes when it is delivered; `dead` is one that was given up. No foreign key to the endpoint: with one, whoever uploads would wait for
-- whoever deletes the endpoint, and then fail. What is left of a deleted one is purged.
create table webhook_deliveries (
    id bigint generated always as identity constraint webhook_deliveries_pkey primary key,
    endpoint_id uuid not null,
    event_id bigint not null constraint webhook_deliveries_event references events on delete cascade,
    -- Those with the same one are told in their order: a file's, a job's, else a user's.
    order_key text not null,
    state text not null default 'pending' constraint webhook_deliveries_state_known check (state in ('pending', 'dead')),
    tries integer not null default 0,
    -- Not before this. Whoever sends it moves it on, so that it comes back if they die.
    due_at timestamptz not null default clock_timestamp(),
    give_up_at timestamptz not null default clock_timestamp() + interval '3 days',
    last_failure text
);

create index webhook_deliveries_due on webhook_deliveries (endpoint_id, due_at, id) where state = 'pending';
create index webhook_deliveries_order on webhook_deliveries (endpoint_id, order_key, id) where state = 'pending';
create index webhook_deliveries_dead on webhook_deliveries (endpoint_id, id) where state = 'dead';
create index webhook_deliveries_event on webhook_deliveries (event_id);

create function fan_out_events_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: an event and its deliveries are committed together or not at all.
-- Fires: after each INSERT into events, once per statement. Events of one file are in the order of their ids, because whoever appends one
--   has the file's row locked until its commit; so are the deliveries.
-- Locks: none but those of the new rows. Cost: about 10 microseconds without endpoints; one insert for each endpoint that wants the event.
-- Why not Python: a server that dies after its commit would tell nobody.
begin
    if exists (select from webhook_endpoints) then
        insert into webhook_deliveries (endpoint_id, event_id, order_key)
        select w.id, n.id, coalesce(n.file_id::text, n.payload ->> 'job_id', 'user ' || n.user_id)
          from new_rows n join webhook_endpoints w on w.types is null or n.type = any (w.types)
         order by n.id;
    end if;
    return null;
end
$$;

create trigger fan_out after insert on events
    referencing new table as new_rows for each statement execute function fan_out_events_v1();
