"""The `pyruntime` command: what it prints where, and its exit codes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import pyruntime
from pyruntime.cli import main

COMMAND = [sys.executable, "-m", "pyruntime.cli"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture(scope="module")
def made(tiny: str) -> dict[str, str]:
    """What the library answers to "Hello", plain and as a chat, greedy, 12 tokens."""
    with pyruntime.Model(tiny, threads=1) as model:
        plain = model.generate("Hello", temperature=0, max_tokens=12)
        chat = model.chat([{"role": "user", "content": "Hello"}], temperature=0, max_tokens=12)
        return {"plain": str(plain), "chat": str(chat)}


def shell(*arguments: str, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the real command."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=120, env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def assert_one_line(err: str, *parts: str) -> None:
    """An error: one line for people, never a traceback."""
    assert err.startswith("pyruntime: error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in err


# ---------------------------------------------------------------- run


def test_the_demo_command(smollm2_gguf: Path) -> None:
    code, out, err = shell("run", "smollm2-135m", "--chat", "--temperature", "0", "What is the capital of France?", PYRUNTIME_OFFLINE="1")
    assert code == 0 and "Paris" in out and out.endswith("\n") and out.count("\n") == 1
    assert "smollm2-135m on cpu" in err and "tok/s" in err and "stop]" in err


def orders() -> list[tuple[str, ...]]:
    """Every order of model, prompt and options in which the model comes before the prompt."""
    groups = [("MODEL",), ("Hello",), ("--chat",), ("--temperature", "0"), ("--max-tokens", "12", "-q")]
    found = [tuple(itertools.chain(*order)) for order in itertools.permutations(groups)]
    return [order for order in found if order.index("MODEL") < order.index("Hello")][::4]


@pytest.mark.parametrize("order", orders(), ids=" ".join)
def test_any_order_of_arguments(tiny: str, made: dict[str, str], order: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *[tiny if word == "MODEL" else word for word in order]]) == 0
    assert capsys.readouterr() == (made["chat"] + "\n", "")


def test_plain_and_noisy(tiny: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", tiny, "Hello", "--temperature", "0", "--max-tokens", "12", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == made["plain"] + "\n"
    assert "on cpu, 1 threads, bf16, max_context 512" in err and "5 prompt tokens" in err and "12 new tokens" in err and "length]" in err


def test_a_prompt_that_looks_like_an_option(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pyruntime.Model(tiny, threads=1) as model:
        expected = str(model.generate("--chat", temperature=0, max_tokens=5)) + "\n"
    options = ["-q", "--temperature", "0", "--max-tokens", "5"]
    for arguments in ([tiny, *options, "--", "--chat"], [*options, tiny, "--", "--chat"]):
        assert main(["run", *arguments]) == 0
        assert capsys.readouterr().out == expected


def test_prompt_from_stdin_and_file(tiny: str, made: dict[str, str], tmp_path: Path) -> None:
    options = ("-q", "--temperature", "0", "--max-tokens", "12")
    assert shell("run", tiny, *options, stdin=b"Hello") == (0, made["plain"] + "\n", "")
    assert shell("run", tiny, *options, "-", stdin=b"Hello") == (0, made["plain"] + "\n", "")
    (tmp_path / "f.txt").write_text("Once, long ago.")
    with pyruntime.Model(tiny, threads=1) as model:
        expected = str(model.generate("Once, long ago.\n\nHello", temperature=0, max_tokens=12))
    assert shell("run", tiny, *options, "Hello", "--file", str(tmp_path / "f.txt")) == (0, expected + "\n", "")


def test_run_json(tiny: str, made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", tiny, "Hello", "--json", "-q", "--temperature", "0", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["text"] == made["plain"] and err == "" and out.count("\n") == 1
    assert report["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "cached_tokens": 0} and report["finish_reason"] == "length"
    assert len(report["token_ids"]) == 12 and set(report["timings"]) >= {"time_to_first_token", "decode_tok_s"}


def test_every_sampling_option(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--temperature 0.8 --top-k 20 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.1 --frequency-penalty 0.1 "
        "--seed 3 --max-tokens 15 --ignore-eos"
    )
    assert main(["run", tiny, "Hello", "-q", *options.split(), "--stop", "zzz", "--stop", "qqq"]) == 0
    with pyruntime.Model(tiny, threads=1) as model:
        expected = model.generate(
            "Hello", temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1,
            seed=3, max_tokens=15, ignore_eos=True, stop=["zzz", "qqq"],
        )  # fmt: skip
    assert capsys.readouterr().out == expected.text + "\n"


def test_output_of_a_form(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line or from a file; what is wrong with it is said in one line."""
    pytest.importorskip("llguidance")
    pattern = tmp_path / "pattern.txt"
    pattern.write_text("(red|green) [0-9]{2}", encoding="utf-8")
    for options in (
        ["--regex", "(red|green) [0-9]{2}"],
        ["--regex", f"@{pattern}"],
        ["--grammar", 'start: ("red" | "green") " " /[0-9]{2}/'],
    ):
        assert main(["run", tiny, "Hello", "-q", "--temperature", "0", *options]) == 0
        out = capsys.readouterr().out
        assert out[:-4] in ("red", "green") and out[-3:-1].isdigit()
    assert main(["run", tiny, "Hello", "-q", "--json-schema", '{"enum": [12, 34]}', "--min-tokens", "1"]) == 0
    assert capsys.readouterr().out in ("12\n", "34\n")
    for wrong, part in ((["--json-schema", "{"], "json_schema is not JSON"), (["--regex", f"@{tmp_path}/none"], "cannot be read")):
        assert main(["run", tiny, "Hello", "-q", *wrong]) == 2
        assert_one_line(capsys.readouterr().err, part)


def test_system_message(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", tiny, "Hello", "--chat", "--system", "Be brief.", "-q", "--temperature", "0", "--max-tokens", "12"]) == 0
    with pyruntime.Model(tiny, threads=1) as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        assert capsys.readouterr().out == str(model.chat(messages, temperature=0, max_tokens=12)) + "\n"


# ---------------------------------------------------------------- the other commands


def test_pull(tiny: str) -> None:
    assert shell("pull", tiny) == (0, tiny + "\n", "")


def test_pull_from_the_cache(smollm2_gguf: Path) -> None:
    assert shell("pull", "smollm2-135m", PYRUNTIME_OFFLINE="1")[:2] == (0, f"{smollm2_gguf}\n")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("smollm2-135m ") for line in lines)
    assert main(["list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == len(lines) and {"name", "repo", "license", "gated", "size_gb", "context"} <= set(entries[0])


def test_info(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("build", "devices", "environment", "cpu", "MiB free", "PYRUNTIME_THREADS", "version"))
    assert main(["info", tiny, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"build", "devices", "environment", "model"}
    assert report["model"]["kind"] == "safetensors" and report["model"]["n_layer"] == 2 and report["model"]["context"] == 512
    assert report["devices"][0]["id"] == "cpu" and report["devices"][0]["usable"] is True
    assert main(["info", tiny]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_perplexity(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox, jumps over the lazy dog. " * 5)
    with pyruntime.Model(tiny, threads=1) as model:
        expected = model.perplexity(file.read_text(), max_tokens=100)
    assert main(["perplexity", tiny, "--file", str(file), "--tokens", "100", "-q"]) == 0
    assert capsys.readouterr() == (f"{expected:.4f}\n", "")
    assert main(["perplexity", tiny, "--file", str(file), "--tokens", "100", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["perplexity"] == pytest.approx(expected, rel=1e-9) and report["tokens"] == 100
    assert main(["perplexity", tiny, "--file", str(file)]) == 0
    out, err = capsys.readouterr()
    assert float(out) > 1 and "230 of 230 tokens" in err


def test_bench(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["bench", tiny, "-p", "20", "-n", "3", "-r", "2", "-q", "-t", "1"]
    assert main([*base, "-o", "json", "-d", "70", "-b", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in rows] == ["pp20 @ d70 b2", "tg3 @ d70 b2"]
    assert all(len(row["tok_s"]) == 2 and row["tok_s_mean"] > 0 for row in rows)
    assert main([*base, "-o", "csv"]) == 0
    table = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert table[0] == ["test", "tok_s_mean", "tok_s_sd"] and [row[0] for row in table[1:]] == ["pp20", "tg3"]
    assert main(base) == 0
    assert "| pp20 | " in capsys.readouterr().out


# ---------------------------------------------------------------- errors


BAD: dict[str, tuple[list[str], int, list[str]]] = {
    "unknown model": (["run", "smolm2-135m", "Hi"], 1, ["'smolm2-135m'", "did you mean smollm2-135m"]),
    "unknown model of pull": (["pull", "no-such-model"], 1, ["'no-such-model'", "pyruntime list"]),
    "missing path": (["run", "./nowhere", "Hi"], 1, ["./nowhere: no such file or folder"]),
    "not fetched, offline": (["info", "qwen3-0.6b"], 1, ["Qwen/Qwen3-0.6B", "offline mode is on"]),
    "no cuda": (["run", "TINY", "Hi", "--device", "cuda:77"], 1, ["device 'cuda:77'", "available: cpu"]),
    "bad device": (["run", "TINY", "Hi", "--device", "tpu"], 2, ["device is 'tpu'"]),
    "bad dtype": (["run", "TINY", "Hi", "--dtype", "int8"], 2, ["dtype is 'int8'"]),
    "context": (["run", "TINY", "Hi", "--max-context", "100000"], 1, ["max_context is 100000", "512"]),
    "prompt too long": (["run", "TINY", "x" * 600, "-q"], 1, ["600 tokens", "512"]),
    "bad value": (["run", "TINY", "Hi", "--temperature", "-3", "-q"], 2, ["temperature is -3.0"]),
    "system without chat": (["run", "TINY", "Hi", "--system", "x"], 2, ["--system needs --chat"]),
    "empty prompt": (["run", "TINY", "", "-q"], 2, ["prompt is empty"]),
    "missing file": (["run", "TINY", "Hi", "--file", "/no/such/file"], 2, ["/no/such/file: cannot be read (No such file or directory)"]),
    "file is a folder": (["perplexity", "TINY", "--file", "/"], 2, ["/: cannot be read"]),
    "file is not text": (["perplexity", "TINY", "--file", "BINARY"], 2, ["is not UTF-8 text (byte 1)"]),
    "too few tokens": (["perplexity", "TINY", "--file", "SHORT", "-q"], 2, ["at least 2 tokens"]),
    "too many tokens": (["perplexity", "TINY", "--file", "LONG", "--tokens", "999", "-q"], 2, ["max_tokens is 999"]),
    "bench too long": (["bench", "TINY", "-p", "600", "-q"], 2, ["does not fit max_context 512"]),
    "bench negative": (["bench", "TINY", "-r", "0", "-q"], 2, ["-r is 0, expected at least 1"]),
    "bench too many": (["bench", "TINY", "-p", "512", "-n", "0", "-b", "9", "-q"], 1, ["72", "64"]),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_in_process(
    what: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRUNTIME_OFFLINE", "1")
    monkeypatch.setenv("PYRUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    files = {"TINY": tiny, "BINARY": str(tmp_path / "binary"), "SHORT": str(tmp_path / "short"), "LONG": str(tmp_path / "long")}
    (tmp_path / "binary").write_bytes(b"a\xff\xfe")
    (tmp_path / "short").write_text("a")
    (tmp_path / "long").write_text("abcdef")
    arguments, code, parts = BAD[what]
    assert main([files.get(word, word) for word in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, *parts)


def test_errors_of_the_real_command(tiny: str, tmp_path: Path) -> None:
    code, out, err = shell("run", "smolm2-135m", "Hi")
    assert (code, out) == (1, "")
    assert_one_line(err, "did you mean smollm2-135m")
    for mode, part in (("strict", "stdin: is not UTF-8 text (byte 1)"), ("surrogateescape", "which no UTF-8 text can hold")):
        code, out, err = shell("run", tiny, "-q", stdin=b"a\xff\xfe", PYTHONIOENCODING=f"utf-8:{mode}")
        assert (code, out) == (2, "")
        assert_one_line(err, part)
    code, out, err = shell("run", tiny, "Hi", PYRUNTIME_THREADS="many")
    assert (code, out) == (2, "")
    assert_one_line(err, "PYRUNTIME_THREADS must be a number from 1 to 1024, is 'many'")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "model.safetensors").chmod(0)
    code, out, err = shell("run", str(folder), "Hi")
    assert (code, out) == (1, "")
    assert_one_line(err, "model.safetensors", "Permission denied")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "required: model"),
        (["run", "TINY", "Hi", "--bogus"], "unrecognized arguments: --bogus"),
        (["run", "TINY", "Hi", "there"], "unrecognized arguments: there"),
        (["run", "TINY", "--chat", "Hi", "there"], "unrecognized arguments: there"),
        (["run", "TINY", "Hi", "--max-tokens", "many"], "invalid int value: 'many'"),
        (["bench", "TINY", "-o", "xml"], "invalid choice: 'xml'"),
        (["perplexity", "TINY"], "required: --file"),
    ],
)
def test_wrong_usage(arguments: list[str], part: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([tiny if word == "TINY" else word for word in arguments])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and part in err and err.startswith("usage: pyruntime")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    text = help_of()
    for word in ("run", "chat", "pull", "list", "info", "perplexity", "bench", "examples:", "smollm2-135m"):
        assert word in text
    for name in ("run", "chat", "pull", "list", "info", "perplexity", "bench"):
        assert f"usage: pyruntime {name}" in help_of(name)
    assert all(option in help_of("run") for option in ("--chat", "--temperature", "--max-tokens", "--stop", "--device", "--json"))
    assert all(option in help_of("chat") for option in ("--system", "--load", "--temperature", "--stop", "--device"))
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"pyruntime {pyruntime.__version__}\n"


@pytest.mark.parametrize("arguments", [["list"], ["run", "TINY", "Hi", "-q", "--ignore-eos"]])
def test_a_reader_that_goes_away(arguments: list[str], tiny: str) -> None:
    """`pyruntime ... | head -0`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    command: list[Any] = [*COMMAND, *[tiny if word == "TINY" else word for word in arguments]]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_written(tiny: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "run", tiny, "Hi", "-q", "--max-tokens", "3"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode != 0 and b"Traceback" not in done.stderr and b"No space left" in done.stderr


def test_a_terminal_that_is_not_utf8(tiny: str) -> None:
    """Bytes that are no character in its encoding come out as ?, and JSON is ASCII anyway."""
    code, out, err = shell("run", tiny, "Hi", "-q", "--seed", "1", "--max-tokens", "300", "--ignore-eos", PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "") and out.isascii()
    code, out, err = shell("run", tiny, "Hi", "-q", "--json", "--seed", "1", "--max-tokens", "300", PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "") and json.loads(out)["seed"] == 1


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_standard_streams(tiny: str) -> None:
    run = " ".join([*COMMAND, "run", tiny, "-q", "--max-tokens", "3"])
    done = subprocess.run(f"{run} <&-", shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert_one_line(done.stderr, "no prompt")
    done = subprocess.run(f"{run} Hi >&-", shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
