"""Output that follows a JSON schema, a regular expression or a grammar, by way of the package llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InvalidArgumentError, UnsupportedModelError

if TYPE_CHECKING:
    from .sampling import SamplingParams
    from .session import FloatArray
    from .tokenizer import Tokenizer

# JSON as json.dumps writes it. Free white space lets a small model write spaces until its tokens are used up; "x-guidance" in a schema
# overrules this.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Makes constraints for one tokenizer. Making the first takes some tenths of a second, for the table of all tokens.

    Raises UnsupportedModelError if llguidance is not installed or the model has no end token.
    """

    def __init__(self, tokenizer: Tokenizer, *, n_vocab: int, eos_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise UnsupportedModelError(
                "json_schema, regex and grammar need the package llguidance: pip install 'pyruntime[grammar]'"
            ) from None
        if not eos_ids:
            raise UnsupportedModelError("json_schema, regex and grammar need a model that has an end token")
        self._llguidance = llguidance
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, eos_ids[0])), n_vocab=n_vocab, eos_token=list(eos_ids)
        )

    def constraint(self, params: SamplingParams) -> Constraint | None:
        """What the parameters ask for, if anything. Raises InvalidArgumentError for a schema, expression or grammar that is wrong."""
        matcher = self._llguidance.LLMatcher
        if params.json_schema is not None:
            kind = "json_schema"
            try:
                schema = json.loads(params.json_schema) if isinstance(params.json_schema, str) else params.json_schema
                source = matcher.grammar_from_json_schema(json.dumps(schema), defaults=_JSON_STYLE)
            except (ValueError, TypeError, RecursionError) as error:
                raise InvalidArgumentError(f"json_schema is not JSON: {error}") from None
        elif params.regex is not None:
            kind, source = "regex", matcher.grammar_from_regex(params.regex)
        elif params.grammar is not None:
            kind, source = "grammar", matcher.grammar_from_lark(params.grammar)
        else:
            return None
        made = matcher(self._tokenizer, source, log_level=0)
        if made.is_error():
            raise InvalidArgumentError(f"{kind} cannot be used: {_reason(made.get_error())}")
        return Constraint(made, kind)


class Constraint:
    """How far one text has come in its grammar."""

    def __init__(self, matcher: Any, kind: str) -> None:
        self._matcher, self._kind = matcher, kind

    def apply(self, logits: FloatArray) -> None:
        """Forbids in logits [n_vocab] every token that cannot come next."""
        mask = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")[: len(logits)]
        self._check()
        logits[: len(mask)][mask == 0] = -np.inf
        logits[len(mask) :] = -np.inf

    def accept(self, token: int) -> bool:
        """Takes the token that was drawn; returns whether the text is complete: nothing may follow."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidArgumentError(f"the output cannot go on as {self._kind} says: {_reason(self._matcher.get_error())}")


class _Vocabulary:
    """The tokens as llguidance wants to see them."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        except InvalidArgumentError:  # a character that no token spells; an exception would be a panic over there
            return [token for c in text if len(text) > 1 for token in self(c)]


def _reason(said: str) -> str:
    """What llguidance says, as one sentence: without its picture of the place, its state, or where in its own code it failed."""
    first, *more = said.partition("<state>")[0].strip().splitlines() or [""]
    if first.startswith("panic"):
        return "llguidance failed on it; a simpler one may do"
    detail = next((line.removeprefix("error: ") for line in more if line.startswith("error: ")), "")
    return f"{first} {detail}".strip()[:400]
