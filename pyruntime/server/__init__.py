"""`pyruntime serve`: a model behind OpenAI's HTTP interface. Needs the extra "server" (starlette, uvicorn)."""

from __future__ import annotations

import errno
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ..errors import InvalidArgumentError, UnsupportedModelError

try:
    import uvicorn

    from .app import Api, Settings
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("uvicorn", "starlette", "anyio"):
        raise
    raise UnsupportedModelError("the server needs the packages starlette and uvicorn: pip install 'pyruntime[server]'") from None

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from ..model import Model

__all__ = ["Server", "Settings", "asgi_app"]


class Server:
    """Listens from the start, answers once run() is called. url: where.

    port: a number, 0 for a free one, or what reserve() returned.  grace: seconds that answers in progress have to end when the server is
    stopped.
    Raises InvalidArgumentError for an address that is not free, or that others can reach although there is no API key.
    """

    def __init__(self, model: Model, settings: Settings, *, port: int | socket.socket = 8000, grace: int = 30) -> None:
        self._socket = port if isinstance(port, socket.socket) else reserve(settings, port)
        try:
            self._socket.listen(2048)
        except OSError as error:
            self._socket.close()
            raise _cannot_listen(settings.host, self._socket.getsockname()[1], error) from None
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self.api = Api(model, settings, lambda: bool(self._uvicorn.should_exit))
        config = uvicorn.Config(
            self.api.app(),
            http="h11",  # bounds the size of headers
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=grace + 5,  # for who does not even take the end of its answer
        )
        self._grace, self._is_hurried = grace, False
        self._uvicorn = uvicorn.Server(config)
        self._uvicorn.capture_signals = nullcontext  # it would raise them again at the end

    def run(self) -> None:
        """Until stop(), or in the main thread SIGINT or SIGTERM; a second signal does not wait for the answers in progress."""
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), name="pyruntime-server")
        watch.start()
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            done.set()
            watch.join()
            self._socket.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self) -> None:
        """From any thread: takes no new requests, and ends when those in progress have ended."""
        self._uvicorn.should_exit = True

    def _on_signal(self, *_: object) -> None:
        self._uvicorn.force_exit = self._is_hurried
        self._is_hurried = bool(self._uvicorn.should_exit)
        self._uvicorn.should_exit = True

    def _watch(self, done: threading.Event) -> None:
        """Cuts answers short when their time is over. A thread that looks, since a signal handler may not take locks."""
        stopped = 0.0
        while not done.wait(0.1):
            if self._uvicorn.should_exit:
                stopped = stopped or time.monotonic()
                if self._is_hurried or time.monotonic() >= stopped + self._grace:
                    self.api.end_all()


def asgi_app(model: Model, settings: Settings | None = None) -> Starlette:
    """The routes alone, for another ASGI server, or a part of a larger application (examples/ray_serve.py runs them in Ray Serve).

    Without an API key they answer requests for a loopback address or settings.host only, as the server does; limits on connections, and
    encryption, are the business of what runs them.
    """
    return Api(model, settings or Settings(), lambda: False).app()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reserve(settings: Settings, port: int) -> socket.socket:
    """Takes the address, so that what is wrong with it is said before a model is loaded. Raises what Server does."""
    key, host = settings.api_key, settings.host
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise InvalidArgumentError("the API key must be ASCII characters that can be printed, at least one, with no space around")
    if key is None and not is_loopback(host):
        raise InvalidArgumentError(f"{host} can be reached from other machines: give an API key, or listen on 127.0.0.1")
    made: socket.socket | None = None
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("a port is a number from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if made:
            made.close()
        raise _cannot_listen(host, port, error) from None
    return made


def _cannot_listen(host: str, port: int, error: Exception) -> InvalidArgumentError:
    advice = (
        "; another server may be running: choose another port, or 0 for a free one"
        if getattr(error, "errno", 0) == errno.EADDRINUSE
        else ""
    )
    return InvalidArgumentError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}{advice}")


def serve(open_model: Callable[[], Model], settings: Settings, *, port: int, grace: int, say: Callable[[str], None]) -> None:
    """For the command. open_model: takes seconds, and is called when nothing is wrong with the address."""
    with reserve(settings, port) as address, open_model() as model:
        server = Server(model, settings, port=address, grace=grace)
        say(f"{server.api.name} is served at {server.url} (chat: {server.url}/, API: {server.url}/v1); Ctrl-C stops")
        server.run()
