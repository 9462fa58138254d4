"""`multipart/form-data` (RFC 7578) as a stream of events, in bounded memory."""

from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import IncompleteBody, InvalidRequest

MOST_FILES = 100
MOST_FIELDS = 64
LONGEST_FIELD_BYTES = 128 * 1024  # twice the largest metadata, which may arrive with spaces
_LONGEST_FORM_FIELDS_BYTES = 2 * LONGEST_FIELD_BYTES


@dataclass(slots=True)
class FileStart:
    """A file part begins. `file_name` is as the client sent it, `headers` the part's own, names in lower case."""

    field_name: str
    file_name: str
    headers: dict[str, str]


@dataclass(slots=True)
class FileData:
    """The next bytes of the file part under way: a view of the piece that was fed, which is not copied."""

    data: memoryview


@dataclass(slots=True)
class FileEnd:
    """The file part is complete."""


@dataclass(slots=True)
class Field:
    """A text part, whole."""

    name: str
    value: str


Event = FileStart | FileData | FileEnd | Field


@dataclass(slots=True)
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    header_name: bytes = b""
    header_value: bytes = b""
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


class FormReader:
    """Feeds a form to python-multipart and returns what each piece brought. Holds no more than one field's text.

    A part with a file name is a file, and so is one called `file`; any other is a text field. Raises `InvalidRequest`
    (field `body`) for a malformed form or one with too many parts, and `IncompleteBody` from `close`.
    """

    def __init__(self, content_type: str) -> None:
        _, parameters = parse_options_header(content_type)
        boundary = parameters.get(b"boundary")
        if not boundary:
            raise InvalidRequest("Content-Type", "multipart/form-data needs a boundary")
        self._events: list[Event] = []
        self._part = _Part()
        self._files = self._fields = self._field_bytes = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except MultipartParseError as problem:
            raise InvalidRequest("Content-Type", "the boundary is not valid") from problem

    def feed(self, chunk: bytes) -> list[Event]:
        """What this piece of the body brought, in order."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as problem:
            raise InvalidRequest("body", "is not well-formed multipart/form-data") from problem
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Call at the end of the body. Raises `IncompleteBody` unless the closing boundary has come."""
        if not self._ended:
            raise IncompleteBody

    def _part_begin(self) -> None:
        self._part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.header_value += data[start:end]

    def _header_end(self) -> None:
        part = self._part
        part.headers[part.header_name.decode("latin-1").lower()] = part.header_value.decode("latin-1").strip()
        part.header_name = part.header_value = b""

    def _headers_finished(self) -> None:
        part = self._part
        disposition, parameters = parse_options_header(part.headers.get("content-disposition", ""))
        if disposition != b"form-data" or b"name" not in parameters:
            raise InvalidRequest("body", "a part needs `Content-Disposition: form-data; name=...`")
        part.name = _text(parameters[b"name"], "name of a part")
        part.is_file = b"filename" in parameters or part.name == "file"
        if not part.is_file:
            self._fields += 1
            if self._fields > MOST_FIELDS:
                raise InvalidRequest("body", f"a form may have at most {MOST_FIELDS} fields")
            return
        self._files += 1
        if self._files > MOST_FILES:
            raise InvalidRequest("body", f"a form may have at most {MOST_FILES} files")
        self._events.append(FileStart(part.name, _text(parameters.get(b"filename", b""), "filename"), part.headers))

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._events.append(FileData(memoryview(data)[start:end]))  # a slice would copy the file once more
            return
        self._field_bytes += end - start
        if len(self._part.value) + end - start > LONGEST_FIELD_BYTES or self._field_bytes > _LONGEST_FORM_FIELDS_BYTES:
            raise InvalidRequest(self._part.name, f"a form's fields may hold at most {LONGEST_FIELD_BYTES} bytes each")
        self._part.value += data[start:end]

    def _part_end(self) -> None:
        if self._part.is_file:
            self._events.append(FileEnd())
        else:
            self._events.append(Field(self._part.name, _text(bytes(self._part.value), self._part.name)))

    def _end(self) -> None:
        self._ended = True


def _text(raw: bytes, field_name: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as problem:
        raise InvalidRequest(field_name, "must be UTF-8") from problem
