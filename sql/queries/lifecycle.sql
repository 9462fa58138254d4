-- Lifecycle rules, and what `coffer purge` does by them. {rule} stands for the columns of server.ledger.models.LifecycleRule.

-- name: list_rules
-- All of them.
select {rule} from lifecycle_rules order by id;

-- name: add_rule
-- A new rule. $10 is the actor.
with added as (
    insert into lifecycle_rules (action, after_days, user_id, file_type, mime_type, tag, package_name, metadata, includes_favorites)
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9) returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'rule.added', d.user_id, null, jsonb_build_object('rule', d.id, 'action', d.action, 'after_days', d.after_days), a.*
      from added d, actor_of_v1($10) a
)
select {rule} from added;

-- name: remove_rule
-- Ends a rule. $2 is the actor.
with removed as (
    delete from lifecycle_rules where id = $1 returning *
), recorded as (
    insert into audit_log (action, user_id, file_id, detail, actor_kind, actor_id, acting_user_id, address, request_id)
    select 'rule.removed', d.user_id, null, jsonb_build_object('rule', d.id, 'action', d.action, 'after_days', d.after_days), a.*
      from removed d, actor_of_v1($2) a
)
select {rule} from removed;

-- name: page_of_ruled
-- Of the $2 files after an id ($1; null: from the first on), those that a rule is about, with the first such rule; one that deletes goes before one that does not.
-- Rules that move to the trash count only with $3. One more line, without a file, tells the last id looked at.
with page as materialized (
    select id from user_files where id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000') order by id limit $2
)
select f.user_id, f.id, f.file_size, ruled.rule_id, ruled.action, u.held_at is not null as is_held, null::uuid as last
  from page p
  join user_files f on f.id = p.id and f.id > coalesce($1::uuid, '00000000-0000-0000-0000-000000000000')
  join user_storage u on u.user_id = f.user_id and u.erasing_at is null
 cross join lateral (select r.id as rule_id, r.action from lifecycle_rules r
                      where (r.action = 'delete' or $3) and lifecycle_applies_v1(r, f) order by r.action, r.id limit 1) ruled
union all
select null, null, null, null, null, null, (select id from page order by id desc limit 1);

-- name: delete_ruled
-- Deletes those of a user's files that the rule ($3) is still about. $4 is the actor.
select file_id, tombstone_id, volume_id, file_path
  from delete_files_v3($1, array(
           select f.id from user_files f
            where f.user_id = $1 and f.id = any ($2)
              and exists (select from lifecycle_rules r where r.id = $3 and r.action = 'delete' and lifecycle_applies_v1(r, f))
            order by f.id for update), $4, jsonb_build_object('rule', $3::bigint));
