-- Generation and events out, as whoever looks after them sees them: what has ended, what waits, and what became of it.

-- For `coffer purge`, from the oldest on, and for what has ended lately.
create index generation_jobs_ended on generation_jobs (finished_at, id) where finished_at is not null;

-- What /metrics asks for: jobs that are open.
create index generation_jobs_unfinished on generation_jobs (created_at) where finished_at is null;

-- How often workers have fetched something, or told it to an endpoint, by what became of that.
create table work_counts (
    work text not null,
    result text not null,
    count bigint not null,
    constraint work_counts_pkey primary key (work, result)
);

-- Callbacks that were given up: the only deliveries in whose order nothing but their job is. And the secrets that are kept for them.
create index webhook_deliveries_dead_callbacks on webhook_deliveries (id) where state = 'dead' and order_key = endpoint_id::text;
create index generation_jobs_callback_failed on generation_jobs (id) where callback_state = 'failed' and callback_secret is not null;
