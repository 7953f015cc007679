"""Conversations: what a turn reads, what stays when it is stopped, and files of others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import pyruntime
from pyruntime.conversation import Conversation, kv_path, read_conversation
from pyruntime.errors import ContextLengthError, InvalidArgumentError, UnsupportedModelError
from pyruntime.terminal import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("conversation") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(folder, threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def the_pool_is_left_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"smollm2", "tiny"}.intersection(request.fixturenames):
        model = request.getfixturevalue(name)
        model.clear_cache()
        stats = model.stats()
        assert (stats["n_sequence"], stats["n_page_free"]) == (0, stats["n_page"])


@pytest.fixture
def talk(tiny: pyruntime.Model) -> Iterator[Conversation]:
    yield Conversation(tiny, temperature=0, max_tokens=12, ignore_eos=True)


def n_read(model: pyruntime.Model) -> int:
    """Tokens that were read or fed back since the model was loaded."""
    stats = model.stats()
    return int(stats["n_prefill_token"] + stats["n_decode_token"])


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation.messages]


# ---------------------------------------------------------------- what is read


def test_a_second_turn_reads_only_what_is_new(smollm2: pyruntime.Model) -> None:
    talk = Conversation(smollm2, system="You are a helpful assistant. " * 20, temperature=0, max_tokens=40)
    first = "".join(talk.turn("What is the capital of France?"))
    assert talk.last is not None and "Paris" in first and talk.last.finish_reason == "stop"
    in_cache, before = talk.last.usage.total_tokens - 1, n_read(smollm2)  # the end token was sampled and not read
    "".join(talk.turn("And of Italy?"))
    usage = talk.last.usage
    assert usage.cached_tokens == in_cache > 100
    assert n_read(smollm2) - before == usage.prompt_tokens - in_cache + usage.completion_tokens - 1
    assert usage.prompt_tokens - in_cache < 25
    smollm2.clear_cache()
    alone = smollm2.chat(talk.messages[:-1], temperature=0, max_tokens=40)
    assert alone.text == talk.messages[-1]["content"] and alone.usage.cached_tokens == 0


# ---------------------------------------------------------------- turns


def test_turns_and_undo_and_retry(talk: Conversation, tiny: pyruntime.Model) -> None:
    for call in (talk.undo, talk.retry):
        with pytest.raises(InvalidArgumentError, match="no question yet"):
            call()
    one = "".join(talk.turn("one"))
    two = "".join(talk.turn("two"))
    assert said(talk) == [("user", "one"), ("assistant", one), ("user", "two"), ("assistant", two)]
    assert two == str(tiny.chat(talk.messages[:3], temperature=0, max_tokens=12, ignore_eos=True))
    assert "".join(talk.retry()) == two and len(talk.messages) == 4
    assert talk.undo() == "two" and said(talk) == [("user", "one"), ("assistant", one)]
    assert "".join(talk.turn("two")) == two
    talk.clear()
    assert talk.messages == [] and "".join(talk.turn("one")) == one


def test_system_message(talk: Conversation, tiny: pyruntime.Model) -> None:
    "".join(talk.turn("one"))
    talk.set_system("Be brief.")
    assert talk.system == "Be brief." and said(talk)[:2] == [("system", "Be brief."), ("user", "one")]
    answer = "".join(talk.turn("two"))
    assert answer == str(tiny.chat(talk.messages[:-1], temperature=0, max_tokens=12, ignore_eos=True))
    talk.clear()
    assert said(talk) == [("system", "Be brief.")]
    with pytest.raises(InvalidArgumentError, match="no question yet"):
        talk.undo()
    talk.set_system(None)
    assert talk.messages == [] and talk.system is None


def test_seeds(tiny: pyruntime.Model) -> None:
    """Every answer has a seed of its own, so that /retry gives another one, and the same turns give the same answers."""
    runs = []
    for _ in range(2):
        talk = Conversation(tiny, temperature=1.5, seed=3, max_tokens=20, ignore_eos=True)
        runs.append(["".join(talk.turn("one")), "".join(talk.retry()), "".join(talk.turn("two"))])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]
    first = tiny.chat([{"role": "user", "content": "one"}], temperature=1.5, seed=3, max_tokens=20, ignore_eos=True)
    assert runs[0][0] == first.text


def test_a_stopped_answer_stays(talk: Conversation, tiny: pyruntime.Model) -> None:
    pieces = talk.turn("one")
    begun = next(pieces) + next(pieces)  # type: ignore[call-overload]
    pieces.close()  # type: ignore[attr-defined]
    assert said(talk) == [("user", "one"), ("assistant", begun)]
    assert talk.last is not None and talk.last.finish_reason == "abort"
    answer = "".join(talk.turn("two"))
    assert answer == str(tiny.chat(talk.messages[:-1], temperature=0, max_tokens=12, ignore_eos=True))


def test_stopped_before_the_first_word(talk: Conversation, tiny: pyruntime.Model) -> None:
    """Ctrl-C, or any error, while the question is read: the messages are as before, and what was in the cache still is."""
    "".join(talk.turn("one"))
    before, in_cache = said(talk), talk.n_kept

    def press(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    tiny._engine.batch._max_rows = 16  # the question is many steps
    tiny._session.on_progress = press
    try:
        with pytest.raises(KeyboardInterrupt):
            "".join(talk.turn("two " * 40))
    finally:
        tiny._session.on_progress = None
        tiny._engine.batch._max_rows = 512
    assert said(talk) == before
    "".join(talk.turn("two"))
    assert talk.last is not None and talk.last.usage.cached_tokens >= in_cache - 12


def test_too_long(tiny: pyruntime.Model) -> None:
    talk = Conversation(tiny, temperature=0, ignore_eos=True)
    with pytest.raises(ContextLengthError, match=r"no longer fits: with this message it has \d+ tokens, max_context is 512$"):
        "".join(talk.turn("x" * 500))
    assert talk.messages == [] and not talk.is_full
    "".join(talk.turn("one"))
    assert talk.is_full
    with pytest.raises(ContextLengthError):
        "".join(talk.turn("two"))
    assert talk.undo() == "one"
    "".join(talk.turn("x" * 300))


def test_refused_at_the_start(tiny: pyruntime.Model, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="temperature is -1"):
        Conversation(tiny, temperature=-1)
    folder = write_tiny_model(tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": strict}))
    with pyruntime.Model(folder, threads=1) as model:
        with pytest.raises(InvalidArgumentError, match="no system role"):
            Conversation(model, system="Be brief.")
        talk = Conversation(model)
        with pytest.raises(InvalidArgumentError, match="no system role"):
            talk.set_system("Be brief.")
        assert talk.messages == []
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    with pyruntime.Model(folder, threads=1) as model, pytest.raises(UnsupportedModelError, match="no chat template"):
        Conversation(model)


# ---------------------------------------------------------------- files


def test_save_and_load(talk: Conversation, tiny: pyruntime.Model, tmp_path: Path) -> None:
    talk.set_system("Be brief.")
    "".join(talk.turn('two\nlines, "quotes" and \\ and 🙂'))
    talk.save(tmp_path / "c.json")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved == {"model": tiny.name, "messages": talk.messages}
    other = Conversation(tiny, temperature=0, max_tokens=12, ignore_eos=True)
    assert other.load(tmp_path / "c.json") == tiny.name and other.messages == talk.messages
    assert "".join(other.turn("on")) == "".join(talk.turn("on"))
    talk.clear()
    talk.set_system(None)
    talk.save(tmp_path / "empty.json")
    assert read_conversation(tmp_path / "empty.json") == (tiny.name, [])
    with pytest.raises(InvalidArgumentError, match=r"cannot be written \(No such file or directory\)"):
        talk.save(tmp_path / "no" / "c.json")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([], "expected {"),
        ({"model": "m"}, "expected {"),
        ({"model": 3, "messages": []}, "expected {"),
        ({"model": "m", "messages": {}}, "expected {"),
        ({"model": "m", "messages": [], "exec": "x"}, "nothing else"),
        ({"model": "m", "messages": ["a"]}, "messages[0] must have role and content"),
        ({"model": "m", "messages": [{**USER, "tool_calls": []}, ANSWER]}, "messages[0] must have role and content"),
        ({"model": "m", "messages": [{"role": "user"}, ANSWER]}, "messages[0] must have"),
        ({"model": "m", "messages": [ANSWER]}, "messages[0]['role'] is 'assistant', expected 'user'"),
        ({"model": "m", "messages": [USER, USER]}, "messages[1]['role'] is 'user', expected 'assistant'"),
        (
            {"model": "m", "messages": [USER, ANSWER, {"role": "system", "content": "x"}]},
            "messages[2]['role'] is 'system', expected 'user'",
        ),
        ({"model": "m", "messages": [{"role": [], "content": "x"}]}, "messages[0]['role'] is []"),
        ({"model": "m", "messages": [USER, ANSWER, USER]}, "is a question, expected its answer"),
        ({"model": "m", "messages": [{"role": "user", "content": 5}, ANSWER]}, "messages[0]['content'] must be a text"),
        ({"model": "m", "messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "messages[0]['content'] must be a text"),
        (b"", "is not a saved conversation"),
        (b"{", "is not a saved conversation"),
        (b"\xff\xfe", "is not a saved conversation"),
        (b"[" * 200_000, "is not a saved conversation"),
        (b"__import__('os').abort()", "is not a saved conversation"),
    ],
)
def test_a_file_that_is_no_conversation(value: Any, part: str, talk: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    "".join(talk.turn("one"))
    before = said(talk)
    with pytest.raises(InvalidArgumentError) as error:
        talk.load(file)
    assert str(error.value).startswith(f"{file}: ") and part in str(error.value) and said(talk) == before


def test_files_that_cannot_be_read(talk: Conversation, tmp_path: Path) -> None:
    for path, part in ((tmp_path, "cannot be read"), (tmp_path / "none", "No such file")):
        with pytest.raises(InvalidArgumentError, match=part):
            talk.load(path)
    with (tmp_path / "big").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidArgumentError, match="more than 64 MiB"):
        talk.load(tmp_path / "big")
    if os.path.exists("/dev/zero"):
        with pytest.raises(InvalidArgumentError, match="more than 64 MiB"):
            talk.load(Path("/dev/zero"))


def test_kv_beside_the_conversation(tiny: pyruntime.Model, folder: Path, tmp_path: Path) -> None:
    """A saved chat goes on in another model without being read again, and with the same answer; without the file it is read."""
    talk = Conversation(tiny, system="Be brief.", temperature=0, max_tokens=20)
    "".join(talk.turn("a question of some length"))
    n_token = talk.save(tmp_path / "c.json", kv=True)
    assert n_token == talk.last.usage.total_tokens - 1
    want = "".join(talk.turn("another"))
    n_cached = talk.last.usage.cached_tokens
    with pyruntime.Model(folder, threads=1) as model:
        other = Conversation(model, temperature=0, max_tokens=20)
        assert load(model, other, tmp_path / "c.json").endswith(f"3 messages loaded; {n_token} tokens need not be read again")
        assert "".join(other.turn("another")) == want
        assert other.last.usage.cached_tokens == n_cached > 50
        model.clear_cache()
        kv_path(tmp_path / "c.json").write_bytes(b"damaged")
        assert "is not a KV file" in load(model, other, tmp_path / "c.json")
        assert "".join(other.turn("another")) == want and other.last.usage.cached_tokens == 0
