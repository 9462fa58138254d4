-- Outputs that are to say in their own bytes that an AI has made them. What an output is to be marked with is decided when its job is made and
-- stands in the upload link of its reservation (`link ->> 'marks'`); the worker marks it once it is stored.

alter table generated_media add wanted_marks text[] not null default '{}';
-- Those that the worker has put into the bytes as they are now.
alter table generated_media add marks text[] not null default '{}';
-- Null: nothing is to be marked. `pending` becomes `marked` or, with a reason, `unmarked`. Null again when the bytes are replaced.
alter table generated_media add marking text
    constraint generated_media_marking_known check (marking in ('pending', 'marked', 'unmarked'));
alter table generated_media add marking_reason varchar(64);
create index generated_media_to_mark on generated_media (file_id) where marking = 'pending';

-- Counts an output that is still to be marked as open, so that who hears of the job's end finds the bytes as they stay.
create or replace function settle_job_v1(p_job_id uuid) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Ends a job none of whose outputs is open any more, and counts its progress. One that is stored and waits to be marked is open.
-- Locks: the job's row first, so that of two last outputs the second one's count sees the first.
declare
    job generation_jobs;
    open_outputs integer;
    stored_outputs integer;
    expired_outputs integer;
begin
    select * into job from generation_jobs where id = p_job_id for no key update;
    if not found or job.finished_at is not null then
        return;
    end if;
    select count(*) filter (where o.state in ('awaited', 'fetching')
                               or exists (select from generated_media m where m.file_id = o.file_id and m.marking = 'pending')),
           count(*) filter (where o.state = 'stored'),
           count(*) filter (where o.reason = 'expired')
      into open_outputs, stored_outputs, expired_outputs
      from generation_outputs o where o.job_id = p_job_id;
    update generation_jobs
       set state = case when open_outputs > 0 then case when stored_outputs > 0 then 'running' else state end
                        when stored_outputs = output_count then 'completed'
                        when stored_outputs > 0 then 'partly_completed'
                        when expired_outputs = output_count then 'expired'
                        else 'failed' end,
           progress_percent = case when stored_outputs = output_count then 100
                                   else greatest(progress_percent, 100 * stored_outputs / output_count) end,
           started_at = case when stored_outputs > 0 then coalesce(started_at, clock_timestamp()) else started_at end,
           finished_at = case when open_outputs = 0 then clock_timestamp() end
     where id = p_job_id;
    if open_outputs = 0 then
        perform raise_job_event_v1(p_job_id);
    end if;
end
$$;

create or replace function output_ended_v1() returns trigger
language plpgsql set search_path = public, pg_temp as $$
-- Invariant: an output is settled by the very transaction that ends its reservation: stored if its file is there, failed if not. A stored
--   one is remembered in generated_media, and queued to be marked if it is to be.
-- Fires: after each row of a DELETE from uploads that is a job's; the WHEN clause costs other uploads nothing.
-- Locks: the job's row, after the upload's and before the user's. Whoever changes a job locks in this order.
-- Cost: about 200 microseconds for an output; none for other uploads.
-- Why not Python: links, tus, webhooks, fetches, expiry, cancellation and psql all end reservations.
declare
    has_come constant boolean := exists (select from user_files f where f.id = old.id);
    wanted constant text[] := array(select jsonb_array_elements_text(coalesce(old.link -> 'marks', '[]')));
begin
    perform from generation_jobs where id = old.job_id for no key update;
    update generation_outputs
       set state = case when has_come then 'stored' else 'failed' end,
           reason = case when has_come then null when old.expires_at <= clock_timestamp() then 'expired' else 'closed' end,
           settled_at = clock_timestamp()
     where file_id = old.id and state in ('awaited', 'fetching');
    if found then
        insert into generated_media (id, user_id, file_id, job_id, output_index, entity_type, entity_id, project_id, media_type, source_type,
                                     model_used, prompt_used, generation_params, credits_used, original_url, reference_ids, parent_id, root_id,
                                     wanted_marks, marking)
        select f.id, f.user_id, f.id, j.id, o.output_index, j.entity_type, j.entity_id, j.project_id, f.file_type, 'generated',
               j.model_used, j.prompt_used, j.generation_params, j.credits_used / j.output_count, o.url, j.reference_ids, j.parent_id,
               coalesce((select p.root_id from generated_media p where p.id = j.parent_id), f.id),
               wanted, case when wanted <> '{}' then 'pending' end
          from generation_outputs o join generation_jobs j on j.id = o.job_id join user_files f on f.id = o.file_id
         where o.file_id = old.id and o.state = 'stored';
        insert into pgqueuer (priority, status, entrypoint, payload, dedupe_key)
        select 0, 'queued', 'generation', convert_to('mark ' || old.id, 'UTF8'), 'mark:' || old.id where has_come and wanted <> '{}'
        on conflict do nothing;
        perform settle_job_v1(old.job_id);
    end if;
    return null;
end
$$;

create function settle_marking_v1(p_file_id uuid, p_reason text) returns void
language plpgsql set search_path = public, pg_temp as $$
-- Ends the job of an output that waited to be marked, if it was the last one open. With a reason it is given up first: the bytes stay as they
-- came.
-- Locks: the job's row first, as all do.
declare
    job constant uuid := (select job_id from generation_outputs where file_id = p_file_id);
begin
    perform from generation_jobs where id = job for no key update;
    update generated_media set marking = 'unmarked', marking_reason = p_reason
     where file_id = p_file_id and marking = 'pending' and p_reason is not null;
    perform settle_job_v1(job);
    perform pg_notify('coffer_notice', 'job/' || job);
end
$$;
