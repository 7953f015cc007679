"""Text as it is made: an iterator for threads, and one for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence

from .batch import Call
from .engine import Engine
from .generate import Completion, Request


class _Generation:
    """What both kinds have in common. Some pieces are made ahead of the reader while other calls keep the model running."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine, self._call = engine, call
        engine.submit(call)

    def cancel(self) -> None:
        """Ends the generation, from any thread; what was made until then can still be read."""
        self._engine.cancel(self._call)

    def close(self) -> None:
        """Ends the generation and frees its pages; also happens when the object is dropped."""
        self._engine.cancel(self._call)
        self._call.news.clear()

    def __del__(self) -> None:
        self._engine.drop(self._call)

    @property
    def completion(self) -> Completion:
        """What was made so far, also after a break, cancel() or Ctrl-C."""
        return self._call.requests[0].completion()

    @property
    def completions(self) -> list[Completion]:
        """The same for every sample, with n."""
        return [request.completion() for request in self._call.requests]


class Stream(_Generation):
    """Iterator over the text increments of one generation; `completion` holds what was made so far.

    Increments never hold half a character and never a part of a stop string. With n samples, iterate over indexed().
    """

    def __init__(self, engine: Engine, samples: Sequence[Request], *, cancel: threading.Event | None = None) -> None:
        super().__init__(engine, Call([samples], streams=True, cancelled=cancel))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return self._next()[1]

    def indexed(self) -> Iterator[tuple[int, str]]:
        """(number of the sample, increment), in the order in which they are made."""
        try:
            while True:
                yield self._next()
        except StopIteration:
            return

    def _next(self) -> tuple[int, str]:
        try:
            piece = self._engine.wait(self._call)
        except BaseException:  # Ctrl-C, say
            self.close()
            raise
        if piece is None:
            raise StopIteration
        return piece


class AsyncStream(_Generation):
    """The same for `async for`. Cancelling the task that reads it ends the generation."""

    def __init__(self, engine: Engine, samples: Sequence[Request], *, cancel: threading.Event | None = None) -> None:
        self._news = _News()
        super().__init__(engine, Call([samples], streams=True, cancelled=cancel, listener=self._news.tell))

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return (await self._next())[1]

    async def indexed(self) -> AsyncIterator[tuple[int, str]]:
        """(number of the sample, increment), in the order in which they are made."""
        try:
            while True:
                yield await self._next()
        except StopAsyncIteration:
            return

    async def _next(self) -> tuple[int, str]:
        try:
            while (piece := self._engine.poll(self._call)) is False:
                await self._news.wait()
        except BaseException:  # the task that reads was cancelled
            self.close()
            raise
        if not isinstance(piece, tuple):
            raise StopAsyncIteration
        return piece


async def finished(engine: Engine, prompts: Sequence[Sequence[Request]], *, cancel: threading.Event | None = None) -> None:
    """Runs the requests to their end. Cancelling the task that waits ends them."""
    news = _News()
    call = Call(prompts, cancelled=cancel, listener=news.tell)
    engine.submit(call)
    try:
        while engine.poll(call) is False:
            await news.wait()
    finally:
        engine.cancel(call)


class _News:
    """Tells a coroutine, from any thread, that its call has news."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def tell(self) -> None:
        self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()
