"""Share links of Google Drive: the page that a link shows a person is not the file. Its file is at another address."""

import re
from urllib.parse import parse_qs, urlencode, urlsplit

_HOSTS = {"drive.google.com", "docs.google.com"}
_FILE_PATH = re.compile(r"/file/(?:u/[0-9]{1,3}/)?d/([A-Za-z0-9_-]{10,100})(?:/(?:view|edit|preview)?)?")
_ID_PATHS = re.compile(r"/(?:u/[0-9]{1,3}/)?(?:open|uc|thumbnail)")
_ID = re.compile(r"[A-Za-z0-9_-]{10,100}")
_DOWNLOADS = "https://drive.usercontent.google.com/download"


def direct_url(url: str) -> str | None:
    """Where the bytes of a share link are: of `/file/d/{id}/view`, `/open?id={id}` or `/uc?id={id}`. None for every other URL.

    `confirm=t` skips the page that large files get instead, which says that Google has not scanned them. Google documents neither; a file
    that is not shared with everybody who has the link answers with a page to sign in, which is told by its type.
    """
    parts = urlsplit(url)
    if parts.hostname not in _HOSTS:
        return None
    query = parse_qs(parts.query)
    match = _FILE_PATH.fullmatch(parts.path)
    if match is not None:
        file_id = match[1]
    elif _ID_PATHS.fullmatch(parts.path) and _ID.fullmatch(query.get("id", [""])[0]):
        file_id = query["id"][0]
    else:
        return None
    wanted = {"id": file_id, "export": "download", "confirm": "t"}
    if _ID.fullmatch(key := query.get("resourcekey", [""])[0]):  # older files need it besides
        wanted["resourcekey"] = key
    return f"{_DOWNLOADS}?{urlencode(wanted)}"


def is_page(fetch_url: str, mime_type: str | None) -> bool:
    """Whether a Drive file's address gave a page for people in its place."""
    return fetch_url.startswith(_DOWNLOADS) and mime_type == "text/html"
