"""Sampling parameters, named as vLLM and OpenAI name them, checked one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from .session import FloatArray

    LogitsProcessor = Callable[[list[int], FloatArray], FloatArray | None]

_CONSTRAINTS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation stops.

    max_tokens: most new tokens; None: until the end token or the context is full.
    temperature: 0 is greedy.  top_k: 0 is off.  top_p in (0, 1], 1 is off.  min_p in [0, 1], 0 is off.
    repetition_penalty (> 0, 1 is off) counts the prompt too; presence_penalty and frequency_penalty count generated tokens only.
    seed: the same seed, prompt and parameters give the same text; None: a fresh one per call, found in Completion.seed.
    stop: strings that end the text and are not part of it.  stop_token_ids: tokens that end it.
    min_tokens: no end or stop token before that many.  ignore_eos: go on past the end token.
    logit_bias: {token id: value added to its logit}, -inf forbids it.
    logprobs: None for none, 0 for those of the chosen tokens, k for the k most likely ones too.
    prompt_logprobs: the same for the tokens of the prompt, each given those before it; the first has none.
    n: that many samples of the prompt, which is read once; sample i is drawn with seed + i. None: one, and no list around it.
    logits_processors: functions f(token ids so far, logits float32 [n_vocab]) that change the logits in place or return others, before
        everything above. They run in whichever thread does the step, and must not call the model.
    json_schema, regex, grammar: the text is JSON that satisfies the schema (a dict or its JSON text; {} for any), matches the whole regular
        expression, or follows the grammar (Lark, as llguidance reads it). At most one; needs `pip install 'pyruntime[grammar]'`.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, 1 << 24)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _number("presence_penalty", self.presence_penalty, -100, 100)
        _number("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        for name, low, high in (("logprobs", 0, 1024), ("prompt_logprobs", 0, 1024), ("n", 1, 128)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low, high)
        for f in self.logits_processors:
            if not callable(f):
                raise InvalidArgumentError(f"logits_processors holds {f!r}, expected functions of (token ids, logits)")
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidArgumentError(f"{' and '.join(given)} are given: at most one of {', '.join(_CONSTRAINTS)} can be")
        for name in given:
            if not isinstance(getattr(self, name), (dict, str) if name == "json_schema" else str):
                raise InvalidArgumentError(f"{name} is {type(getattr(self, name)).__name__}, expected text")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidArgumentError(f"stop holds {text!r}, expected strings of at least one character")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 1 << 31)
        for token, value in self.logit_bias.items():
            _integer("a key of logit_bias", token, 0, 1 << 31)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (abs(value) <= 1e6 or value == -math.inf):
                raise InvalidArgumentError(f"logit_bias[{token}] is {value!r}, expected a number from -1e6 to 1e6, or -inf")

    @classmethod
    def from_options(cls, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> SamplingParams:
        """Keyword arguments of a call over the model's own defaults (generation_config.json). None means "not given"."""
        given = {k: v for k, v in options.items() if v is not None}
        if "max_new_tokens" in given:
            if "max_tokens" in given:
                raise InvalidArgumentError("max_tokens and max_new_tokens are the same parameter: give one of them")
            given["max_tokens"] = given.pop("max_new_tokens")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidArgumentError(f"unknown parameter {name!r}; known are {', '.join(known)} and max_new_tokens")
        base: dict[str, Any] = {k: v for k, v in defaults.items() if k in known}
        if defaults.get("do_sample") is False:
            base["temperature"] = 0.0
        if "max_new_tokens" in defaults:
            base["max_tokens"] = defaults["max_new_tokens"] or None
        if base.get("max_tokens") is not None and "max_tokens" not in given and given.get("min_tokens", 0) > base["max_tokens"]:
            base["max_tokens"] = None
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        for name in ("stop", "stop_token_ids", "logits_processors"):
            if name in given:
                if not isinstance(given[name], Sequence):
                    raise InvalidArgumentError(f"{name} is {given[name]!r}, expected a list")
                given[name] = tuple(given[name])
        if "logit_bias" in given and not isinstance(given["logit_bias"], Mapping):
            raise InvalidArgumentError(f"logit_bias is {given['logit_bias']!r}, expected {{token id: value}}")
        if "ignore_eos" in given and not isinstance(given["ignore_eos"], bool):
            raise InvalidArgumentError(f"ignore_eos is {given['ignore_eos']!r}, expected True or False")
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(given.get(name), bool):
                given[name] = 0 if given[name] else None
        return cls(**{**base, **given})


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(f"{name} is {value!r}, expected an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    ok = not isinstance(value, bool) and isinstance(value, (int, float)) and low <= value <= high
    if not ok or (open_low and value == low):
        expected = f"above {low:g} and up to {high:g}" if open_low else f"from {low:g} to {high:g}"
        raise InvalidArgumentError(f"{name} is {value!r}, expected a number {expected}")
