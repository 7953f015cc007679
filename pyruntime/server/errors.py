"""Errors as OpenAI's clients expect them: a status code and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InvalidArgumentError, PyruntimeError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A request that is refused."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


def invalid(param: str, message: str) -> ApiError:
    """400 for a parameter; the message goes on after its name."""
    return ApiError(400, f"{param} {message}", param=param, code="invalid_value")


def from_package(error: PyruntimeError, path: str) -> ApiError:
    """What an exception of the package is to a client. path: of the model, which is none of the client's business."""
    message = str(error).replace(path, "the model").partition("\n")[0][:1000]  # what llguidance says may go on for pages
    param = None
    if isinstance(error, InvalidArgumentError):
        if "is closed" in message:
            return ApiError(503, message, code="unavailable")
        named = re.match(r"([a-z_]+)(\[\d+\])* (is|are|holds|names|cannot) ", message)
        param = named[1] if named else None
    status, code = error.http
    return ApiError(status, message, param=param, code=code)
