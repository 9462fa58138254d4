"""sql/schema.sql is what the migrations add up to."""

import asyncpg
import pytest

from tests.ledger.write_schema import SCHEMA

pytestmark = pytest.mark.anyio

# Everything that pg_dump would write, in the words of PostgreSQL itself. The order of columns does not matter: nothing depends on it.
CATALOG = """
select 'column ' || c.relname || '.' || a.attname as name,
       concat_ws(' ', format_type(a.atttypid, a.atttypmod), case when a.attnotnull then 'not null' end, nullif(a.attidentity, ''),
                 nullif(a.attgenerated, ''), pg_get_expr(d.adbin, d.adrelid), a.attcollation::regcollation) as definition
  from pg_attribute a join pg_class c on c.oid = a.attrelid left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'v', 'm', 'p') and a.attnum > 0 and not a.attisdropped
union all
select 'relation ' || relname, concat_ws(' ', relkind, relpersistence, reloptions::text)
  from pg_class where relnamespace = 'public'::regnamespace
union all
select 'constraint ' || conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
  from pg_constraint where connamespace = 'public'::regnamespace and contype <> 'n'
union all
select 'index ' || indexrelid::regclass, pg_get_indexdef(indexrelid)
  from pg_index join pg_class c on c.oid = indexrelid where c.relnamespace = 'public'::regnamespace
union all
select 'function ' || oid::regprocedure, pg_get_functiondef(oid) from pg_proc where pronamespace = 'public'::regnamespace
union all
select 'trigger ' || tgrelid::regclass || '.' || tgname, pg_get_triggerdef(oid) || ' ' || tgenabled::text
  from pg_trigger where not tgisinternal
union all
select 'type ' || oid::regtype, typtype::text from pg_type where typnamespace = 'public'::regnamespace
union all
select 'comment ' || classoid::regclass || ' ' || pg_describe_object(classoid, objoid, objsubid), description
  from pg_description where pg_describe_object(classoid, objoid, objsubid) like '%public%'
 order by name
"""


async def test_schema_and_migrations_make_the_same_database(empty_database_url: str, database_url: str) -> None:
    migrated = await asyncpg.connect(database_url)
    built = await asyncpg.connect(empty_database_url)
    try:
        await migrated.execute("drop table schema_migrations")
        await built.execute(SCHEMA.read_text())
        expected = {row["name"]: row["definition"] for row in await migrated.fetch(CATALOG)}
        found = {row["name"]: row["definition"] for row in await built.fetch(CATALOG)}
    finally:
        await migrated.close()
        await built.close()
    assert len(expected) > 100
    assert found == expected, "write sql/schema.sql anew: python -m tests.ledger.write_schema"
