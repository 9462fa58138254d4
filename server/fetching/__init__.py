"""Fetching from addresses that others name: one client, which reaches nothing that is not meant for everybody."""

from server.fetching.client import Answer, Fetcher, FetchFailed
from server.fetching.download import Download
from server.fetching.rules import Rules

__all__ = ["Answer", "Download", "FetchFailed", "Fetcher", "Rules"]
