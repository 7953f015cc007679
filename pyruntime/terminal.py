"""`pyruntime chat`: a conversation in the terminal. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .conversation import kv_path
from .errors import ContextLengthError, InvalidArgumentError, PyruntimeError

if TYPE_CHECKING:
    from .conversation import Conversation
    from .model import Model

QUOTES = '"""'
PROMPT, MORE = "> ", ". "
HELP = f"""\
/help              this text
/system [TEXT]     show or set the system message; /system "" removes it
/attention [NAME]  show or set the attention policy
/stats             tokens, speed and memory
/save FILE         write the conversation as JSON; with --kv also FILE.kv, so that /load need not read it again
/load FILE         go on from a saved conversation
/retry             answer the last question again
/undo              take the last question and its answer back
/clear             forget all but the system message
/exit              leave; so does Ctrl-D
A line that ends in \\ goes on in the next one. A line of {QUOTES} opens a text of several lines, another one sends it. Pasted lines stay
one message. A space before a / makes the line a message. Ctrl-C stops an answer, or clears the line."""


def chat(model: Model, conversation: Conversation, *, quiet: bool = False) -> int:
    """Reads messages and commands until the end of stdin or /exit; returns the exit code.

    At a terminal, errors and Ctrl-C end a turn. Otherwise the rest is still answered after an error and the code is 1; Ctrl-C goes through.
    """
    if sys.stdin is None:
        raise InvalidArgumentError("stdin is closed: there is nobody to chat with")
    return _Terminal(model, conversation, quiet=quiet).loop()


class _Terminal:
    def __init__(self, model: Model, conversation: Conversation, *, quiet: bool) -> None:
        self._model, self._conversation, self._quiet = model, conversation, quiet
        self._is_terminal = sys.stdin.isatty()
        self._read = _line_reader(self._is_terminal)
        self._commands: dict[str, Callable[[str], bool | None]] = {
            "help": lambda _: self._note(HELP),
            "system": self._system,
            "attention": self._attention,
            "stats": lambda _: self._note(_stats(self._model, self._conversation)),
            "save": self._save,
            "load": self._load,
            "retry": lambda _: self._show(self._conversation.retry()),
            "undo": self._undo,
            "clear": self._clear,
            "exit": lambda _: True,
        }

    def loop(self) -> int:
        if self._is_terminal and not self._quiet:
            self._note("/help lists the commands, Ctrl-D leaves")
        code = 0
        while True:
            try:
                text, is_command = read_message(self._read, keep_unfinished=not self._is_terminal)
                if is_command:
                    if self._command(text):
                        return code
                elif text.strip():
                    self._show(self._conversation.turn(text))
            except EOFError:
                if self._is_terminal:
                    self._note("")
                return code
            except UnicodeDecodeError as error:
                where = f"stdin: is not UTF-8 text (byte {error.start})"
                if not self._is_terminal:
                    raise InvalidArgumentError(where) from None
                self._note(f"pyruntime: error: {where}")
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._note("")
            except PyruntimeError as error:
                code = 0 if self._is_terminal else 1
                advice = "; /undo takes back the last exchange, /clear all of them" if isinstance(error, ContextLengthError) else ""
                self._note(f"pyruntime: error: {error}{advice}")

    def _command(self, line: str) -> bool | None:
        """True: leave."""
        word, _, argument = line[1:].partition(" ")
        if word not in self._commands:
            raise InvalidArgumentError(f"there is no command /{word}: /help lists them, and a space before the / makes it a message")
        return self._commands[word](argument.strip())

    def _show(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes. At a terminal Ctrl-C ends it, and no more."""
        before = self._conversation.last
        stopped = begun = False
        with closing(pieces):  # type: ignore[type-var]
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
                    begun = True
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                stopped = True
        done = self._conversation.last
        if begun or done is not before:
            print(flush=True)
        elif stopped:
            self._note("")  # the ^C has a line of its own
        if self._quiet and not self._is_terminal:
            return
        if stopped:
            self._note("[stopped]" if done is not before else "[stopped before the first word: the question is taken back]")
        elif self._conversation.is_full:
            self._note(f"[the context of {self._model.max_context} tokens is full: /undo takes back this exchange, /clear all of them]")
        elif done is not None and done.finish_reason == "length":
            self._note("[cut at max_tokens]")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text in ('""', "''") else text)
        self._note(f"system message: {printable(self._conversation.system or 'none')}")

    def _attention(self, policy: str) -> None:
        if policy:
            self._model.set_attention(policy)
        self._note(f"attention: {self._model.attention}")

    def _save(self, name: str) -> None:
        kv = f" {name}".endswith(" --kv")
        path = _path("save", name.removesuffix("--kv").strip() if kv else name)
        n_token = self._conversation.save(path, kv=kv)
        tokens = f", {n_token} tokens in {kv_path(path).name}" if kv else ""
        self._note(f"{path}: {len(self._conversation.messages)} messages saved{tokens}")

    def _load(self, name: str) -> None:
        self._note(load(self._model, self._conversation, _path("load", name)))

    def _undo(self, _: str) -> None:
        self._note(f"taken back: {shorten(self._conversation.undo())}")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._note("a new conversation")

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def read_message(read: Callable[[str], str], *, keep_unfinished: bool) -> tuple[str, bool]:
    """(the next message, whether it is a command). read: a line without its end, for a prompt; EOFError at the end.

    keep_unfinished: a message that the end of the input cuts off counts, as in a file; else the end is the end, as with Ctrl-D.
    """
    line = read(PROMPT)
    is_block = line.strip() == QUOTES
    lines: list[str] = []
    try:
        if is_block:
            while (line := read(MORE)).strip() != QUOTES:
                lines.append(line)
        else:
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = read(MORE)
            lines.append(line)
    except EOFError:
        if not keep_unfinished:
            raise
    text = "\n".join(lines)
    return (text, False) if is_block else (text.strip(), text.startswith("/") and "\n" not in text)


def load(model: Model, conversation: Conversation, path: Path) -> str:
    """Loads a conversation; returns what to say about it."""
    name = conversation.load(path)
    other = "" if name == model.name else f", saved with {shorten(name)}"
    kv = ""
    if kv_path(path).exists():
        try:
            kv = f"; {len(model.load(kv_path(path)))} tokens need not be read again"
        except PyruntimeError as error:  # without it, the next question reads the conversation
            kv = f"; {printable(str(error))}"
    return f"{path}: {len(conversation.messages)} messages loaded{other}{kv}"


def shorten(text: str, width: int = 60) -> str:
    """The start of a text, on one line."""
    return printable(text[:width]).replace("\n", " ") + ("..." if len(text) > width else "")


def printable(text: str) -> str:
    """Without what a terminal would take for a control sequence: a loaded file is somebody else's text."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _line_reader(is_terminal: bool) -> Callable[[str], str]:
    """input(), with readline where there is one, or plain lines. A prompt appears at a terminal only, and never in a redirected stdout."""
    if is_terminal and sys.stdout.isatty():
        try:
            import readline

            if "libedit" not in (readline.__doc__ or ""):
                readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines arrive as one, with line ends in it
        except ImportError:  # a Python without it: lines, without editing
            pass
        return input

    def read(prompt: str) -> str:
        if is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    return read


def _path(command: str, name: str) -> Path:
    if not name:
        raise InvalidArgumentError(f"/{command} needs the name of a file")
    try:
        if "\0" not in name:
            return Path(name).expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        pass
    raise InvalidArgumentError(f"/{command}: {name!r} cannot be the name of a file")


def _stats(model: Model, conversation: Conversation) -> str:
    stats, done = model.stats(), conversation.last
    prefill, decode = (f"{stats[f'n_{kind}_token']} tokens, {stats[f'{kind}_tok_s']:.1f} tok/s" for kind in ("prefill", "decode"))
    n_used = stats["n_page"] - stats["n_page_free"]
    pages = f"{n_used} of {stats['n_page']} pages, {n_used * stats['page_bytes'] >> 20} MiB"
    rows = [
        f"conversation  {len(conversation.messages)} messages, {conversation.n_kept} tokens in the cache, max_context {model.max_context}"
    ]
    if done is not None:
        usage, t = done.usage, done.timings
        rows += [
            f"last answer   {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached; {t.prefill_tok_s:.1f} tok/s",
            f"              {usage.completion_tokens} new tokens, first after {t.time_to_first_token:.2f} s; {t.decode_tok_s:.1f} tok/s",
        ]
    rows += [
        f"in all        read {prefill}; generated {decode}",
        f"memory        weights {stats['weight_bytes'] >> 20} MiB; KV {pages}",
        f"model         {model.name} on {model.device}, {model.dtype}, attention {model.attention}",
    ]
    return "\n".join(rows)
