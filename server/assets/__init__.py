"""Linked assets: media that lives elsewhere. Doors register and ask; the worker looks and imports."""

from server.assets.links import ask_for_check, link, notice_of, relink
from server.assets.worker import AssetWorker

__all__ = ["AssetWorker", "ask_for_check", "link", "notice_of", "relink"]
