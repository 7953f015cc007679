"""Requests that nobody would write, to every route: no 500, no hang, no page lost, and an answer that is JSON of OpenAI's form."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SPARSE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyruntime
from pyruntime.server import Server, Settings

ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
FIELDS = [
    "model", "messages", "prompt", "temperature", "top_p", "n", "max_completion_tokens", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "ignore_eos", "regex", "grammar", "stream", "stream_options", "stop", "stop_token_ids", "seed", "logit_bias",
    "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "echo",
    "presence_penalty", "frequency_penalty", "user", "best_of", "suffix", "tokens", "add_special_tokens", "unknown",
]  # fmt: skip
MESSAGE = {"role": "user", "content": "hi"}
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**70, 1.5, -0.0, 1e308, "", "a", "é🙂", "\x00", "<|im_end|>", [], {}, [1], ["a"], [[1]],
    [[]], [None], {"a": 1}, {"1": 5}, {"1": -1e300}, [96], [-1], "a" * 5000, [5] * 5000, "auto", "required", "none",
    {"include_usage": True}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}, [MESSAGE], [MESSAGE] * 300,
    [{"type": "function", "function": {"name": "f"}}], [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
]  # fmt: skip
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with pyruntime.Model(folder, threads=1, max_context=512, max_queue=64, attention=SPARSE) as model:
        server = Server(model, Settings(name="tiny", max_body=1 << 20), port=0, grace=5)
        thread = threading.Thread(target=server.run)
        thread.start()
        yield server
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
        model.clear_cache()
        stats = model.stats()
        assert (stats["n_running"], stats["n_waiting"], stats["n_sequence"], stats["n_page_free"]) == (0, 0, 0, stats["n_page"])
        assert not server.api._active


@pytest.fixture(scope="module")
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as web:
        yield web


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500 or (answer.status_code == 503 and answer.headers["retry-after"]), answer.text
    if "event-stream" in answer.headers["content-type"]:
        assert answer.text.endswith("data: [DONE]\n\n") and "server_error" not in answer.text
        return
    body = answer.json()
    if answer.status_code >= 400:
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"] and "\n" not in body["error"]["message"] and "panic" not in body["error"]["message"]


FUZZ = settings(max_examples=150, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(route=st.sampled_from(ROUTES), changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_odd_fields(web: httpx.Client, route: str, changes: dict[str, Any]) -> None:
    body: dict[str, Any] = {
        ROUTES[0]: {"messages": [MESSAGE], "max_tokens": 4},
        ROUTES[1]: {"prompt": "hi", "max_tokens": 4},
        ROUTES[2]: {"prompt": "hi"},
        ROUTES[3]: {"tokens": [5]},
    }[route]
    try:
        data = json.dumps({**body, **changes}).encode()
    except ValueError:  # a number of too many digits
        return
    check(web.post(route, content=data, headers={"content-type": "application/json"}))


@FUZZ
@given(route=st.sampled_from([*ROUTES, "/", "/health", "/v1/models", "/metrics"]), data=st.data())
def test_odd_bytes(web: httpx.Client, route: str, data: st.DataObject) -> None:
    """Bodies with bytes exchanged, cut or added; also to routes that take none, by other methods, and with other headers."""
    whole = json.dumps({"messages": [MESSAGE], "prompt": "hi", "max_tokens": 2, "stream": True}).encode()
    at = data.draw(st.integers(0, len(whole)))
    raw = whole[:at] + data.draw(st.binary(max_size=8)) + whole[data.draw(st.integers(at, len(whole))) :]
    kind = data.draw(st.sampled_from(["application/json", "application/json; charset=utf-16", "text/plain", "", "multipart/form-data"]))
    method = data.draw(st.sampled_from(["POST", "POST", "POST", "PUT", "GET", "DELETE"]))
    answer = web.request(method, route, content=raw, headers={"content-type": kind})
    if answer.headers["content-type"].startswith(("application/json", "text/event-stream")):
        check(answer)
    assert answer.status_code < 500


@FUZZ
@given(start=st.binary(max_size=80), lines=st.lists(st.binary(max_size=40), max_size=5))
def test_odd_requests(server: Server, start: bytes, lines: list[bytes]) -> None:
    """What is not HTTP is answered with 4xx or hung up on, and the next client is served."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(start + b"\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n")
        connection.shutdown(socket.SHUT_WR)
        first = b""
        try:
            while len(first) < 12 and (piece := connection.recv(64)):
                first += piece
        except ConnectionResetError:
            pass
        assert not first or first.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), first


def test_it_still_answers(web: httpx.Client) -> None:
    body = {"prompt": "hi", "max_tokens": 4}
    assert web.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] > 0
