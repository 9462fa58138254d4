"""`GET /api/files/events`: a user's finished previews as server-sent events, as bare ASGI.

What is finished after the answer's head has come is sent, or the stream ends; so a client lists its files anew whenever it has connected.
A stream that a client does not read keeps ids alone, and few.
"""

from collections.abc import MutableMapping
from functools import partial
from typing import Any

import msgspec

from server import ledger
from server.api.door import admit
from server.api.files import file_json
from server.api.services import Services
from server.api.streams import HEARTBEAT, Receive, Send, Stream
from server.auth import Principal, Scope
from server.ledger import Finished

_FILES_AT_ONCE = 100


async def follow(services: Services, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Tells of each preview that is finished from now on, whatever became of it, until the client goes, 5 minutes are over, the server
    stops, the database is lost or more has happened than is remembered.

    Raises `TooManyStreams`, and `DatabaseUnavailable` when nothing can be heard.
    """
    principal = await admit(services, scope, Scope.FILES_READ)
    with services.streams.opened(principal.owner), services.notices.of_user(principal.owner) as finished:
        await services.notices.listening()
        await services.streams.answer(receive, send, partial(_tell, services, principal, finished))


async def _tell(services: Services, principal: Principal, finished: Finished, stream: Stream) -> None:
    while await stream.wait(finished.wait()) and not finished.is_incomplete:
        ids = finished.take(_FILES_AT_ONCE)
        files = await ledger.get_files(services.db, principal.owner, ids) if ids else {}
        told = [
            file_json(files[file_id])
            for file_id in ids
            if file_id in files
            and files[file_id].preview_state != "pending"  # its bytes were replaced: there will be another event
            and (principal.kinds is None or files[file_id].file_type in principal.kinds)
        ]
        body = b"".join(b"event: preview\ndata: %b\n\n" % msgspec.json.encode(answer) for answer in told)
        if body or not ids:
            await stream.tell(body or HEARTBEAT)
