"""The routes: OpenAI's, and a few of our own."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from ..batch import MAX_RUNNING, Call
from ..errors import PyruntimeError
from ..generate import Request
from ..model import Model
from ..stream import AsyncStream, _Generation, _News, finished
from . import schemas
from .answers import Answers
from .errors import ApiError, from_package, invalid
from .http import EventStream, Gate, error_response, json_response, read_body, until_gone
from .metrics import Metrics
from .schemas import Job

QUIET_SECONDS = 15.0  # a stream without text gives a sign of life that often, so that nobody on the way closes the connection


@dataclass(frozen=True)
class Settings:
    """name: what the model is called; None: Model.name.  max_body: bytes.  cors: origins of web pages that may use the server."""

    name: str | None = None
    api_key: str | None = None
    host: str = "127.0.0.1"
    max_body: int = 8 << 20
    cors: tuple[str, ...] = ()


class Api:
    """The handlers, with what they share. is_stopping: no new requests are taken."""

    def __init__(self, model: Model, settings: Settings, is_stopping: Callable[[], bool]) -> None:
        self.model, self._settings, self._is_stopping = model, settings, is_stopping
        self.name = settings.name or (Path(model.name).name if Path(model.name).exists() else model.name)  # paths are not for clients
        self.metrics = Metrics()
        self._created = int(time.time())
        self._active: set[threading.Event] = set()
        self._page, self._policy = _page()

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        paths = {route.path for route in routes}
        gate = Middleware(Gate, api_key=self._settings.api_key, hosts={self._settings.host.lower()}, routes=paths, metrics=self.metrics)
        cors = [Middleware(CORSMiddleware, allow_origins=self._settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"])]
        return Starlette(
            routes=[*routes, Route("/v1/models/{name:path}", self.one_model)],
            middleware=[*(cors if self._settings.cors else ()), gate],
            exception_handlers={
                ApiError: lambda _, error: error_response(error),
                PyruntimeError: lambda _, error: error_response(self._refusal(error)),
                HTTPException: lambda _, error: error_response(ApiError(error.status_code, _http_message(error.status_code))),
                Exception: lambda _, error: error_response(ApiError(500, f"internal error ({type(error).__name__})")),
            },
        )

    # -- text

    async def chat(self, http: HttpRequest) -> Response | EventStream:
        body = await read_body(http, self._settings.max_body)
        job = schemas.chat_job(body)

        def prompt() -> list[list[int]]:
            return [self._chat_ids(job)]

        return await self._answer(http, job, prompt, is_chat=True)

    async def complete(self, http: HttpRequest) -> Response | EventStream:
        body = await read_body(http, self._settings.max_body)
        job = schemas.completion_job(body)
        return await self._answer(http, job, lambda: job.prompts, is_chat=False)

    async def _answer(self, http: HttpRequest, job: Job, prompt: Callable[[], Any], *, is_chat: bool) -> Response | EventStream:
        self._check_model(job.model)
        if self._is_stopping():
            raise ApiError(503, "the server is being stopped", code="stopping")
        if len(self._active) >= self.model._engine.max_queue + MAX_RUNNING:
            raise ApiError(429, f"{len(self._active)} requests are in progress, as many as may: try again later", code="queue_full")
        cancel, prompts = threading.Event(), list[list[Request]]()
        self._active.add(cancel)

        def leave() -> None:
            if cancel in self._active:
                self._active.remove(cancel)
                self.metrics.count(prompts)

        try:
            # Long prompts, templates and grammars take their time: not in the event loop.
            prompts, _ = await asyncio.to_thread(lambda: self.model._requests(prompt(), job.options, False))
            answers = Answers(self.model, self.name, job, prompts, is_chat=is_chat)
            if job.stream:
                generation = _Stream(self.model, prompts, cancel)  # a full queue is said here, with its own status
                events = self._events(generation, answers)
                return EventStream(events, end=generation.close, on_gone=self._count_gone, on_end=leave)
            answer = await self._whole(http, answers, prompts, cancel)
        except BaseException:
            leave()
            raise
        leave()
        return answer

    async def _whole(self, http: HttpRequest, answers: Answers, prompts: Sequence[Sequence[Request]], cancel: threading.Event) -> Response:
        gone = asyncio.ensure_future(until_gone(http.receive))
        work = asyncio.ensure_future(finished(self.model._engine, prompts, cancel=cancel))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._count_gone()
                return Response(status_code=499)  # nobody reads it
            work.result()
            self._check_complete(answers)
            return json_response(await asyncio.to_thread(answers.whole))
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    async def _events(self, generation: _Stream, answers: Answers) -> AsyncGenerator[Any, None]:
        try:
            for chunk in answers.first():
                yield chunk
            async with aclosing(generation.news()) as all_news:
                async for news in all_news:
                    made = None if news is None else answers.piece(*news)
                    if made or news is None:
                        yield made
            self._check_complete(answers)
            for chunk in answers.last():
                yield chunk
        except ApiError as error:
            yield error.body()
        except PyruntimeError as error:
            yield self._refusal(error).body()

    def _check_complete(self, answers: Answers) -> None:
        if not all(request.finish_reason for request in answers.requests):
            raise ApiError(503, "the server was stopped before the end of the answer", code="stopping")

    def end_all(self) -> None:
        """Cuts the answers in progress short; from any thread but the event loop's."""
        for cancel in list(self._active):
            cancel.set()
        self.model._engine.stats()  # has it look at them even if it had nothing to do

    def _chat_ids(self, job: Job) -> list[int]:
        if job.tools and not self.model.knows_tools:
            raise invalid("tools", "cannot be used: the chat template of this model does not know them")
        tools = job.tools and job.tools.functions
        return self.model.chat_ids(job.messages, tools=tools, **job.template)

    # -- tokens

    async def tokenize(self, http: HttpRequest) -> Response:
        """{"prompt": text, "add_special_tokens": true} or {"messages": [...]}, as vLLM has it."""
        body = await read_body(http, self._settings.max_body)
        schemas.check_known(body, {"model", "prompt", "add_special_tokens", "messages", "chat_template_kwargs"})
        self._check_model(body.get("model"))
        if "messages" in body:
            job = Job(None, False, False, {}, messages=schemas.messages(body), template=schemas.template_options(body))
            ids = await asyncio.to_thread(self._chat_ids, job)
        else:
            text, special = schemas.text(body, "prompt"), schemas.flag(body, "add_special_tokens", True)
            ids = await asyncio.to_thread(lambda: self.model.tokenize(text, add_special_tokens=special))
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": self.model.max_context})

    async def detokenize(self, http: HttpRequest) -> Response:
        """{"tokens": [...]}; control tokens are shown."""
        body = await read_body(http, self._settings.max_body)
        schemas.check_known(body, {"model", "tokens"})
        self._check_model(body.get("model"))
        ids = schemas.token_ids(body, "tokens")
        return json_response({"prompt": await asyncio.to_thread(lambda: self.model.detokenize(ids, skip_special=False))})

    # -- the rest

    async def models(self, _: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model_card()]})

    async def one_model(self, http: HttpRequest) -> Response:
        self._check_model(http.path_params["name"])
        return json_response(self._model_card())

    async def health(self, _: HttpRequest) -> Response:
        if self._is_stopping():
            raise ApiError(503, "the server is being stopped", code="stopping")
        return json_response({"status": "ok"})

    async def show_metrics(self, _: HttpRequest) -> Response:
        stats = await asyncio.to_thread(self.model.stats)  # waits for the step that is being run
        return Response(self.metrics.render(stats), media_type="text/plain; version=0.0.4")

    async def page(self, _: HttpRequest) -> Response:
        return Response(self._page, 200, {"content-security-policy": self._policy}, media_type="text/html")

    def _model_card(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": self._created, "owned_by": "pyruntime"}
        return {**card, "max_model_len": self.model.max_context}

    def _check_model(self, name: Any) -> None:
        """No name, or the right one."""
        if name not in (None, "", self.name):
            raise ApiError(
                404, f"the model {str(name)[:80]!r} does not exist, there is {self.name!r}", param="model", code="model_not_found"
            )

    def _count_gone(self) -> None:
        self.metrics.disconnects += 1

    def _refusal(self, error: PyruntimeError) -> ApiError:
        return from_package(error, str(self.model.path))


class _Stream(AsyncStream):
    """A stream of all samples of all prompts."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[Request]], cancel: threading.Event) -> None:
        self._news = _News()
        _Generation.__init__(self, model._engine, Call(prompts, streams=True, cancelled=cancel, listener=self._news.tell))

    async def news(self) -> AsyncGenerator[tuple[int, str] | None, None]:
        """(number of the request, text) in the order in which they are made; None when there was nothing for a while."""
        loop = asyncio.get_running_loop()
        heard = loop.time()
        timer = loop.call_later(QUIET_SECONDS, self._news.tell)
        try:
            while (piece := self._engine.poll(self._call)) is not None:
                if isinstance(piece, tuple):
                    heard = loop.time()
                    yield piece
                    continue
                if loop.time() >= heard + QUIET_SECONDS:
                    heard = loop.time()
                    yield None
                if timer.when() <= loop.time():
                    timer = loop.call_later(QUIET_SECONDS, self._news.tell)
                await self._news.wait()
        finally:
            timer.cancel()


def _http_message(status: int) -> str:
    return {404: "there is no such route", 405: "this route has other methods"}.get(status, f"HTTP error {status}")


def _page() -> tuple[bytes, str]:
    """The chat page and the content security policy that lets only its own script and style run."""
    page = Path(__file__).with_name("chat.html").read_text(encoding="utf-8")

    def source(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert found is not None
        return f"'sha256-{b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

    policy = f"default-src 'none'; img-src data:; connect-src 'self'; script-src {source('script')}; style-src {source('style')}"
    return page.encode(), f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
