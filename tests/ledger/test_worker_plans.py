"""What the worker asks for twice a second reads what is due from an index, and nothing of what is not."""

from typing import Any
from uuid import UUID

import pytest

from server.ledger import Database
from server.ledger.assets import ASSET_COLUMNS
from server.ledger.files import FILE_COLUMNS
from server.ledger.statements import statement

pytestmark = pytest.mark.anyio

_ID = UUID("00000000-0000-7000-8000-000000000001")


@pytest.mark.parametrize(
    ("name", "arguments", "index", "bound"),
    [
        ("due_webhooks", (), "webhook_deliveries_due", "due_at <= now()"),
        ("claim_deliveries", (_ID, 8, 30.0), "webhook_deliveries_due", "due_at <= now()"),
        ("claim_deliveries", (_ID, 8, 30.0), "webhook_deliveries_order", "order_key = d"),
        ("put_off_delivery", (1, 1, 5.0, "timeout"), "webhook_deliveries_order", "order_key = f"),
        # An index of what is pending looks short while little is, and these name their rows.
        ("put_off_delivery", (1, 1, 5.0, "timeout"), "webhook_deliveries_pkey", "id = "),
        ("list_dead_callbacks", (1, 8), "webhook_deliveries_dead_callbacks", "id > "),
        ("forget_callback_secrets", (8,), "generation_jobs_pkey", "id = "),
        ("end_deliveries", (_ID, [1]), "webhook_deliveries_pkey", "id = ANY"),
        ("get_asset", ("ada", _ID), "linked_assets_by_user", "id = "),
        ("ask_for_asset_check", ("ada", _ID, 30.0), "linked_assets_by_user", "id = "),
        ("ask_for_asset_import", ("ada", _ID, None, "{}"), "linked_assets_by_user", "id = "),
        ("finish_asset_check", (_ID, 1, "reachable", None, None, None, 5.0), "linked_assets_pkey", "id = "),
        ("put_off_asset_imports", ([_ID], 5.0), "linked_assets_pkey", "id = ANY"),
        ("finish_asset_import", (_ID, 1, _ID, None), "linked_assets_pkey", "id = "),
        ("claim_asset_checks", (8, 30.0), "linked_assets_check", "check_at <= now()"),
        ("find_sheet_file", ("ada", "sheet 00"), "user_files_idempotency_key", "idempotency_key)::text = "),
        (
            "wish_for_sheet",
            (_ID, "ada", bytes(32), [_ID], "{}", "{}", "{}", "sheet 00"),
            "user_files_idempotency_key",
            "idempotency_key)::text = ",
        ),
        ("get_sheet", (_ID,), "sheets_pkey", "id = "),
        ("refuse_sheet", (_ID, "{}"), "sheets_pkey", "id = "),
        ("end_sheet", (_ID,), "sheets_pkey", "id = "),
        ("purge_sheets", (5.0, 8), "sheets_old", "requested_at < "),
        ("claim_asset_imports", (8, 30.0), "linked_assets_import", "import_at <= now()"),
    ],
)
async def test_what_is_due_is_an_index_range(db: Database, name: str, arguments: tuple[Any, ...], index: str, bound: str) -> None:
    plan = [row[0].strip() for row in await db.read(f"explain {statement(name, asset=ASSET_COLUMNS, file=FILE_COLUMNS)}", *arguments)]
    bounds = [plan[number + 1] for number, line in enumerate(plan) if index in line]
    assert bounds and all(each.startswith("Index Cond:") and bound in each for each in bounds), "\n".join(plan)
    assert not [line for line in plan if line.startswith("Sort")]


async def test_of_jobs_only_those_whose_callback_is_due_are_looked_at(db: Database) -> None:
    plan = "\n".join(row[0] for row in await db.read(f"explain {statement('due_webhooks')}"))
    assert "using generation_jobs_callback on generation_jobs" in plan, plan


async def test_metrics_ask_indexes_of_what_is_open_or_has_just_ended(db: Database) -> None:
    plan = "\n".join(row[0] for row in await db.read(f"explain {statement('work_figures')}", 100))
    used = {"generation_jobs_ended", "generation_jobs_unfinished", "generation_outputs_fetching", "generation_outputs_pkey"}
    assert used <= {index for index in used if f"using {index} on" in plan} and "Seq Scan" not in plan, plan
    assert "finished_at > (now()" in plan, plan
