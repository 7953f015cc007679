"""The sandbox that chat templates run in.

jinja2's immutable sandbox keeps them from reaching Python objects. What it leaves open is closed here: loops and calls watch a deadline,
everything that makes text or lists bigger has a size limit, and filters are a closed list.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import jinja2

# What chat templates use, and nothing that takes a width or a count.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int", "items",
    "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse",
    "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper", "wordcount",
)  # fmt: skip
_WIDTHS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate")


class TemplateRefusalError(Exception):
    """raise_exception(text) in a template."""


class LimitError(Exception):
    """A template takes too long or makes too much."""


class Budget(threading.local):
    """What one rendering may still use; each thread has its own."""

    deadline = 0.0
    seconds = 0.0
    max_size = 0  # of one value, and of the output
    total = 0  # of all values made so far: small ones add up in memory, too

    def start(self, seconds: float, max_size: int) -> None:
        self.deadline, self.seconds, self.max_size, self.total = time.monotonic() + seconds, seconds, max_size, 0

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise LimitError(f"did not finish within {self.seconds:g} s, which only a runaway loop needs")

    def grow(self, size: int) -> None:
        """A value of `size` characters, items or bytes is about to be made."""
        self.tick()
        self.total += size
        if size > self.max_size or self.total > 100 * self.max_size:
            raise LimitError(f"makes too much text: {size} more characters or items, with a limit of {self.max_size}")

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
                raise LimitError(f"makes more than {self.max_size} characters")
        self.grow(size)
        return "".join(out)


@lru_cache(maxsize=1)
def environment() -> tuple[jinja2.Environment, Budget]:
    """The environment that templates are written for (that of transformers), with limits. One for the process."""
    from jinja2 import nodes, sandbox
    from jinja2.compiler import CodeGenerator, Frame
    from jinja2.ext import Extension
    from jinja2.filters import make_attrgetter
    from jinja2.parser import Parser

    budget = Budget()

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
                raise LimitError(f"formats text with a width: {left!r:.40}")
            return budget.checked(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            budget.tick()
            # The sandbox wraps str.format in a function of its own.
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            if isinstance(owner, (str, bytes)):
                name = getattr(__obj, "__name__", "")
                if name in _WIDTHS:
                    raise LimitError(f"calls str.{name}, which chat templates may not")
                if name == "format":
                    _check_format(str(owner), [*args, *kwargs.values()])
                if name == "replace":
                    _check_replace(owner, *args)
                elif name == "join" and args:
                    args = (_check_join(owner, args[0]), *args[1:])
            elif isinstance(owner, (int, float)):
                raise LimitError(f"calls a method of the number {owner!r:.20}, which chat templates may not")
            return budget.checked(super().call(__context, __obj, *args, **kwargs))

    def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
        if isinstance(old, type(text)) and isinstance(new, type(text)):
            budget.grow(len(text) + text.count(old) * len(new))

    def _check_format(text: str, values: Sequence[Any]) -> None:
        if re.search(r"\{[^{}]*:", text):
            raise LimitError(f"formats text with a width: {text!r:.40}")
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
        raise LimitError(f"asks for JSON with an indent of {indent!r:.20}, 0 to 16 are allowed")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusalError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d\d", form):  # the C library pads: "%999999999d"
        raise LimitError(f"asks for a date in the form {form!r:.40}")
    return datetime.now().strftime(form)
