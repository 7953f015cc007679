"""Chat templates: the Jinja program inside a model's files that turns messages into its prompt format.

Templates come from strangers; sandbox.py is what keeps them in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InvalidArgumentError, ModelFileError, UnsupportedModelError
from .sandbox import LimitError, TemplateRefusalError, environment
from .tokenizer import LITERAL_MARK

if TYPE_CHECKING:
    from .gguf import GgufTokenizerMetadata

TIME_LIMIT_S = 5.0  # the longest real conversation seen takes 0.05 s
_OUTPUT_FLOOR = 1_000_000  # characters; long inputs raise the limit
_MAX_SOURCE = 1_000_000  # characters of template; the longest real one has 30,000
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A compiled template. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, *, origin: str = "template") -> None:
        """special_tokens: values of bos_token, eos_token, ... in the template
        origin: where it is from, for messages

        Raises UnsupportedModelError for a template with a syntax error or a filter that chat templates do not need.
        """
        import jinja2

        if not isinstance(source, str):
            raise InvalidArgumentError(f"chat_template must be a string, got {type(source).__name__}")
        if len(source) > _MAX_SOURCE:
            raise UnsupportedModelError(f"{origin}: chat template has {len(source)} characters, at most {_MAX_SOURCE}")
        self.source = source
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        self._env, self._budget = environment()
        self._budget.start(TIME_LIMIT_S, _OUTPUT_FLOOR)
        try:
            self._template = self._env.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise UnsupportedModelError(f"{origin}: chat template, line {e.lineno}: {e.message}") from None
        except (LimitError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
            raise UnsupportedModelError(f"{origin}: chat template: cannot be compiled: {_reason(e)}") from None

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """chat_template.jinja, or else the one in tokenizer_config.json (of several, the one called "default").

        Raises UnsupportedModelError if there is none, ModelFileError if a file is damaged.
        """
        config_path, jinja_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config: Any = {}
        if config_path.is_file():
            try:
                config = json.loads(config_path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as e:
                raise ModelFileError(f"{config_path}: cannot be read: {e}") from None
            if not isinstance(config, dict):
                raise ModelFileError(f"{config_path}: must hold a JSON object, holds {type(config).__name__}")
        source: str | None
        if jinja_path.is_file():
            try:
                source, origin = jinja_path.read_text(encoding="utf-8"), jinja_path
            except (OSError, ValueError) as e:
                raise ModelFileError(f"{jinja_path}: cannot be read: {e}") from None
        else:
            source, origin = _pick(config.get("chat_template"), str(config_path)), config_path
        if source is None:
            _no_template(str(folder))
        tokens = {}
        for name in _SPECIAL_TOKENS:
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
        return cls(source, tokens, origin=str(origin))

    @classmethod
    def from_gguf(cls, meta: GgufTokenizerMetadata, *, source: str = "GGUF file") -> ChatTemplate:
        """The template in a GGUF file's metadata. Raises UnsupportedModelError if there is none."""
        if meta.chat_template is None:
            _no_template(source)
        ids = {"bos_token": meta.bos_id, "eos_token": meta.eos_id, "unk_token": meta.unk_id, "pad_token": meta.pad_id}
        tokens = {name: meta.tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(meta.tokens)}
        return cls(meta.chat_template, tokens, origin=source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        literal: Iterable[str] = (),
        **extra: Any,
    ) -> str:
        """The prompt for `messages`, each {"role": str, "content": str or a list of {"type": "text", "text": str}}.

        add_generation_prompt: end with the header of the assistant's answer
        tools: JSON-schema descriptions of functions, for templates that know them
        literal: words that stay words where messages and tools contain them (the names of control tokens): they come
            out between LITERAL_MARKs, for Tokenizer.encode_chat(); a message cannot end its own turn then
        extra: other variables of the template, such as enable_thinking

        Raises InvalidArgumentError for messages of another form and for what the template itself refuses (its words are
        in the message), UnsupportedModelError if the template breaks a limit.
        """
        import jinja2

        checked = check_messages(messages)
        size = sum(len(m["content"]) for m in checked if isinstance(m.get("content"), str))
        self._budget.start(TIME_LIMIT_S, _OUTPUT_FLOOR + 8 * size)
        variables: dict[str, Any] = {
            **self._special_tokens,
            "documents": None,
            **extra,
            "messages": checked,
            "tools": None if tools is None else list(tools),
        }
        words = sorted({word for word in literal if word}, key=len, reverse=True)
        if words:
            pattern = re.compile("|".join(map(re.escape, words)))
            variables["messages"] = _mark(variables["messages"], pattern)
            variables["tools"] = _mark(variables["tools"], pattern)
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return self._budget.join(self._template.generate(variables))
        except TemplateRefusalError as e:
            raise InvalidArgumentError(f"{self.origin}: the chat template refuses these messages: {e}") from None
        except (LimitError, jinja2.exceptions.SecurityError, RecursionError, MemoryError, OverflowError) as e:
            raise UnsupportedModelError(f"{self.origin}: chat template: {_reason(e)}") from None
        except jinja2.TemplateError as e:
            raise InvalidArgumentError(f"{self.origin}: chat template fails on these messages: {e.message}") from None
        except Exception as e:  # templates are programs: a wrong type in one surfaces as any of Python's errors
            what = f"{type(e).__name__}: {e}"
            raise InvalidArgumentError(f"{self.origin}: chat template fails on these messages: {what}") from e


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy with text parts joined by line ends; raises InvalidArgumentError naming the index and the key."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgumentError(f"messages must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise InvalidArgumentError("messages must hold at least one message, it is empty")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidArgumentError(f"{where} must be a dict with role and content, got {type(message).__name__}")
    for key in message:
        if not isinstance(key, str):
            raise InvalidArgumentError(f"{where} has a key that is no string: {key!r}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidArgumentError(f"{where}['role'] must be a non-empty string, got {role!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {"content": "", **message} if "content" not in message else dict(message)
    if isinstance(content, list):
        content = "\n".join(_part_text(f"{where}['content'][{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise InvalidArgumentError(f"{where}['content'] must be a string or a list of text parts, got {content!r:.80}")
    return {**message, "content": content}


def _part_text(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise InvalidArgumentError(f"{where} must be a part of type 'text', the only supported one, got {kind!r:.80}")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{where}['text'] must be a string, got {text!r:.80}")
    return text


def _mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """A copy with every match in every string between marks, and marks that were there before made harmless."""
    if isinstance(value, str):
        return pattern.sub(rf"{LITERAL_MARK}\g<0>{LITERAL_MARK}", value.replace(LITERAL_MARK, "\ufffd"))
    if isinstance(value, Mapping):
        return {key: _mark(item, pattern) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item, pattern) for item in value]
    return value


def _pick(value: Any, where: str) -> str | None:
    """chat_template of a tokenizer_config.json: a string, or a list of {"name", "template"}."""
    if value is None or isinstance(value, str):
        return value
    named: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        name, template = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise ModelFileError(f"{where}: chat_template must be a string or a list of {{name, template}}")
        named[name] = template
    if named and "default" not in named:
        raise UnsupportedModelError(
            f"{where}: has chat templates {', '.join(sorted(named))}, none called 'default'; pass one as chat_template"
        )
    return named.get("default")


def _no_template(where: str) -> NoReturn:
    raise UnsupportedModelError(
        f"{where}: has no chat template, so it is probably a base model; use generate() with your own prompt, take the"
        " instruct version of the model, or pass chat_template"
    )


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__  # MemoryError has no text
