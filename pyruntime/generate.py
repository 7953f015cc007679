"""One completion: its request with the sampling state, and what comes out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ContextLengthError, InvalidArgumentError
from .sampling import SamplingParams
from .session import FloatArray, Sampler
from .stop import StopMatcher
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .constraint import Constraint

Top = list[tuple[int, float]]  # the likeliest tokens and their log-probabilities, best first


@dataclass(slots=True)
class TokenLogprob:
    """One chosen token, its log-probability under the model (before temperature and penalties) and the likeliest alternatives."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]] = field(default_factory=list)


@dataclass(slots=True)
class Usage:
    """Token counts of one completion. cached_tokens: those of the prompt that were in the KV cache already, or read for another sample."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Of prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Timings:
    """Seconds and rates of one completion; a batch shares its steps, so the rates of its members do not add up.

    time_to_first_token: from the call.  prefill_tok_s: prompt tokens, without the cached ones, over that time.
    decode_tok_s: tokens after the first over the time they took; 0 with fewer than two tokens.
    """

    time_to_first_token: float = 0.0
    total: float = 0.0
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0


@dataclass(slots=True)
class Completion:
    """What generate returns for one prompt.

    finish_reason: "stop" (end token, stop token, stop string, or the schema or grammar is complete), "length" (max_tokens or the context is
        full), or "abort" (cancelled, or of a stream: Ctrl-C, an error, or nobody has read on).
    stop_reason: the stop string or the token id that ended it; None for the model's own end token.
    token_ids: all sampled tokens, the ending one included.
    prompt_logprobs: one entry per token of the prompt; None for the first, which follows nothing.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    seed: int
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def __str__(self) -> str:
        return self.text


class Request:
    """One sequence on its way through the engine: its prompt, its sampler, the tokens drawn so far and the text they make."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        seed: int | None = None,
        eos_ids: Sequence[int],
        n_vocab: int,
        max_context: int,
        longest_context: int,
        endless: bool = False,
        constraint: Constraint | None = None,
    ) -> None:
        """endless: tokens are evicted as it goes on (StreamingLLM), so that max_tokens may be more than fits the context."""
        self.prompt, self.params, self.tokenizer, self.constraint = prompt, params, tokenizer, constraint
        if len(prompt) >= max_context:
            larger = f", or load the model with a larger max_context (up to {longest_context})" if max_context < longest_context else ""
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, max_context is {max_context} and at least one new token must fit: "
                f"shorten the prompt{larger}"
            )
        room = max_context - len(prompt)
        self.max_tokens = params.max_tokens or room
        self.longest = len(prompt) + min(self.max_tokens, room)  # most tokens that its sequence holds at a time
        if not endless:
            self.max_tokens = min(self.max_tokens, room)
        self.seed = fresh_seed() if seed is None else seed
        self.sampler = Sampler(params, n_vocab, seed=self.seed)
        self.sampler.accept(prompt, is_prompt=True)
        self.eos_ids = frozenset(eos_ids)
        self.stop_ids = frozenset(params.stop_token_ids)
        if params.min_tokens:  # until then, nothing that would end it; take() lifts the ban
            banned = {t: -float("inf") for t in {*self.eos_ids, *self.stop_ids} if t < n_vocab}
            self.sampler.set_bias({**params.logit_bias, **banned})
        self.processors = list(params.logits_processors)
        if constraint:
            self.processors.append(lambda _, logits: constraint.apply(logits))  # last: nothing may bring back what it forbids
        self.detokenizer = tokenizer.stream(continuation=True)
        self.matcher = StopMatcher(params.stop)
        self.n_cached = 0
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.started = time.perf_counter()
        self.first_token = self.ended = 0.0

    @property
    def n_token(self) -> int:
        """Of the prompt and what was drawn so far."""
        return len(self.prompt) + len(self.token_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Tokens [begin, end) of the prompt with what was drawn so far."""
        n = len(self.prompt)
        return self.prompt[begin:end] + self.token_ids[max(0, begin - n) : max(0, end - n)]

    def draw(self, logits: FloatArray) -> tuple[int, float, Top]:
        """(token, its log-probability, the likeliest ones) from logits [n_vocab], by way of the processors; the sampler moves on."""
        row = logits.copy() if self.processors else logits
        for process in self.processors:
            row = _changed(process(list(self.token_ids), row), row)
        token = self.sampler.sample(row)
        if self.logprobs is None:
            return token, 0.0, []
        top = logits.max()
        normalizer = float(top) + float(np.log(np.exp((logits - top).astype(np.float64)).sum()))
        return token, float(logits[token]) - normalizer, likeliest(logits, self.params.logprobs or 0, normalizer)

    def take(self, token: int, logprob: float = 0.0, top: Top | None = None) -> str:
        """Accounts for a drawn token; returns the text that is now certain."""
        now = time.perf_counter()
        self.first_token = self.first_token or now
        self.ended = now
        self.token_ids.append(token)
        if self.logprobs is not None:
            self.logprobs.append(self._named(token, logprob, top or []))
        if len(self.token_ids) == self.params.min_tokens:
            self.sampler.set_bias(self.params.logit_bias)
        ends = (token in self.eos_ids and not self.params.ignore_eos) or token in self.stop_ids
        piece, matched = ("", None) if ends else self.matcher.push(self.detokenizer.push(token))
        if ends:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.stop_ids else None
        elif matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
        elif self.constraint and self.constraint.accept(token):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and matched is None:
            tail, matched = self.matcher.push(self.detokenizer.finish())
            piece += tail
            if matched is not None:
                self.finish_reason, self.stop_reason = "stop", matched
            else:
                piece += self.matcher.finish()
        if piece:
            self.pieces.append(piece)
        return piece

    @property
    def wants_scores(self) -> bool:
        """Whether tokens of the prompt are still to be scored."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    def score(self, begin: int, logprobs: FloatArray, logits: FloatArray | None) -> None:
        """Accounts for the scores of the prompt's tokens after rows begin, begin + 1, ...: logprobs [n], and logits [n, n_vocab] if the
        likeliest tokens are wanted too."""
        assert self.prompt_logprobs is not None
        del self.prompt_logprobs[begin + 1 :]  # what was read for a second time
        for i, token in enumerate(self.prompt[begin + 1 : begin + 1 + len(logprobs)]):
            logprob = float(logprobs[i])
            top: Top = []
            if logits is not None:
                top = likeliest(logits[i], self.params.prompt_logprobs or 0, float(logits[i, token]) - logprob)
            self.prompt_logprobs.append(self._named(token, logprob, top))

    def _named(self, token: int, logprob: float, top: Top) -> TokenLogprob:
        name = self.tokenizer.id_to_text
        return TokenLogprob(token, name(token), logprob, [(i, name(i), p) for i, p in top if i >= 0])

    def completion(self) -> Completion:
        n = len(self.token_ids)
        first, total = (self.first_token - self.started, self.ended - self.started) if n else (0.0, 0.0)
        decode = self.ended - self.first_token
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            seed=self.seed,
            usage=Usage(len(self.prompt), n, self.n_cached),
            timings=Timings(
                first,
                total,
                (len(self.prompt) - self.n_cached) / first if first > 0 else 0.0,
                (n - 1) / decode if n > 1 and decode > 0 else 0.0,
            ),
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(7), "little")


def likeliest(logits: FloatArray, k: int, normalizer: float) -> Top:
    """The k largest of logits [n_vocab], each less the normalizer; of equal ones the lower id first."""
    if k == 0:
        return []
    ids = np.sort(np.argpartition(-logits, k - 1)[:k])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return [(int(i), float(logits[i]) - normalizer) for i in ids]


def _changed(result: Any, row: FloatArray) -> FloatArray:
    """The logits that a processor returned, checked; None: it has changed `row` in place."""
    changed = row if result is None else np.asarray(result, dtype=np.float32)
    if changed.shape != row.shape:
        raise InvalidArgumentError(f"a logits processor returned an array of shape {changed.shape}, expected {row.shape}")
    best = float(changed.max())
    if not np.isfinite(best):
        raise InvalidArgumentError(f"after a logits processor the largest logit is {best}, expected a number: some token must be allowed")
    return changed
