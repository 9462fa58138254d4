"""Bytes out: which bytes of a stored file answer a request, and under which headers (RFC 9110).

`ranges.py`, `conditions.py` and `headers.py` are plain functions of header values, the same for every door.
"""

from server.delivery.links import Links
from server.delivery.previews import AwaitedPreviews
from server.delivery.recent import RecentLinks
from server.delivery.service import Answer, Body, Delivery

__all__ = ["Answer", "AwaitedPreviews", "Body", "Delivery", "Links", "RecentLinks"]
