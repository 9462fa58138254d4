"""The client of Coffer: files up with resuming, jobs, links. `Client` waits, `AsyncClient` is awaited; both can do the same.

    from coffer.client import Client

    with Client("https://media.example.com", api_key="cof_...", user_id="user_2abc") as coffer:
        file = coffer.upload(Path("film.mp4"), progress=lambda sent: print(sent.sent_bytes, "of", sent.total_bytes))
        print(coffer.link(file.id).url)

It imports nothing of the server, and needs httpx and msgspec. Every failure that Coffer answers is an `ApiError` with a code of
the README's table; one that stays without any answer is an `httpx.TransportError`.
"""

from coffer.client.calls import Progress
from coffer.client.clients import AsyncClient, Client
from coffer.client.errors import ApiError, Incomplete
from coffer.client.models import (
    Callback,
    File,
    FilePage,
    Job,
    JobPage,
    Link,
    NewJob,
    Output,
    OutputWish,
    Reference,
    UploadLink,
    UploadPlace,
    Usage,
    WebhookPlace,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "Callback",
    "Client",
    "File",
    "FilePage",
    "Incomplete",
    "Job",
    "JobPage",
    "Link",
    "NewJob",
    "Output",
    "OutputWish",
    "Progress",
    "Reference",
    "UploadLink",
    "UploadPlace",
    "Usage",
    "WebhookPlace",
]
