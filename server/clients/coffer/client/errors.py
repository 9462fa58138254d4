"""What can go wrong."""

from typing import Any

import httpx
import msgspec


class ApiError(Exception):
    """Coffer refused, and said why. `code` is stable and for programs; `problem` is the whole answer, with the code's own fields."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", "http_error"))
        self.problem = problem
        super().__init__(f"{self.code} ({status}): {problem.get('detail') or problem.get('title') or 'no more is known'}")

    @classmethod
    def of(cls, response: httpx.Response) -> "ApiError":
        """What an answer says that is none of success. One that is no problem of Coffer's may be a proxy's."""
        try:
            problem = msgspec.json.decode(response.content, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            problem = {}
        return cls(response.status_code, problem)


class Incomplete(Exception):
    """An upload does not get on: its source has become shorter, or has other bytes than those that Coffer has begun with."""
