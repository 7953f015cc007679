"""What every route has in common: who may come in, how much they may send, and what they are told."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from .errors import ApiError
from .metrics import Metrics
from .schemas import parse_json

BODY_SECONDS = 30.0  # for a client to send its body
STALL_SECONDS = 60.0  # for a client to take the next chunk
MAX_HEADERS = 32768  # bytes
_DRAIN_BYTES = 32 << 20  # read and dropped of a body that is too large, so that the client gets to read the answer


def to_json(value: Any) -> bytes:
    """In UTF-8; half characters become "?"."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers())


async def read_body(request: Request, limit: int) -> dict[str, Any]:
    """The JSON object that was sent. Raises ApiError 400, 408, 413, 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps web pages out, which can send other types anywhere without asking
        raise ApiError(415, f"the Content-Type is {kind[:80]!r}, expected application/json")
    too_large = ApiError(413, f"the body has more than {limit} bytes", code="request_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:18]) > limit and "expect" in request.headers:
        raise too_large
    chunks, size = [], 0

    async def read() -> None:
        nonlocal size
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > limit + _DRAIN_BYTES:
                return

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the end of its body") from None
    if size > limit:
        raise too_large
    return parse_json(b"".join(chunks))


async def until_gone(receive: Any) -> None:
    """Until the client closes its connection; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect them
]


class EventStream:
    """Server-sent events. A client that leaves, or does not read, ends them; `events` is closed in any case.

    events: JSON values, and None where only a sign of life is due.  end: ends what `events` waits for, from any state and at once; a task
    alone cannot be relied on for that, since one that is cancelled while it is about to go on may go on.
    """

    def __init__(
        self, events: AsyncGenerator[Any, None], *, end: Callable[[], None], on_gone: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        self._events, self._end, self._on_gone, self._on_end = events, end, on_gone, on_end
        self._stalled = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone, work = asyncio.ensure_future(until_gone(receive)), asyncio.ensure_future(self._send(send))
        stalled = asyncio.ensure_future(self._stalled.wait())
        try:
            await asyncio.wait({gone, work, stalled}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() or isinstance(work.exception(), OSError):
                self._on_gone()
            else:
                work.result()
        finally:
            self._end()
            tasks = (gone, work, stalled)
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._events.aclose()  # by now nobody is in it
            finally:
                self._on_end()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        async for event in self._events:
            data = b": \n\n" if event is None else b"data: " + to_json(event) + b"\n\n"
            await self._timed(send({"type": "http.response.body", "body": data, "more_body": True}))
        await self._timed(send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}))

    async def _timed(self, sending: Awaitable[None]) -> None:
        timer = asyncio.get_running_loop().call_later(STALL_SECONDS, self._stalled.set)
        try:
            await sending
        finally:
            timer.cancel()


class Gate:
    """ASGI middleware: checks the key, on every route but /health, and without one that the request was meant for this server: a web page
    can make a browser ask for a name of its own that leads here. Counts the answers."""

    def __init__(self, app: Any, *, api_key: str | None, hosts: set[str], routes: set[str], metrics: Metrics) -> None:
        self._app, self._hosts, self._routes, self._metrics = app, hosts, routes, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"
        identity = f"req_{secrets.token_hex(12)}".encode()

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses[route, message["status"]] += 1
                message["headers"] = [*message["headers"], (b"x-request-id", identity), (b"x-content-type-options", b"nosniff")]
            await send(message)

        size = len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in scope["headers"])
        if size > MAX_HEADERS:
            refused: Response | None = error_response(ApiError(431, f"the headers have {size} bytes, at most {MAX_HEADERS}"))
        else:
            refused = None if scope["path"] == "/health" else self._refusal(scope)
        await (refused or self._app)(scope, receive, counting)

    def _refusal(self, scope: Any) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is None:
            host = _host(headers.get(b"host", ""))
            if host in self._hosts or _is_loopback(host):
                return None
            return error_response(ApiError(403, f"this server is not {host[:80]!r}: without an API key it answers to its own address only"))
        if hmac.compare_digest(_given_key(headers.get(b"authorization", "")), self._key):
            return None
        response = error_response(ApiError(401, "the API key is missing or wrong", code="invalid_api_key"))
        # A browser asks for the key, as a password, when it opens the page.
        response.headers["www-authenticate"] = 'Basic realm="pyruntime"' if scope["path"] == "/" else "Bearer"
        return response


def _given_key(header: str) -> bytes:
    scheme, _, value = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            pass
    return b""


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    name = header.strip().lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
