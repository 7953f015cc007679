"""Output that follows a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import pyruntime
from pyruntime.errors import InvalidArgumentError

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyruntime.Model]:
    """Random weights over single characters, braces among them: whatever is right about its output is the constraint's doing."""
    folder = write_tiny_model(tmp_path_factory.mktemp("constraint") / "tiny")
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for ours, json_character in zip("#@<>", "{}[]", strict=True):
        text = text.replace(f'"{ours}":', f'"{json_character}":')
    path.write_text(text, encoding="utf-8")
    with pyruntime.Model(folder, threads=1) as model:
        yield model


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Everything in it is bounded, so that every output comes to its end."""
    kinds = ["integer", "string", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (depth < 2))
    low = rng.randint(-50, 50)
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
    if kind == "string":
        n = rng.randint(0, 4)
        return {"type": "string", "minLength": n, "maxLength": n + rng.randint(0, 6)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2, 3.5, True, None, ""], 3)}
    if kind == "const":
        return {"const": rng.choice(["a b", 7, [1, "x"], {"k": False}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^(yes|no)$", "^[A-Z][0-9]{3}$"])}
    if kind == "array":
        n = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": n, "maxItems": n + 1}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample("abcdefg", rng.randint(0, 3))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names[:2], "additionalProperties": False}
    return {"type": kind}


def test_two_hundred_random_schemas(tiny: pyruntime.Model) -> None:
    """Always JSON, and what the package jsonschema accepts."""
    rng = random.Random(5)
    for i in range(200):
        schema = random_schema(rng)
        made = tiny.generate("json", json_schema=schema, seed=i, temperature=1.0)
        assert made.finish_reason == "stop", (schema, made.text)
        jsonschema.validate(json.loads(made.text), schema)


@pytest.mark.parametrize("pattern", ["[0-9]{3}-[0-9]{4}", "(yes|no)", "a+b", "", "[A-Z][a-z]{1,5}( [A-Z][a-z]{1,5}){2}"])
def test_regex(tiny: pyruntime.Model, pattern: str) -> None:
    for temperature, seed in ((0.0, 0), (1.0, 1), (2.0, 2)):
        made = tiny.generate("abc", regex=pattern, temperature=temperature, seed=seed, max_tokens=300)
        whole = re.fullmatch(pattern, made.text)
        assert whole or (made.finish_reason == "length" and pattern == "a+b"), made
        assert made.finish_reason == "length" or made.stop_reason is None


def test_grammar(tiny: pyruntime.Model) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'
    for seed in range(5):
        made = tiny.generate("abc", grammar=grammar, seed=seed, max_tokens=60)
        assert re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)*\+?", made.text) and (made.text[-1] != "+" or made.finish_reason == "length")


def test_in_every_company(tiny: pyruntime.Model) -> None:
    """Beside other requests, as samples, streamed, and with the options that forbid or allow tokens themselves."""
    options: dict[str, Any] = {"regex": "(red|green|blue) [0-9]{2}", "seed": 3, "temperature": 1.5}
    alone = tiny.generate("abc", **options)
    assert tiny.generate(["x", "abc", "yz"], **options)[1].text == alone.text == "".join(tiny.generate("abc", stream=True, **options))
    samples = tiny.generate("abc", n=6, **options)
    assert samples[0].text == alone.text and len({s.text for s in samples}) > 1
    assert all(re.fullmatch(options["regex"], s.text) for s in samples)
    assert tiny.generate("abc", ignore_eos=True, **options).text == alone.text
    assert re.fullmatch(options["regex"], tiny.generate("abc", min_tokens=50, **options).text)  # complete is complete
    digit = tiny.tokenize("7")[0]
    assert tiny.generate("abc", logit_bias={digit: 1000.0}, **options).text.endswith(" 77")
    scored = tiny.generate("abc", logprobs=2, **options)
    assert scored.text == alone.text and scored.logprobs is not None and len(scored.logprobs) == len(scored.token_ids)


def test_a_real_model_fills_in_a_form(smollm2: pyruntime.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"type": "string", "maxLength": 20}},
        "required": ["city", "country"],
    }
    ask = [{"role": "user", "content": "Name the capital of France and its country as JSON."}]
    made = smollm2.chat(ask, json_schema=json.dumps(schema), temperature=0, max_tokens=60)
    value = json.loads(made.text)
    jsonschema.validate(value, schema)
    assert "Paris" in value["city"] and made.finish_reason == "stop"
    assert json.loads(smollm2.chat(ask, json_schema={"type": "boolean"}, temperature=0).text) in (True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
        ({"grammar": "start: nothing"}, "grammar cannot be used: .*nothing"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": {"type": "no such type"}}, "json_schema cannot be used"),
        ({"json_schema": {"minimum": float}}, "json_schema is not JSON"),
        ({"json_schema": [1]}, "json_schema is list, expected text"),
        ({"regex": 5}, "regex is int, expected text"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex and grammar are given: at most one"),
    ],
)
def test_wrong_constraints(tiny: pyruntime.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.compile(message, re.DOTALL)):
        tiny.generate("abc", **options)


def test_when_nothing_is_allowed(tiny: pyruntime.Model) -> None:
    """Both the schema and the caller forbid: an error that says so, and the model goes on."""
    ban = {t: -float("inf") for t in tiny.tokenize("ab")}
    with pytest.raises(InvalidArgumentError, match="the output cannot go on as regex says"):
        tiny.generate("abc", regex="[ab]{3}", logit_bias=ban)
    assert tiny.generate("abc", regex="[ab]{3}", temperature=0).finish_reason == "stop"


def test_without_the_package(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    code = """
import sys
sys.modules["llguidance"] = None
import pyruntime
with pyruntime.Model(sys.argv[1], threads=1) as model:
    try:
        model.generate("abc", regex="a")
    except pyruntime.UnsupportedModelError as error:
        print(error)
    print(model.generate("abc", max_tokens=2).finish_reason)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "json_schema, regex and grammar need the package llguidance: pip install 'pyruntime[grammar]'", "length"
    ], done.stderr  # fmt: skip
