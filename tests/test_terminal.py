"""`pyruntime chat`: through a pipe, and through a pseudo-terminal as a person would."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import COMMAND, assert_one_line, shell
from tiny import write_tiny_model

import pyruntime
from pyruntime.cli import main
from pyruntime.terminal import printable, read_message, shorten

GREEDY = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("terminal") / "tiny"))


@pytest.fixture(scope="module")
def answers(tiny: str) -> list[str]:
    """What the library answers to "one" and then to "two"."""
    with pyruntime.Model(tiny, threads=1) as model:
        messages, found = [], []
        for text in ("one", "two"):
            messages.append({"role": "user", "content": text})
            found.append(str(model.chat(messages, temperature=0, max_tokens=12, ignore_eos=True)))
            messages.append({"role": "assistant", "content": found[-1]})
        return found


# ---------------------------------------------------------------- messages


def messages(text: str, *, keep_unfinished: bool = True) -> list[tuple[str, bool]]:
    lines = iter(text.split("\n"))

    def read(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    found = []
    while True:
        try:
            found.append(read_message(read, keep_unfinished=keep_unfinished))
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\n two ", [("one", False), ("two", False)]),
        ("one\\\ntwo\\\n\nthree", [("one\ntwo\n".strip(), False), ("three", False)]),
        ('"""\n  one\n\n/two\\\n"""\nthree', [("  one\n\n/two\\", False), ("three", False)]),
        ('"""\n"""', [("", False)]),
        ('say """ aloud', [('say """ aloud', False)]),
        ("/help\n/save  a b", [("/help", True), ("/save  a b", True)]),
        (" /usr/bin", [("/usr/bin", False)]),
        ("/usr\\\nbin", [("/usr\nbin", False)]),
        ("", [("", False)]),
    ],
)
def test_messages(text: str, expected: list[tuple[str, bool]]) -> None:
    assert messages(text) == expected


def test_a_message_that_the_end_cuts_off() -> None:
    assert messages('"""\none') == [("one", False)] and messages("one\\") == [("one", False)]
    assert messages('"""\none', keep_unfinished=False) == [] == messages("one\\", keep_unfinished=False)


def test_what_is_shown_of_the_text_of_others() -> None:
    assert printable("a\x1b[2Jb\nc\x07") == "a [2Jb\nc "
    assert shorten("a\nb") == "a b" and shorten("x" * 61) == "x" * 60 + "..."


# ---------------------------------------------------------------- a pipe


def test_pipe(tiny: str, answers: list[str]) -> None:
    """Answers only on stdout: no prompt, no greeting."""
    assert shell("chat", tiny, "-q", *GREEDY, stdin=b"one\n\ntwo") == (0, "\n".join(answers) + "\n", "")
    code, out, err = shell("chat", tiny, *GREEDY, stdin=b"one\n/exit\ntwo\n")
    assert (code, out) == (0, answers[0] + "\n")
    assert "on cpu" in err and "/help" not in err and "> " not in err and "[cut at max_tokens]" in err


def test_commands(tiny: str, answers: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    lines = [
        "/help",
        "one",
        f"/save {file} --kv",
        "/stats",
        "two",
        "/undo",
        "/retry",
        "/clear",
        f"/load {file}",
        "two",
        "/system Brief.",
        "/system",
    ]
    lines += [
        '/system ""',
        "/attention",
        "/attention full",
        "/clear",
        "/undo",
        "/attention tactic:p=0.75",
        "/attention snap",
        "/fly",
        "/save --kv",
        "/save ~no-such-user/x",
        "/load a\0b",
    ]
    code, out, err = shell("chat", tiny, "-q", *GREEDY, stdin="\n".join(lines).encode())
    assert code == 1  # of the last six
    assert out == "\n".join([answers[0], answers[1], answers[0], answers[1]]) + "\n"
    for part in (
        "/retry             answer", f"{file}: 2 messages saved, ", " tokens in c.json.kv", f"{file}: 2 messages loaded; ",
        "taken back: two", "a new conversation",
        "conversation  2 messages", "last answer   ", "0 of them cached", "system message: Brief.\nsystem message: Brief.",
        "system message: none", "attention: full\nattention: full", "attention: tactic:p=0.75",
    ):  # fmt: skip
        assert part in err
    assert re.findall("pyruntime: error: (.*)", err) == [
        "there is no question yet",
        "attention policy 'snap' is unknown, expected one of 'full', 'tactic', 'recycled', 'streaming', 'quest', 'token_select', 'oracle', "
        "'tactic_recycled'",
        "there is no command /fly: /help lists them, and a space before the / makes it a message",
        "/save needs the name of a file",
        "/save: '~no-such-user/x' cannot be the name of a file",
        "/load: 'a\\x00b' cannot be the name of a file",
    ]
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answers[0]}]
    assert json.loads(file.read_text()) == {"model": tiny, "messages": said}


def test_load_and_system_options(tiny: str, answers: list[str], tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": answers[0]}]
    file.write_text(json.dumps({"model": "another", "messages": said}))
    code, out, err = shell("chat", tiny, "--load", str(file), *GREEDY, stdin=b"two")
    assert (code, out) == (0, answers[1] + "\n") and f"{file}: 2 messages loaded, saved with another" in err
    code, _, err = shell("chat", tiny, "-q", "--load", str(file), "--system", "Brief.", *GREEDY, stdin=f"two\n/save {file}".encode())
    assert code == 0
    assert json.loads(file.read_text())["messages"][:2] == [{"role": "system", "content": "Brief."}, said[0]]


def test_a_conversation_that_is_too_long(tiny: str) -> None:
    code, out, err = shell("chat", tiny, *GREEDY, "--max-context", "128", stdin=b"one\n" + b"x" * 90 + b"\n/undo\nyes\n")
    assert code == 1 and out.count("\n") >= 2
    assert re.search(
        r"error: the conversation no longer fits: with this message it has \d+ tokens, max_context is 128; /undo takes back the last "
        "exchange, /clear all of them\n",
        err,
    )
    code, out, err = shell("chat", tiny, "--temperature", "0", "--ignore-eos", "--max-context", "128", stdin=b"one")
    assert code == 0 and "[the context of 128 tokens is full: /undo takes back" in err


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "part"),
    [
        (["TINY", "--temperature", "-3"], b"", 2, "temperature is -3.0"),
        (["TINY", "--load", "/no/such"], b"", 2, "/no/such: cannot be read (No such file or directory)"),
        (["TINY", "--device", "tpu"], b"", 2, "device is 'tpu'"),
        (["./nowhere"], b"", 1, "./nowhere: no such file"),
        (["TINY"], b"a\xff\n", 2, "stdin: is not UTF-8 text (byte 1)"),
    ],
)
def test_errors(arguments: list[str], stdin: bytes, code: int, part: str, tiny: str) -> None:
    done = shell("chat", *[tiny if word == "TINY" else word for word in arguments], "-q", stdin=stdin, PYTHONIOENCODING="utf-8:strict")
    assert done[:2] == (code, "")
    assert_one_line(done[2], part)


def test_closed_stdin(tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", tiny, "-q"]) == 2
    assert_one_line(capsys.readouterr().err, "stdin is closed")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", tiny, "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_in_a_pipe(tmp_path: Path) -> None:
    """Nobody is at the prompt that it would go back to."""
    model = write_tiny_model(tmp_path / "long", max_position_embeddings=1 << 20)
    options = ["-q", "--temperature", "0", "--ignore-eos", "--max-context", "200000", "-t", "1"]
    with subprocess.Popen([*COMMAND, "chat", str(model), *options], stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.wait(30), process.stderr.read()) == (130, b"\npyruntime: stopped\n")


# ---------------------------------------------------------------- a terminal


_PASTE_MODE = re.compile("\x1b\\[\\?2004[hl]\r?")  # readline turns bracketed paste on for every line, and off after it


class Pty:
    """`pyruntime chat` on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, stdout: int | None = None) -> None:
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "chat", *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C becomes SIGINT
            env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull, "HF_HUB_OFFLINE": "1"},
        )
        os.close(slave)
        self.seen = ""  # what has come since the last send

    def wait(self, part: str, seconds: float = 60, *, and_more: int = 0) -> str:
        """Reads until `part` and so many characters after it have come; returns all since the last send."""
        import select

        end = time.monotonic() + seconds
        while part not in self.seen or len(self.seen.partition(part)[2]) < and_more:
            assert time.monotonic() < end, f"no {part!r} in {self.seen[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 1 << 16)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"it ended without {part!r}: {self.seen[-2000:]!r}"
                self.seen = _PASTE_MODE.sub("", self.seen + data.decode(errors="replace"))
        return self.seen

    def send(self, text: str) -> None:
        self.seen = ""
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, once the program sleeps: a signal between two of its reads is seen by Python after the next key only."""
        asleep, end = 0, time.monotonic() + 60
        while asleep < 5 and time.monotonic() < end:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.01)
        self.send("\x03")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminals() -> Iterator[list[Pty]]:
    opened: list[Pty] = []
    yield opened
    for one in opened:
        one.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_terminal(tiny: str, answers: list[str], terminals: list[Pty], tmp_path: Path) -> None:
    t = Pty(tiny, *GREEDY)
    terminals.append(t)
    assert "/help lists the commands" in t.wait("> ")
    t.send("one\n")
    t.wait("[cut at max_tokens]\r\n> ")
    t.send("half a li")
    t.wait("half a li")
    t.interrupt()  # the line is gone
    t.wait("\n> ")
    t.send('"""\nhalf\n')
    t.wait("half\r\n. ")
    t.interrupt()  # and so is a block
    t.wait("\n> ")
    t.send("\x1b[200~two\n/lines\x1b[201~\n")  # what a terminal sends when somebody pastes
    t.wait("[cut at max_tokens]\r\n> ")
    t.send('"""\nof\n three\n"""\n')
    t.wait("[cut at max_tokens]\r\n> ")
    t.send("goes \\\non\n")
    t.wait("[cut at max_tokens]\r\n> ")
    t.send("\x1b[A\x1b[A\x1b[A\x01x\x05 not\x15/attention snap\n")  # line editing: up, to the start, to the end, away
    t.wait("'tactic_recycled'\r\n> ")
    t.send(f"/save {tmp_path / 'c.json'}\n")
    t.wait("8 messages saved\r\n> ")
    t.send("\x04")  # Ctrl-D
    assert t.process.wait(30) == 0
    saved = json.loads((tmp_path / "c.json").read_text())["messages"]
    assert [m["content"] for m in saved[::2]] == ["one", "two\n/lines", "of\n three", "goes \non"]
    assert saved[1]["content"] == answers[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(terminals: list[Pty], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "long", max_position_embeddings=1 << 20)
    t = Pty(str(model), "--temperature", "0", "--ignore-eos", "--max-context", "200000", "-t", "1")
    terminals.append(t)
    t.wait("> ")
    for n in (2, 4):
        t.send("go on\n")
        t.wait("go on\r\n", and_more=100)
        t.send("\x03")
        t.wait("[stopped]\r\n> ")
        t.send(f"/save {tmp_path / 'c.json'}\n")
        t.wait(f"{n} messages saved\r\n> ")
        assert len(json.loads((tmp_path / "c.json").read_text())["messages"][-1]["content"]) > 10
    long = [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "y"}]  # Ctrl-C while it is read
    (tmp_path / "long.json").write_text(json.dumps({"model": "another", "messages": long}))
    t.send(f"/load {tmp_path / 'long.json'}\n")
    t.wait("2 messages loaded, saved with another\r\n> ")
    t.send("go on\n")
    t.wait("go on\r\n")
    time.sleep(1.0)
    t.send("\x03")
    t.wait("[stopped before the first word: the question is taken back]\r\n> ")
    t.send("/stats\n")
    t.wait("conversation  2 messages")
    t.send("/exit\n")
    assert t.process.wait(30) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_typing_into_a_file(tiny: str, answers: list[str], terminals: list[Pty], tmp_path: Path) -> None:
    """stdin is a terminal and stdout is not: prompts on stderr, answers alone in the file."""
    with (tmp_path / "out").open("wb") as out:
        t = Pty(tiny, *GREEDY, "-q", stdout=out.fileno())
        terminals.append(t)
        t.wait("> ")
        t.send("one\n")
        t.wait("> ")
        t.send("\x04")
        assert t.process.wait(30) == 0
    assert (tmp_path / "out").read_text() == answers[0] + "\n"


def test_a_conversation_with_the_real_model(smollm2_gguf: Path) -> None:
    code, out, _ = shell("chat", str(smollm2_gguf), "--temperature", "0", stdin=b"What is the capital of France?\nAnd of Italy?")
    assert code == 0 and "Paris" in out and "Rome" in out
