"""The server with real clients: the package openai, and plain HTTP for what that would not send."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tiny import CHAT_TEMPLATE, write_tiny_model

import pyruntime
from pyruntime.errors import InvalidArgumentError
from pyruntime.server import Server, Settings
from pyruntime.server.schemas import MAX_MESSAGES
from pyruntime.server.tools import Tools, ToolStream

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
FOREVER = {"max_tokens": 3000, "ignore_eos": True}
TOOLS_TEMPLATE = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("server") / "tiny", max_position_embeddings=4096)
    text = (folder / "tokenizer.json").read_text()
    for ours, json_character in zip("#@<>", "{}[]", strict=True):
        text = text.replace(f'"{ours}":', f'"{json_character}":')
    (folder / "tokenizer.json").write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TOOLS_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(folder, threads=1, max_queue=8) as model:
        yield model
        model.clear_cache()
        assert_idle(model)


@contextmanager
def serving(model: pyruntime.Model, *, grace: int = 5, **settings: Any) -> Iterator[Server]:
    server = Server(model, Settings(**{"name": "tiny", **settings}), port=0, grace=grace)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(model: pyruntime.Model) -> Iterator[Server]:
    with serving(model, max_body=1 << 20) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as web:
        yield web


def assert_idle(model: pyruntime.Model, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while True:
        model.clear_cache()
        stats = model.stats()
        if (stats["n_running"], stats["n_waiting"], stats["n_sequence"], stats["n_page_free"]) == (0, 0, 0, stats["n_page"]):
            return
        assert time.monotonic() < end, stats
        time.sleep(0.02)


def alone(model: pyruntime.Model, messages: list[dict[str, str]], **options: Any) -> str:
    return str(model.chat(messages, **{**GREEDY, **options}).text)


# -- with the package openai


def test_chat(client: openai.OpenAI, model: pyruntime.Model) -> None:
    got = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert got.object == "chat.completion" and got.model == "tiny" and got.id.startswith("chatcmpl-")
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].message.content == alone(model, HELLO)
    n = len(model.chat_ids(HELLO))
    assert got.usage.prompt_tokens == n and got.usage.total_tokens == n + got.usage.completion_tokens
    assert got.usage.prompt_tokens_details.cached_tokens <= n
    assert got.choices[0].finish_reason == ("length" if got.usage.completion_tokens == 24 else "stop")
    assert got._request_id.startswith("req_")


def test_chat_stream(client: openai.OpenAI, model: pyruntime.Model) -> None:
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == alone(model, HELLO)
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens <= 24
    assert len({c.id for c in chunks}) == 1
    plain = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY))
    assert all(c.choices and c.usage is None for c in plain)


def test_completions(client: openai.OpenAI, model: pyruntime.Model) -> None:
    want = model.generate("Once", **GREEDY).text
    assert client.completions.create(model="tiny", prompt="Once", **GREEDY).choices[0].text == want
    assert client.completions.create(model="tiny", prompt=model.tokenize("Once"), **GREEDY).choices[0].text == want
    got = client.completions.create(model="tiny", prompt=["Once", "Twice"], **GREEDY)
    assert [c.text for c in got.choices] == [want, model.generate("Twice", **GREEDY).text]
    assert [c.index for c in got.choices] == [0, 1]
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=["Once", "Twice"], stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in got.choices]


def test_n(client: openai.OpenAI, model: pyruntime.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "seed": 3, "n": 4, "temperature": 1.0}
    want = [c.text for c in model.chat(HELLO, **options)]
    got = client.chat.completions.create(model="tiny", messages=HELLO, **options)
    assert [c.message.content for c in got.choices] == want
    assert got.usage.prompt_tokens == len(model.chat_ids(HELLO))
    texts = [""] * 4
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == want


def test_negative_seed(client: openai.OpenAI) -> None:
    texts = {client.completions.create(model="tiny", prompt="a", max_tokens=12, seed=-5).choices[0].text for _ in range(2)}
    assert len(texts) == 1


def test_chat_logprobs(client: openai.OpenAI, model: pyruntime.Model) -> None:
    plain = dict.fromkeys(range(4), -100)  # no control tokens, which are no text
    want = model.chat(HELLO, logprobs=3, logit_bias=plain, **GREEDY)
    options: dict[str, Any] = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "logit_bias": plain, **GREEDY}
    content = client.chat.completions.create(model="tiny", **options).choices[0].logprobs.content
    assert [t.token for t in content] == [t.text for t in want.logprobs]
    assert [t.logprob for t in content] == pytest.approx([t.logprob for t in want.logprobs])
    assert [[top.token for top in t.top_logprobs] for t in content] == [[text for _, text, _ in t.top] for t in want.logprobs]
    assert bytes(b for t in content for b in t.bytes).decode("utf-8", "replace") == want.text
    streamed = [
        t
        for chunk in client.chat.completions.create(model="tiny", stream=True, **options)
        if chunk.choices[0].logprobs
        for t in chunk.choices[0].logprobs.content
    ]
    assert [t.token for t in streamed] == [t.token for t in content]
    assert client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY).choices[0].logprobs is None


def test_completion_logprobs_and_echo(client: openai.OpenAI, model: pyruntime.Model) -> None:
    got = client.completions.create(model="tiny", prompt="Once", logprobs=2, **GREEDY).choices[0]
    assert got.logprobs.text_offset[0] == 0 and len(got.logprobs.tokens) == len(got.logprobs.token_logprobs)
    assert all(len(top) <= 2 for top in got.logprobs.top_logprobs)
    scored = client.completions.create(model="tiny", prompt="Once", logprobs=1, echo=True, max_tokens=0, temperature=0).choices[0]
    want = model.generate("Once", prompt_logprobs=1, max_tokens=1).prompt_logprobs
    assert scored.text == "Once" and scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.token_logprobs[1:] == pytest.approx([t.logprob for t in want[1:]])
    assert scored.logprobs.text_offset == [0, 1, 2, 3]


def test_stop(client: openai.OpenAI, model: pyruntime.Model) -> None:
    text = alone(model, HELLO, ignore_eos=True)
    stop = text[5:8]
    options: dict[str, Any] = {"messages": HELLO, "stop": [stop], "extra_body": {"ignore_eos": True}, **GREEDY}
    got = client.chat.completions.create(model="tiny", **options).choices[0]
    assert got.message.content == text[: text.index(stop)] and got.finish_reason == "stop"
    streamed = client.chat.completions.create(model="tiny", stream=True, **options)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == got.message.content


def test_response_format(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    schema = WEATHER["function"]["parameters"]
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    for seed in range(3):
        got = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, seed=seed, max_tokens=100)
        assert json.loads(got.choices[0].message.content) in ({"city": "Rome"}, {"city": "Oslo"})
    got = client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"}, max_tokens=40, seed=1)
    assert got.choices[0].message.content.startswith("{")
    with pytest.raises(openai.BadRequestError, match="json_schema"):
        form["json_schema"]["schema"] = {"type": "nothing"}
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)


def test_forced_tools(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance")
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    got = client.chat.completions.create(model="tiny", messages=HELLO, tools=[CLOCK, WEATHER], tool_choice=choice, seed=1)
    call = got.choices[0].message.tool_calls[0]
    assert got.choices[0].finish_reason == "tool_calls" and got.choices[0].message.content is None
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    chunks = list(
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[WEATHER], tool_choice="required", seed=1, stream=True)
    )
    assert not any(c.choices[0].delta.content for c in chunks)
    (call,) = chunks[-1].choices[0].delta.tool_calls
    assert chunks[-1].choices[0].finish_reason == "tool_calls" and call.function.name == "weather" and call.index == 0
    # The conversation goes on: arguments come back as text, which templates want as an object.
    messages: Any = [*HELLO, got.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "cold"}]
    with pytest.raises(openai.BadRequestError, match="content"):  # our template writes m.content, and there is none
        client.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": None}], tools=[WEATHER], max_tokens=4)
    assert client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=4).choices


def test_tools_in_the_prompt(client: openai.OpenAI, web: httpx.Client, model: pyruntime.Model) -> None:
    n = len(model.chat_ids(HELLO))
    counts = [
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[CLOCK], max_tokens=1, **more).usage.prompt_tokens
        for more in ({}, {"tool_choice": "none"})
    ]
    assert counts[0] > n and counts[1] == n


def test_tool_calls_in_text() -> None:
    tools = Tools.parse({"tools": [WEATHER, CLOCK]})
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    for text, rest, n in (
        (f"<tool_call>\n{call}\n</tool_call>", "", 1),
        (f"Let me see. <tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>", "Let me see.", 2),
        (call.replace("arguments", "parameters"), "", 1),
        (f"[TOOL_CALLS][{call}, {call}]", "", 2),
        ('{"name": "launch", "arguments": {}}', '{"name": "launch", "arguments": {}}', 0),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", 0),
        ("2 < 3 and <tool", "2 < 3 and <tool", 0),
    ):
        assert tools is not None
        got, calls = tools.calls(text)
        assert (got, len(calls)) == (rest, n)
        for size in (1, 3, 100):
            stream = ToolStream(tools)
            shown = "".join(stream.push(text[i : i + size]) for i in range(0, len(text), size))
            held, calls = stream.finish()
            assert ((shown + held).strip(), len(calls)) == (rest, n)


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pyruntime"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_errors(client: openai.OpenAI, model: pyruntime.Model) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as error:
        create(model="huge", messages=HELLO)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.BadRequestError) as error:
        create(model="tiny", messages=[{"role": "user", "content": "a" * 5000}])
    assert error.value.code == "context_length_exceeded" and "4096" in str(error.value)
    for wrong, param in (
        ({"temperature": -1}, "temperature"), ({"temperature": 1000}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"),
        ({"n": 1000}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"stop": ["a"] * 17}, "stop"), ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"96": 1}}, None), ({"seed": "one"}, "seed"),
        ({"response_format": {"type": "xml"}}, "response_format"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"), ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"extra_body": {"chat_template_kwargs": {"messages": 1}}}, "chat_template_kwargs"), ({"extra_body": {"colour": 1}}, "colour"),
        ({"extra_body": {"min_tokens": "x"}}, "min_tokens"), ({"extra_body": {"ignore_eos": 1}}, "ignore_eos"),
        ({"modalities": ["audio"]}, "modalities"), ({"extra_body": {"regex": "("}}, None),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError) as error:
            create(model="tiny", messages=HELLO, **wrong)
        assert error.value.type == "invalid_request_error"
        assert param is None or error.value.param == param, (wrong, error.value)
        assert str(model.path) not in str(error.value)


# -- plain HTTP


def test_malformed_bodies(web: httpx.Client) -> None:
    for content in (
        b"", b"[]", b"null", b"3", b"{", b'{"messages": NaN}', b"\xff\xfe{}", b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": ' + b"9" * 10_000 + b"}", b'{"messages": []}', b'{"messages": [3]}',
        b'{"messages": {"role": "user"}}', b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": 3, "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', b'{"temperature": 1e999, "messages": []}',
        json.dumps({"messages": HELLO * (MAX_MESSAGES + 1)}).encode(),
    ):  # fmt: skip
        answer = web.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, content[:80]
        assert answer.json()["error"]["message"]
    answer = web.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_routes_and_methods(web: httpx.Client) -> None:
    assert web.get("/v1/nothing").status_code == 404
    assert web.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert web.get("/v1/chat/completions").status_code == 405
    assert web.get("/health").json() == {"status": "ok"}


def test_large_body(web: httpx.Client, model: pyruntime.Model) -> None:
    body = json.dumps({"prompt": "a" * (3 << 20)}).encode()
    assert web.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}).status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    answer = web.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_slow_body(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.server.http.BODY_SECONDS", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_long_header(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n")
        assert connection.recv(100).split()[1] in (b"400", b"431")


def test_tokens(web: httpx.Client, model: pyruntime.Model) -> None:
    got = web.post("/tokenize", json={"prompt": "Hello", "model": "tiny"}).json()
    assert got == {"tokens": model.tokenize("Hello"), "count": 5, "max_model_len": 4096}
    assert web.post("/detokenize", json={"tokens": got["tokens"]}).json() == {"prompt": "Hello"}
    assert web.post("/tokenize", json={"messages": HELLO}).json()["tokens"] == model.chat_ids(HELLO)
    for route, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": 3}), ("/detokenize", {"tokens": [96]}), ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}), ("/detokenize", {}), ("/tokenize", {"prompt": "a", "path": "/etc/passwd"}),
    ):  # fmt: skip
        assert web.post(route, json=body).status_code == 400, body


def test_metrics(web: httpx.Client, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="Once", **GREEDY)
    text = web.get("/metrics").text
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line), line
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(values["pyruntime_generated_tokens_total"]) > 0
    assert values['pyruntime_time_to_first_token_seconds_bucket{le="+Inf"}'] == values["pyruntime_time_to_first_token_seconds_count"]
    assert int(values['pyruntime_http_responses_total{route="/v1/completions",status="200"}']) > 0


def test_page(web: httpx.Client) -> None:
    answer = web.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src 'sha256-" in answer.headers["content-security-policy"] and "unsafe" not in answer.headers["content-security-policy"]
    assert "innerHTML" not in answer.text and "http" not in answer.text


def test_only_its_own_address(web: httpx.Client) -> None:
    """A web page can have its own name lead to 127.0.0.1; the Host header then shows it."""
    assert web.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert web.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
    assert "access-control-allow-origin" not in web.get("/v1/models", headers={"Origin": "http://evil.example"}).headers


def test_api_key(model: pyruntime.Model) -> None:
    with serving(model, api_key="secret", cors=("http://friend.example",)) as server, httpx.Client(base_url=server.url) as web:
        for wrong in (None, "", "Bearer", "Bearer wrong", "Basic %%"):
            headers = {} if wrong is None else {"Authorization": wrong}
            for route in ("/v1/models", "/", "/metrics", "/nothing", "/tokenize"):
                answer = web.get(route, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert web.get("/health").status_code == 200
        assert web.get("/v1/models", headers={"Authorization": "bearer secret", "Host": "other.example"}).status_code == 200
        basic = base64.b64encode(b"me:secret").decode()
        assert web.get("/", headers={"Authorization": f"Basic {basic}"}).status_code == 200
        assert web.get("/").headers["www-authenticate"].startswith("Basic")
        preflight = {"Origin": "http://friend.example", "Access-Control-Request-Method": "POST"}
        assert web.options("/v1/completions", headers=preflight).headers["access-control-allow-origin"] == "http://friend.example"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=server.url + "/v1", api_key="secret").models.list().data[0].id == "tiny"


def test_a_path_is_no_name(model: pyruntime.Model) -> None:
    with serving(model, name=None) as server:
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "tiny"


def test_refused_addresses(model: pyruntime.Model) -> None:
    with pytest.raises(InvalidArgumentError, match="API key"):
        Server(model, Settings(host="0.0.0.0"), port=0)
    with pytest.raises(InvalidArgumentError, match="API key"):
        Server(model, Settings(api_key=""), port=0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InvalidArgumentError, match="cannot listen"):
        Server(model, Settings(), port=taken.getsockname()[1])


# -- clients that leave, queues that are full, the end


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_cancels(server: Server, web: httpx.Client, model: pyruntime.Model, stream: bool) -> None:
    before = server.api.metrics.disconnects
    body = {"prompt": "Once", "stream": stream, **FOREVER}
    with httpx.Client(base_url=server.url, timeout=httpx.Timeout(20, read=0.5)) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json={**body, "n": 8})
    assert_idle(model)
    assert_soon(lambda: not server.api._active)
    assert server.api.metrics.disconnects == before + 1


def test_client_that_does_not_read(server: Server, model: pyruntime.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.server.http.STALL_SECONDS", 0.3)
    body = json.dumps({"prompt": "Once", "stream": True, "n": 8, "logprobs": 20, **FOREVER}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    with connection:
        connection.sendall(head.encode() + body)
        before = server.api.metrics.disconnects
        assert_soon(lambda: server.api.metrics.disconnects > before)
        assert_idle(model)


def assert_soon(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sign_of_life(server: Server, web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.server.app.QUIET_SECONDS", 0.05)
    with server.api.model._engine.borrow(0), concurrent.futures.ThreadPoolExecutor() as pool:

        def first_lines() -> list[str]:
            with web.stream("POST", "/v1/completions", json={"prompt": "Once", "stream": True, "max_tokens": 2}) as answer:
                lines = answer.iter_lines()
                return [next(lines), next(lines), next(lines)]

        assert pool.submit(first_lines).result(20) == [": ", "", ": "]


def test_full_queue(server: Server, client: openai.OpenAI, model: pyruntime.Model) -> None:
    assert_idle(model)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        with model._engine.borrow(0):  # nothing can begin
            waiting = [pool.submit(client.completions.create, model="tiny", prompt="Once", **GREEDY) for _ in range(8)]
            assert_soon(lambda: model._engine.stats()["n_waiting"] == 8)
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(model="tiny", prompt="Once", **GREEDY)
            assert error.value.response.headers["retry-after"] == "1" and error.value.code == "queue_full"
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model="tiny", prompt="Once", stream=True, **GREEDY)
        assert len({w.result().choices[0].text for w in waiting}) == 1
    assert_soon(lambda: not server.api._active)


def test_many_streams_with_cancels(server: Server, client: openai.OpenAI, model: pyruntime.Model) -> None:
    prompts = [[{"role": "user", "content": "word " * (1 + 7 * i)}] for i in range(6)]
    want = [alone(model, p) for p in prompts]

    def one(i: int) -> bool:
        rng = random.Random(i)
        try:
            stream = client.chat.completions.create(model="tiny", messages=prompts[i % 6], stream=True, **GREEDY)
            text, left = "", rng.choice([1, 5, 1000, 1000])
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                left -= 1
                if not left:
                    stream.close()
                    return False
        except openai.RateLimitError:
            return False
        assert text == want[i % 6]
        return True

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert any(pool.map(one, range(48)))
    assert_idle(model)
    assert_soon(lambda: not server.api._active)


def test_stop_waits_for_answers(model: pyruntime.Model) -> None:
    with serving(model, grace=60) as server, httpx.Client(base_url=server.url, timeout=60) as web:
        body = {"prompt": "Once", "stream": True, "max_tokens": 300, "ignore_eos": True}
        with web.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.stop()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        with pytest.raises(httpx.HTTPError):
            web.get("/health")


def test_stop_has_an_end(model: pyruntime.Model) -> None:
    started = time.monotonic()
    body = {"prompt": "Once", "n": 16, **FOREVER}
    with (
        serving(model, grace=3) as server,
        httpx.Client(base_url=server.url, timeout=60) as web,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        whole = pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=60)
        with web.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert_soon(lambda: len(server.api._active) == 2)
            server.stop()
            assert "the server was stopped" in [line for line in lines if line][-2]
        assert whole.result().status_code == 503
    assert time.monotonic() - started < 20
    assert_idle(model)


def test_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    command = [sys.executable, "-m", "pyruntime.cli", "serve", str(folder), "--port", "0", "--name", "tiny", "-t", "1"]
    command += ["--api-key", f"@{tmp_path / 'key'}", "--device", "cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = next(m for line in process.stderr if (m := re.search(r"served at (http://\S+)", line)))
        try:
            client = openai.OpenAI(base_url=found[1] + "/v1", api_key="secret", timeout=60)
            assert client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY).choices
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and not process.stderr.read()


def test_command_refuses(folder: Path) -> None:
    def error(*arguments: str) -> str:
        model = [] if arguments[0].startswith("/") else [str(folder)]
        done = subprocess.run(
            [sys.executable, "-m", "pyruntime.cli", "serve", *model, "-q", *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "API key" in error("--host", "0.0.0.0")
    assert "cannot listen" in error("--port", "99999")
    with socket.create_server(("127.0.0.1", 0)) as taken:  # said before the model is loaded
        said = error("/no/such/model", "--port", str(taken.getsockname()[1]))
        assert "already in use; another server may be running: choose another port" in said
    assert "--max-body" in error("--max-body", "0")


def test_missing_extra(folder: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from pyruntime.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "serve", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install 'pyruntime[server]'" in done.stderr
