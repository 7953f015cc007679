"""lm-evaluation-harness with any attention policy (the extra `harness`):

    python -m pyruntime.evaluate.harness run --model pyruntime --tasks hellaswag \\
        --model_args '{"model": "smollm2-135m", "attention": "tactic:p=0.75"}'

The context of a request is a prompt and dense. What is scored or generated after it is decoded, with a sparse policy token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..engine import pages_for
from ..errors import InvalidArgumentError
from ..model import Model
from ..session import Entry
from .metrics import log_softmax

DEFAULT_NEW_TOKENS = 256
SCORED_ROWS = 256  # at once by dense attention; x 128K logits of 4 bytes are 128 MiB


@register_model("pyruntime")
class Harness(TemplateLM):  # type: ignore[misc]
    """A pyruntime.Model; the arguments are Model's, with its name as `model`."""

    def __init__(self, model: str | Model, batch_size: Any = None, max_batch_size: Any = None, device: str | None = None, **options: Any):
        super().__init__()
        if isinstance(model, Model):
            self.model = model
        else:
            if device is None or device == "cuda:0":  # the harness's default, not a wish
                device = "auto"
            self.model = Model(model, device=device, **options)

    @property
    def eot_token_id(self) -> int:
        return self.model.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        begin = self.model.tokenize("")
        return begin[0] if begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.model.tokenize(string, add_special_tokens=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "the model's own" if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.chat_prompt(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        results = []
        for pair, context, continuation in tqdm(requests, disable=disable_tqdm, desc="scoring"):
            if not continuation:
                raise InvalidArgumentError(f"the continuation {pair[1]!r} has no tokens")
            room = self.model.max_context + 1 - len(continuation)
            if room < 1:
                raise InvalidArgumentError(f"{len(continuation)} tokens are to be scored, max_context is {self.model.max_context}")
            results.append(self._score(list(context[-room:]), list(continuation)))
            self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether greedy decoding gives it."""
        fed = [context[-1], *continuation[:-1]]
        size = SCORED_ROWS if self.model.attention.policy == "full" else 1
        total, greedy = 0.0, True
        with self.model._engine.borrow(pages_for(len(context) + len(continuation))) as session:
            seq = session.create_sequence()
            try:
                if len(context) > 1:
                    session.step([Entry(seq, context[:-1])])
                for at in range(0, len(fed), size):
                    logits = session.step([Entry(seq, fed[at : at + size])], logits="all").logits
                    assert logits is not None
                    rows, wanted = log_softmax(logits), continuation[at : at + size]
                    total += float(rows[np.arange(len(rows)), wanted].sum())
                    greedy = greedy and bool((rows.argmax(-1) == wanted).all())
            finally:
                session.free_sequence(seq)
        return total, greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.model.max_context, 1)
            scored = [(("", text), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(scored, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generating"):
            context, how = request.args
            until = how.get("until", [])
            new = min(int(how.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.model.max_context - 1)
            options = {name: how[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty") if name in how}
            options["temperature"] = how.get("temperature", 0) if how.get("do_sample", how.get("temperature", 0) > 0) else 0
            prompt = self.tok_encode(context)[-(self.model.max_context - new) :]
            stop = [until] if isinstance(until, str) else list(until)
            done = self.model.generate(prompt, max_tokens=new, stop=stop, **options)
            texts.append(done.text)
            self.cache_hook.add_partial("generate_until", (context, how), done.text)
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
