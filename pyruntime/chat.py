"""Chat templates: the Jinja program inside a model's files that turns messages into its prompt format.

Templates come from strangers. They run in jinja2's immutable sandbox, which keeps them from reaching Python objects;
what the sandbox leaves open is closed here: loops and calls watch a deadline, everything that makes text or lists
bigger has a size limit, and filters are a closed list.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InvalidArgumentError, ModelFileError, UnsupportedModelError
from .tokenizer import LITERAL_MARK

if TYPE_CHECKING:
    import jinja2

    from .gguf import GgufTokenizerMetadata

TIME_LIMIT_S = 5.0  # the longest real conversation seen takes 0.05 s
_OUTPUT_FLOOR = 1_000_000  # characters; long inputs raise the limit
_MAX_SOURCE = 1_000_000  # characters of template; the longest real one has 30,000
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# What chat templates use, and nothing that takes a width or a count.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper", "wordcount",
)  # fmt: skip
_WIDTHS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate")


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
        self._env, self._budget = _environment()
        self._budget.start(TIME_LIMIT_S, _OUTPUT_FLOOR)
        try:
            self._template = self._env.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise UnsupportedModelError(f"{origin}: chat template, line {e.lineno}: {e.message}") from None
        except (_LimitError, RecursionError, MemoryError, SyntaxError, ValueError) as e:
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
        except _TemplateRefusalError as e:
            raise InvalidArgumentError(f"{self.origin}: the chat template refuses these messages: {e}") from None
        except (_LimitError, jinja2.exceptions.SecurityError, RecursionError, MemoryError, OverflowError) as e:
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


class _TemplateRefusalError(Exception):
    """raise_exception(text) in a template."""


class _LimitError(Exception):
    """A template takes too long or makes too much."""


class _Budget(threading.local):
    """What one rendering may still use; each thread has its own."""

    deadline = 0.0
    seconds = 0.0
    max_size = 0  # of one value, and of the output
    total = 0  # of all values made so far: small ones add up in memory, too

    def start(self, seconds: float, max_size: int) -> None:
        self.deadline, self.seconds, self.max_size, self.total = time.monotonic() + seconds, seconds, max_size, 0

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise _LimitError(f"did not finish within {self.seconds:g} s, which only a runaway loop needs")

    def grow(self, size: int) -> None:
        """A value of `size` characters, items or bytes is about to be made."""
        self.tick()
        self.total += size
        if size > self.max_size or self.total > 100 * self.max_size:
            raise _LimitError(f"makes too much text: {size} more characters or items, with a limit of {self.max_size}")

    def checked(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple)):
            self.grow(len(value))
        elif isinstance(value, int):
            self.grow(value.bit_length() // 8)
        return value

    def join(self, chunks: Iterable[str]) -> str:
        out, size = [], 0
        for chunk in chunks:
            out.append(chunk)
            size += len(chunk)
            self.tick()
            if size > self.max_size:
                raise _LimitError(f"makes more than {self.max_size} characters")
        self.grow(size)
        return "".join(out)


@lru_cache(maxsize=1)
def _environment() -> tuple[jinja2.Environment, _Budget]:
    """The environment that templates are written for (that of transformers), with limits. One for the process."""
    from jinja2 import nodes, sandbox
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.ext import Extension
    from jinja2.filters import make_attrgetter
    from jinja2.parser import Parser

    budget = _Budget()

    class LimitedCodeGenerator(CodeGenerator):
        """Sends every loop and every `~` through the environment, where the limits are."""

        def visit_For(self, node: nodes.For, frame: Frame) -> None:
            if node.recursive:
                self.fail("recursive loops are not supported in chat templates", node.lineno)
            node.iter = self._through("limited_iter", [node.iter], node.lineno)
            super().visit_For(node, frame)

        def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
            self.visit(self._through("limited_concat", node.nodes, node.lineno), frame)

        def _through(self, function: str, args: list[Any], lineno: int) -> nodes.Expr:
            target = nodes.EnvironmentAttribute(function, lineno=lineno)
            call = nodes.Call(target, args, [], None, None, lineno=lineno)
            call.set_environment(self.environment)
            return call

    class Generation(Extension):
        """{% generation %}: marks the assistant's words for training; here its body only."""

        tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class LimitedEnvironment(sandbox.ImmutableSandboxedEnvironment):
        code_generator_class = LimitedCodeGenerator
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def limited_iter(self, values: Iterable[Any]) -> Iterator[Any]:
            for value in values:
                budget.tick()
                yield value

        def limited_concat(self, *values: Any) -> str:
            return budget.join(str(value) for value in values)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int):
                if operator == "**":
                    budget.grow(left.bit_length() * abs(right) // 8)
            elif operator == "*":
                budget.grow(_size(left) * _size(right))
            elif operator == "+":
                budget.grow(_size(left) + _size(right))
            elif operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*[\d*]", left):
                raise _LimitError(f"formats text with a width: {left!r:.40}")
            return budget.checked(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget.tick()
            # The sandbox wraps str.format in a function of its own.
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            if isinstance(owner, (str, bytes)):
                name = getattr(__obj, "__name__", "")
                if name in _WIDTHS:
                    raise _LimitError(f"calls str.{name}, which chat templates may not")
                if name == "format":
                    _check_format(str(owner), [*args, *kwargs.values()])
                if name == "replace":
                    _check_replace(owner, *args)
                elif name == "join" and args:
                    args = (_check_join(owner, args[0]), *args[1:])
            elif isinstance(owner, (int, float)):
                raise _LimitError(f"calls a method of the number {owner!r:.20}, which chat templates may not")
            return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
        if isinstance(old, type(text)) and isinstance(new, type(text)):
            budget.grow(len(text) + text.count(old) * len(new))

    def _check_format(text: str, values: Sequence[Any]) -> None:
        if re.search(r"\{[^{}]*:", text):
            raise _LimitError(f"formats text with a width: {text!r:.40}")
        budget.grow(len(text) + text.count("{") * max((_size(v) for v in values), default=1))

    def _check_join(separator: Any, values: Iterable[Any]) -> list[Any]:
        items = list(LimitedEnvironment.limited_iter(env, values))
        budget.grow(sum(_size(item) + len(separator) for item in items))
        return items

    def limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function) if name in ("replace", "join", "indent") else None

        @wraps(function)  # keeps jinja2's marks for filters that want the environment or the context
        def call(*args: Any, **kwargs: Any) -> Any:
            budget.tick()
            given = signature.bind_partial(*args, **kwargs).arguments if signature else {}
            if name == "replace":
                _check_replace(str(given.get("s")), str(given.get("old", "")), str(given.get("new", "")))
            elif name == "join":
                values = given["value"]
                if given.get("attribute") is not None:
                    values = map(make_attrgetter(env, given["attribute"]), values)
                args, kwargs = (given["eval_ctx"], _check_join(str(given.get("d", "")), values), given.get("d", "")), {}
            elif name == "indent":
                budget.grow(_size(given.get("width", 4)) * (1 + str(given.get("s")).count("\n")))
            return budget.checked(function(*args, **kwargs))

        return call

    env = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters = {name: limited(name, env.filters[name]) for name in _FILTERS}
    env.filters["tojson"] = limited("tojson", _to_json)
    env.globals = {name: env.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner") if name in env.globals}
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return env, budget


def _size(value: Any) -> int:
    """Characters, items, or bytes of a number; at least 1, so that a product bounds a repetition."""
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int):
        return max(1, abs(value)) if value.bit_length() < 64 else 1 << 62
    return max(1, len(value)) if isinstance(value, (str, bytes, list, tuple)) else 1


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does: jinja2's own tojson escapes for HTML, which the model never saw in training."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise _LimitError(f"asks for JSON with an indent of {indent!r:.20}, 0 to 16 are allowed")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRefusalError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d\d", form):  # the C library pads: "%999999999d"
        raise _LimitError(f"asks for a date in the form {form!r:.40}")
    return datetime.now().strftime(form)
