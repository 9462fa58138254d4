-- What each user stored on each finished day, for invoices: `coffer usage` sums usage_ledger up, day by day. All of it is derived, and can be
-- derived again: delete what usage_summed says of the days, and the next run sums them.
--
-- No index of usage_ledger by time serves this, since each upload would pay for it (and a large store could not make it within a migration's
-- time). The changes of a day are found by their ids, through usage_ledger_by_user: usage_summed remembers for each day an id before which
-- none is, and the day that follows begins to look there. What is uploaded costs nothing more.

-- One row for each user and day (UTC) with a byte at any moment of it, or a change. No foreign key, as usage_ledger: the history of a user
-- removed by hand stays; an erasure takes it.
create table usage_days (
    user_id varchar(255) not null,
    day date not null,
    -- total_bytes times the seconds it lasted, exact to the microsecond.
    byte_seconds numeric not null constraint usage_days_byte_seconds_not_negative check (byte_seconds >= 0),
    -- The largest total of any moment.
    most_bytes bigint not null constraint usage_days_most_bytes_not_negative check (most_bytes >= 0),
    added_bytes bigint not null constraint usage_days_added_bytes_not_negative check (added_bytes >= 0),
    removed_bytes bigint not null constraint usage_days_removed_bytes_not_negative check (removed_bytes >= 0),
    constraint usage_days_pkey primary key (user_id, day),
    constraint usage_days_within_most check (byte_seconds <= most_bytes * 86400::numeric)
);

-- The days that have been summed, of all users.
create table usage_summed (
    day date constraint usage_summed_pkey primary key,
    -- No change of this day or a later one has a smaller id, of whichever user.
    first_id bigint not null,
    -- What a clock said that ran ahead is not believed once it has been set back.
    summed_at timestamptz not null
);
