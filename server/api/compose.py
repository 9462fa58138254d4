"""`POST /api/compose`: several of a user's pictures on one sheet, as one reference for a pipeline."""

import math
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, post
from litestar.params import JSONBody
from msgspec import Meta

from server import fields, ledger
from server.api.door import needs, principal_of, services_of
from server.api.files import FileAnswer, file_json
from server.auth import Scope
from server.errors import Forbidden, InvalidRequest, NotFound
from server.intake import Details
from server.previews.sheets import LONGEST_SIDE, MOST_PICTURES, MOST_PIXELS, TRANSPARENT, Sheet

Http = Request[Any, Any, Any]


class ComposeWish(msgspec.Struct, forbid_unknown_fields=True):
    """Up to 36 files of the user, which stand on the sheet in this order, in rows from the left: images, and the previews of other files.

    Sizes are in pixels. `fit` shows all of a picture in its cell or fills the cell; nothing is enlarged. `columns` left out makes the
    sheet about square. `background` is `#rrggbb` or `transparent`. The last four fields are given to the file when it is made.
    """

    files: Annotated[list[UUID], Meta(min_length=1, max_length=MOST_PICTURES)]
    columns: Annotated[int, Meta(ge=1, le=MOST_PICTURES)] | None = None
    cell_width: Annotated[int, Meta(ge=16, le=4096)] = 512
    cell_height: Annotated[int, Meta(ge=16, le=4096)] = 512
    padding: Annotated[int, Meta(ge=0, le=512)] = 8
    background: Annotated[str, Meta(pattern="^(#[0-9a-fA-F]{6}|transparent)$")] = "#ffffff"
    fit: Literal["contain", "cover"] = "contain"
    format: Literal["webp", "png", "jpeg"] = "webp"
    quality: Annotated[int, Meta(ge=1, le=100)] = 90
    file_name: Annotated[str, Meta(min_length=1, max_length=fields.NAME_CHARACTERS)] | None = None
    package_name: Annotated[str, Meta(max_length=fields.PACKAGE_NAME_CHARACTERS)] | None = None
    tags: list[str] = []
    metadata: dict[str, Any] = {}


@post("/compose", guards=[needs(Scope.FILES_WRITE)], status_code=201)
async def compose(request: Http, data: JSONBody[ComposeWish]) -> Response[FileAnswer]:
    """Makes a contact sheet and stores it as a file of the user: 201; or 200 with that file when there is one of the same pictures and
    layout.
    """
    services, principal = services_of(request), principal_of(request)
    if principal.kinds is not None and "image" not in principal.kinds:
        raise Forbidden(Scope.FILES_WRITE)
    sheet = _sheet(data)
    wanted = list(dict.fromkeys(data.files))
    found = await ledger.get_files(services.db, principal.owner, wanted)
    if len(found) != len(wanted) or (principal.kinds is not None and any(file.file_type not in principal.kinds for file in found.values())):
        raise NotFound
    details = Details(
        file_name=f"sheet.{data.format}" if data.file_name is None else fields.clean_name(data.file_name, "file_name"),
        kind="image",
        package_name=fields.clean_package_name(data.package_name),
        tags=fields.clean_tags(data.tags),
        metadata=fields.clean_metadata(data.metadata),
    )
    file, was_there = await services.sheets.compose([found[file_id] for file_id in data.files], sheet, details)
    return Response(file_json(file), status_code=200 if was_there else 201, headers={"location": f"/api/files/{file.id}"})


def _sheet(data: ComposeWish) -> Sheet:
    columns = min(data.columns or math.ceil(math.sqrt(len(data.files))), len(data.files))
    sheet = Sheet(
        columns=columns,
        cell_width=data.cell_width,
        cell_height=data.cell_height,
        padding=data.padding,
        background=data.background.lower(),
        fit=data.fit,
        format=data.format,
        quality=data.quality,
    )
    if data.format == "jpeg" and data.background == TRANSPARENT:
        raise InvalidRequest("background", "JPEG has no transparency; ask for webp or png")
    width, height = sheet.size(len(data.files))
    if max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise InvalidRequest(
            "files", f"make a sheet of {width} x {height} pixels; {LONGEST_SIDE} a side and {MOST_PIXELS} in all are the most"
        )
    return sheet


router = Router(path="/api", route_handlers=[compose], tags=["Generation"])
