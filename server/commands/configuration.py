"""`coffer config`: every setting, as this environment makes it."""

from collections.abc import Mapping
from dataclasses import fields

from server.commands.output import show
from server.settings import Settings, read_with_sources, variable


def show_all(environment: Mapping[str, str], *, as_json: bool) -> None:
    """Prints all settings. Of a secret it only tells whether there is one. Raises `SettingError` for the first wrong one."""
    values = read_with_sources(environment)
    rows = []
    for each in fields(Settings):
        value, source = values[each.name]
        if each.metadata["secret"]:
            value = "(set)" if value else "(not set)"
        rows.append({"variable": variable(each.name), "value": value, "source": source, "meaning": each.metadata["meaning"]})
    show(rows, ("variable", "value", "source", "meaning"), as_json)
