"""Every domain error has its status, and its answer has the promised shape."""

import dataclasses
import json
from collections.abc import Iterator
from typing import get_type_hints

import pytest

from server import errors
from server.api.problems import RETRY_AFTER_SECONDS, STATUS, HttpRefusal, Problem
from server.errors import CofferError

SAMPLES = {int: 7, str: "sample", str | None: None, list[str]: ["a", "b"]}
STANDARD = {"type", "title", "status", "detail", "code", "request_id"}


def every_error() -> Iterator[type[CofferError]]:
    """By name: `__subclasses__` may still list the classes that `dataclass(slots=True)` has replaced."""
    for each in vars(errors).values():
        if isinstance(each, type) and issubclass(each, CofferError) and each is not CofferError:
            yield each


def sample(error: type[CofferError]) -> CofferError:
    hints = get_type_hints(error)
    return error(**{field.name: SAMPLES[hints[field.name]] for field in dataclasses.fields(error)})


@pytest.mark.parametrize("error", list(every_error()), ids=lambda error: error.__name__)
def test_every_error_is_answered_by_the_table(error: type[CofferError]) -> None:
    raised = sample(error)
    problem = Problem.of(raised, "request-1")
    body = json.loads(problem.body)
    assert problem.status == body["status"] == STATUS[error]
    assert body["code"] == error.code and body["type"].endswith(error.code)
    assert body["title"] == error.title and body["detail"] == str(raised)
    assert body["request_id"] == "request-1"
    assert {name: value for name, value in body.items() if name not in STANDARD} == raised.extra()
    headers = dict(problem.raw_headers())
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"content-length"] == str(len(problem.body)).encode()


def test_codes_and_titles_tell_errors_apart() -> None:
    found = list(every_error())
    codes = [error.code for error in found if error is not errors.InternalError]
    assert len(set(codes)) == len(codes)
    assert STATUS.keys() == set(found)


def test_every_503_says_when_to_come_back() -> None:
    for error, status in STATUS.items():
        assert (status == 503) <= (error in RETRY_AFTER_SECONDS), error
        if error in RETRY_AFTER_SECONDS:
            assert Problem.of(sample(error), "r").headers["retry-after"].isdigit()


def test_401_names_the_scheme_and_416_the_size() -> None:
    assert Problem.of(errors.Unauthenticated(), "r").headers["www-authenticate"].startswith("Bearer")
    assert Problem.of(errors.RangeNotSatisfiable(7), "r").headers["content-range"] == "bytes */7"


def test_a_defect_tells_nothing() -> None:
    problem = Problem.of(ZeroDivisionError("secret detail"), "request-1")
    body = json.loads(problem.body)
    assert (problem.status, body["code"], body["request_id"]) == (500, "internal", "request-1")
    assert b"secret" not in problem.body and b"Zero" not in problem.body


def test_refusals_of_http_itself() -> None:
    problem = Problem.of(HttpRefusal(405, {"allow": "GET"}), "r")
    assert (problem.status, json.loads(problem.body)["code"], problem.headers) == (405, "method_not_allowed", {"allow": "GET"})
    assert json.loads(Problem.of(HttpRefusal(413), "r").body)["code"] == "body_too_large"
