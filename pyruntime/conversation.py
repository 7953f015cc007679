"""A conversation with a model: its messages, the KV that stays between turns, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ContextLengthError, InvalidArgumentError
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .generate import Completion
    from .model import Model

_MAX_FILE_BYTES = 64 << 20  # a million tokens of context are some 4 MB


class Conversation:
    """Turns of a user and a model. An error or an empty answer leaves the messages as they were.

    system: the system message, if any.  options: of sampling, as in Model.generate. With a seed, answer i is drawn with seed + i.
    messages: what was said so far, [{"role": "system", "user" or "assistant", "content": text}].  last: the last answer's Completion.

    Raises UnsupportedModelError for a model without a chat template, InvalidArgumentError where the template refuses a system message.
    """

    def __init__(self, model: Model, *, system: str | None = None, **options: Any) -> None:
        SamplingParams.from_options(model.generation_config, options)  # a wrong one is refused now, not after the first question
        self._model, self._options = model, options
        self._n_answer = 0
        self.messages: list[dict[str, str]] = []
        self.last: Completion | None = None
        self._ids: list[int] = []  # of the last prompt and answer
        self.set_system(system)

    def turn(self, text: str) -> Iterator[str]:
        """Asks; yields the answer in pieces. Closing the iterator, or an exception out of it, ends the answer; what was made stays.

        Raises ContextLengthError when the conversation does not fit with this question.
        """
        return self._answer([*self.messages, _message("user", text)])

    def retry(self) -> Iterator[str]:
        """Another answer to the last question, in place of the one it had."""
        return self._answer(self.messages[: self._last_question() + 1])

    def undo(self) -> str:
        """Takes the last question and its answer back; returns the question."""
        at = self._last_question()
        question = self.messages[at]["content"]
        self.messages = self.messages[:at]
        return question

    def clear(self) -> None:
        """Forgets all but the system message."""
        self.messages, self._ids = [m for m in self.messages if m["role"] == "system"], []

    @property
    def system(self) -> str | None:
        return next((m["content"] for m in self.messages if m["role"] == "system"), None)

    def set_system(self, text: str | None) -> None:
        """Sets or, with None, removes the system message. The conversation is read again from its start with the next question."""
        system = [] if text is None else [_message("system", text)]
        self._model.chat_ids([*system, _message("user", "")])  # templates without system messages say so here
        self.messages = system + [m for m in self.messages if m["role"] != "system"]

    @property
    def n_kept(self) -> int:
        """Tokens whose KV is kept for the next turn, unless others need the room until then."""
        return self._model.n_cached(self._ids)

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because there was no more room in the context."""
        return self.last is not None and self.last.finish_reason == "length" and self.last.usage.total_tokens >= self._model.max_context

    def save(self, path: Path, *, kv: bool = False) -> int:
        """Writes {"model": name, "messages": [...]} as JSON; with kv, also what was read and said to kv_path(path), of as many tokens as it
        returns. Raises InvalidArgumentError when a file cannot be written."""
        try:
            path.write_text(json.dumps({"model": self._model.name, "messages": self.messages}, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidArgumentError(f"{path}: cannot be written ({error.strerror})") from None
        return self._model.save(kv_path(path), self._ids or self._model.chat_ids(self.messages or [_message("user", "")])) if kv else 0

    def load(self, path: Path) -> str:
        """Takes the messages of a saved file in place of the present ones; returns the name of the model that it was saved with.
        Model.load(kv_path(path)) takes the KV.

        Raises InvalidArgumentError for a file that is not as save() writes it; nothing has changed then.
        """
        name, messages = read_conversation(path)
        self._model.chat_ids(messages or [_message("user", "")])  # what this model's template refuses is refused before it is taken
        self.messages, self._ids = messages, []
        return name

    def _last_question(self) -> int:
        if not self.messages or self.messages[-1]["role"] == "system":
            raise InvalidArgumentError("there is no question yet")
        return len(self.messages) - 2  # questions and answers take turns

    def _answer(self, asked: list[dict[str, str]]) -> Iterator[str]:
        ids = self._model.chat_ids(asked)
        if len(ids) >= self._model.max_context:
            raise ContextLengthError(
                f"the conversation no longer fits: with this message it has {len(ids)} tokens, max_context is {self._model.max_context}"
            )
        options = dict(self._options)
        if options.get("seed") is not None:
            options["seed"] += self._n_answer
        stream = self._model.generate(ids, stream=True, **options)
        try:
            yield from stream
        finally:
            stream.close()
            done = stream.completion
            self._ids = ids + done.token_ids
            if done.text or done.finish_reason != "abort":
                self.messages = [*asked, _message("assistant", done.text)]
                self._n_answer += 1
                self.last = done


def kv_path(path: Path) -> Path:
    """Where the KV of a saved conversation is: FILE.kv."""
    return path.with_name(path.name + ".kv")


def read_conversation(path: Path) -> tuple[str, list[dict[str, str]]]:
    """(name of the model, messages) of a saved file. Raises InvalidArgumentError for anything that save() does not write."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidArgumentError(f"{path}: has more than {_MAX_FILE_BYTES >> 20} MiB, too much for a conversation")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: is not a saved conversation: {error or 'nested too deeply'}") from None
    name, messages = (value.get("model"), value.get("messages")) if isinstance(value, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(messages, list) or len(value) != 2:
        raise InvalidArgumentError(f'{path}: is not a saved conversation: expected {{"model": name, "messages": [...]}} and nothing else')
    n_system = int(bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system")
    for i, message in enumerate(messages):
        role = "system" if i < n_system else ("user", "assistant")[(i - n_system) % 2]
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InvalidArgumentError(f"{path}: messages[{i}] must have role and content and nothing else")
        if message["role"] != role:
            raise InvalidArgumentError(f"{path}: messages[{i}]['role'] is {message['role']!r:.40}, expected {role!r}")
        content = message["content"]
        if not isinstance(content, str) or any("\ud800" <= c <= "\udfff" for c in content):
            raise InvalidArgumentError(f"{path}: messages[{i}]['content'] must be a text that UTF-8 can hold, got {content!r:.40}")
    if (len(messages) - n_system) % 2:
        raise InvalidArgumentError(f"{path}: the last of {len(messages)} messages is a question, expected its answer after it")
    return name, messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
