"""The table of attacks. A new one is a module with `attack(target, tally)`, which returns its figure, and a line here."""

from collections.abc import Callable
from typing import NamedTuple

from tests.attack import (
    active_content,
    api_keys,
    bombs,
    dispositions,
    dressed,
    fetched_urls,
    floods,
    forged_links,
    forged_tokens,
    forged_webhooks,
    generated,
    internal_headers,
    names,
    playlists,
    ranges,
    secrets_in_logs,
    strangers,
    undecoded,
    viruses,
)
from tests.attack.target import Tally, Target, errors_in


class Case(NamedTuple):
    """One attack. Numbers are those of the list of what Coffer must refuse; several may share one."""

    number: int
    title: str
    attack: Callable[[Target, Tally], str]


CASES = [
    Case(1, "bytes in disguise", dressed.attack),
    Case(1, "undecoded bytes", undecoded.attack),
    Case(2, "playlists as films", playlists.attack),
    Case(3, "bombs", bombs.attack),
    Case(4, "another user's ids", strangers.attack),
    Case(5, "forged links", forged_links.attack),
    Case(6, "names and user ids", names.attack),
    Case(7, "active content", active_content.attack),
    Case(8, "names as headers", dispositions.attack),
    Case(9, "URLs that lead inward", fetched_urls.attack),
    Case(10, "forged user tokens", forged_tokens.attack),
    Case(11, "forged webhooks", forged_webhooks.attack),
    Case(13, "floods", floods.attack),
    Case(14, "Range abuse", ranges.attack),
    Case(15, "internal headers", internal_headers.attack),
    Case(16, "viruses", viruses.attack),
    Case(17, "generated requests", generated.attack),
    # The last two, as they look through the database and the log of all that went before.
    Case(12, "API keys", api_keys.attack),
    Case(12, "secrets in logs", secrets_in_logs.attack),
]


def run(case: Case, target: Target) -> str:
    """Runs one attack and returns its figure. Raises `Breach` if anything got through, the server failed or it wrote of an error."""
    tally = Tally()
    pid, logged = target.server.pid, len(target.server.logged())
    figure = case.attack(target, tally)
    tally.check(target.nobody.get("/health/ready").status_code == 200 and target.server.pid == pid, "the server is not ready any more")
    errors = errors_in(target.server.logged()[logged:])
    tally.check(not errors, f"{len(errors)} errors in the log, the first: {errors[:1]}")
    tally.settle()
    return figure
