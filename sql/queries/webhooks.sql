-- Events out: endpoints and deliveries. A job with a callback is an endpoint, too, that is told of one event: the id is then the job's. {endpoint} stands for the columns of server.ledger.models.WebhookEndpoint, of the table w. What
-- changes an endpoint records it in audit_log; its last parameter is the actor, as JSON.

-- name: add_webhook_endpoint
-- Adds an endpoint, unless there are $6 already.
with added as (
    insert into webhook_endpoints (id, url, types, description, secret)
    select $1, $2, $3, $4, $5 where (select count(*) from webhook_endpoints) < $6
    returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'webhook.created', null, null, jsonb_build_object('webhook_id', n.id), a.* from added n, actor_of_v1($7) a
)
select created_at from added;

-- name: list_webhook_endpoints
-- All endpoints, in the order of their ids, which is that of their making.
select {endpoint},
       (select count(*) from webhook_deliveries d where d.endpoint_id = w.id and d.state = 'pending') as pending,
       (select count(*) from webhook_deliveries d where d.endpoint_id = w.id and d.state = 'dead') as dead
  from webhook_endpoints w order by w.id;

-- name: get_webhook_endpoint
-- One endpoint.
select {endpoint},
       (select count(*) from webhook_deliveries d where d.endpoint_id = w.id and d.state = 'pending') as pending,
       (select count(*) from webhook_deliveries d where d.endpoint_id = w.id and d.state = 'dead') as dead
  from webhook_endpoints w where w.id = $1;

-- name: delete_webhook_endpoint
-- Deletes an endpoint with what was still to be told to it.
with gone as (
    delete from webhook_endpoints where id = $1 returning id
), untold as (
    delete from webhook_deliveries d using gone g where d.endpoint_id = g.id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'webhook.deleted', null, null, jsonb_build_object('webhook_id', g.id), a.* from gone g, actor_of_v1($2) a
)
select id from gone;

-- name: rotate_webhook_secret
-- Gives an endpoint another secret. The one before signs, too, for so many seconds.
with rotated as (
    update webhook_endpoints
       set old_secret = secret, old_secret_until = clock_timestamp() + make_interval(secs => $3), secret = $2
     where id = $1
    returning id, old_secret_until
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'webhook.secret_rotated', null, null, jsonb_build_object('webhook_id', r.id), a.* from rotated r, actor_of_v1($4) a
)
select old_secret_until from rotated;

-- name: due_webhooks
-- Endpoints for which something is due, with the secrets that sign at this moment, the newest first. Callbacks of jobs among them. None while
-- the store is a restored one: nobody has said yet that it is the one that counts, and another may be telling the same.
select w.id, w.url, array_remove(array[w.secret, case when w.old_secret_until > clock_timestamp() then w.old_secret end], null) as secrets
  from webhook_endpoints w
 where exists (select from webhook_deliveries d where d.endpoint_id = w.id and d.state = 'pending' and d.due_at <= now())
   and not exists (select from upload_stops)
union all
select j.id, j.callback_url, array[j.callback_secret]
  from generation_jobs j
 where j.callback_state = 'due'
   and exists (select from webhook_deliveries d where d.endpoint_id = j.id and d.state = 'pending' and d.due_at <= now())
   and not exists (select from upload_stops);

-- name: claim_deliveries
-- Takes up to $2 of what is due for an endpoint, each the first of its order that is untold. What is not finished within $3 seconds is due
-- again.
with due as materialized (
    select d.id from webhook_deliveries d
     where d.endpoint_id = $1 and d.state = 'pending' and d.due_at <= now()
       and d.id = (select e.id from webhook_deliveries e
                    where e.endpoint_id = $1 and e.order_key = d.order_key and e.state = 'pending' order by e.id limit 1)
     order by d.due_at, d.id limit $2 for update skip locked
)
update webhook_deliveries d
   set due_at = clock_timestamp() + make_interval(secs => $3), tries = d.tries + 1
  from due, events e where d.id = due.id and e.id = d.event_id
returning d.id, d.tries, e.id as event_id, e.type, e.user_id, e.file_id, e.payload, e.created_at;

-- name: end_deliveries
-- These were told to the endpoint.
with told as (
    delete from webhook_deliveries where id = any ($2) returning 1
), called as (
    update generation_jobs set callback_state = 'told', callback_secret = null
     where id = $1 and callback_state = 'due' and exists (select from told)
)
update webhook_endpoints set last_sent_at = clock_timestamp() where id = $1 and exists (select from told);

-- name: put_off_delivery
-- This one could not be told: again in $3 seconds, unless it is to be given up by then. What follows it in its order waits with it. Nothing
-- when somebody else has taken it meanwhile, which its number of tries ($2) tells.
with failed as (
    update webhook_deliveries
       set due_at = clock_timestamp() + make_interval(secs => $3), last_failure = $4,
           state = case when clock_timestamp() + make_interval(secs => $3) > give_up_at then 'dead' else 'pending' end
     where id = $1 and tries = $2 and state <> 'dead'
    returning id, endpoint_id, order_key, due_at, state
), following as (
    update webhook_deliveries d set due_at = f.due_at
      from failed f
     where f.state = 'pending' and d.endpoint_id = f.endpoint_id and d.order_key = f.order_key and d.state = 'pending' and d.id > f.id
), noted as (
    update webhook_endpoints w set last_failed_at = clock_timestamp(), last_failure = $4 from failed f where w.id = f.endpoint_id
), given_up as (
    update generation_jobs j set callback_state = 'failed' from failed f where j.id = f.endpoint_id and f.state = 'dead'
)
select state from failed;

-- name: list_dead_deliveries
-- A page of what an endpoint was not told, after an id.
select d.id, d.tries, d.last_failure, d.give_up_at, e.id as event_id, e.type, e.user_id, e.file_id, e.payload, e.created_at
  from webhook_deliveries d join events e on e.id = d.event_id
 where d.endpoint_id = $1 and d.state = 'dead' and d.id > $2 order by d.id limit $3;

-- name: redeliver
-- Makes what was given up due again, these ($2) or all, at most $3 at a time. Tells how many.
with chosen as materialized (
    select d.id from webhook_deliveries d
     where d.endpoint_id = $1 and d.state = 'dead' and ($2::bigint[] is null or d.id = any ($2)) order by d.id limit $3 for update skip locked
), again as (
    update webhook_deliveries d
       set state = 'pending', tries = 0, due_at = clock_timestamp(), give_up_at = clock_timestamp() + interval '3 days'
      from chosen c where d.id = c.id
    returning d.id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'webhook.redelivered', null, null, jsonb_build_object('webhook_id', $1::uuid, 'deliveries', t.count), a.*
      from (select count(*) from again) t, actor_of_v1($4) a where t.count > 0
)
select count(*) from again;

-- name: list_dead_callbacks
-- A page of the callbacks of all users that were given up, after an id.
select d.id, d.tries, d.last_failure, d.give_up_at, e.id as event_id, e.type, e.user_id, e.file_id, e.payload, e.created_at
  from webhook_deliveries d join generation_jobs j on j.id = d.endpoint_id and j.callback_secret is not null join events e on e.id = d.event_id
 where d.state = 'dead' and d.order_key = d.endpoint_id::text and d.id > $1 order by d.id limit $2;

-- name: redeliver_callbacks
-- Makes callbacks that were given up due again, these ($1) or all, at most $2 at a time. Tells how many.
with chosen as materialized (
    select d.id, d.endpoint_id from webhook_deliveries d join generation_jobs j on j.id = d.endpoint_id and j.callback_secret is not null
     where d.state = 'dead' and d.order_key = d.endpoint_id::text and ($1::bigint[] is null or d.id = any ($1))
     order by d.id limit $2 for update of d skip locked
), again as (
    update webhook_deliveries d
       set state = 'pending', tries = 0, due_at = clock_timestamp(), give_up_at = clock_timestamp() + interval '3 days'
      from chosen c where d.id = c.id
    returning d.id
), due as (
    update generation_jobs j set callback_state = 'due' from chosen c where j.id = c.endpoint_id
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'webhook.redelivered', null, null, jsonb_build_object('callbacks', t.count), a.*
      from (select count(*) from again) t, actor_of_v1($3) a where t.count > 0
)
select count(*) from again;

-- name: purge_deliveries
-- Forgets what was given up $1 days ago, and what is left of deleted endpoints and of callbacks, up to $2 rows of each.
with old as (
    delete from webhook_deliveries where id in (
        select d.id from webhook_endpoints w
          join webhook_deliveries d on d.endpoint_id = w.id and d.state = 'dead'
         where d.give_up_at < clock_timestamp() - make_interval(days => $1) limit $2
    )
)
delete from webhook_deliveries where id in (
    select d.id from webhook_deliveries d where not exists (select from webhook_endpoints w where w.id = d.endpoint_id)
       and not exists (select from generation_jobs j
                        where j.id = d.endpoint_id and (j.callback_state = 'due' or (j.callback_state = 'failed' and d.state = 'dead'
                          and d.give_up_at >= clock_timestamp() - make_interval(days => $1)))) limit $2
);

-- name: forget_callback_secrets
-- The secrets of up to $1 callbacks that were given up, and of which nothing is left to send again.
update generation_jobs set callback_secret = null where id in (
    select j.id from generation_jobs j
     where j.callback_state = 'failed' and j.callback_secret is not null
       and not exists (select from webhook_deliveries d where d.endpoint_id = j.id and d.state = 'dead') order by j.id limit $1
);
