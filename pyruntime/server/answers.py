"""What a generation is in OpenAI's words: whole answers and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from ..generate import Request, TokenLogprob
from ..model import Model
from .schemas import Job
from .tools import ToolStream


class Answers:
    """The answer to one job. requests: for each prompt its samples; choice i of the answer is the i-th of them all."""

    def __init__(self, model: Model, name: str, job: Job, prompts: Sequence[Sequence[Request]], *, is_chat: bool) -> None:
        self._model, self._job, self._is_chat = model, job, is_chat
        self._prompts = prompts
        self.requests = [request for samples in prompts for request in samples]
        self._tools = [ToolStream(job.tools) for _ in self.requests] if job.tools else []
        self._n_shown = [0] * len(self.requests)  # logprobs in earlier chunks
        self._offset = [0] * len(self.requests)  # characters of tokens in earlier chunks
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }
        self._chunk_head = {**self._head, "object": "chat.completion.chunk" if is_chat else kind}

    def usage(self) -> dict[str, Any]:
        """A prompt counts once for all its samples."""
        firsts = [samples[0] for samples in self._prompts]
        n_prompt = sum(len(r.prompt) for r in firsts)
        n_made = 0 if self._job.is_empty else sum(len(r.token_ids) for r in self.requests)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_made,
            "total_tokens": n_prompt + n_made,
            "prompt_tokens_details": {"cached_tokens": sum(r.n_cached for r in firsts)},
        }

    def whole(self) -> dict[str, Any]:
        choice = self._chat_choice if self._is_chat else self._text_choice
        return {**self._head, "choices": [choice(i) for i in range(len(self.requests))], "usage": self.usage()}

    # -- chunks

    def first(self) -> list[dict[str, Any]]:
        if not self._is_chat:
            return []
        return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}) for i in range(len(self.requests))]

    def piece(self, i: int, text: str) -> dict[str, Any] | None:
        if self._tools:
            text = self._tools[i].push(text)
            if not text:
                return None
        return self._chunk(i, {"delta": {"content": text}} if self._is_chat else {"text": text}, logprobs=self._new_logprobs(i))

    def last(self) -> list[dict[str, Any]]:
        chunks = []
        for i, request in enumerate(self.requests):
            reason = _reason(request)
            delta: dict[str, Any] = {}
            if self._tools:
                text, calls = self._tools[i].finish()
                if text:
                    delta["content"] = text
                if calls:
                    delta["tool_calls"] = [{"index": k, **call} for k, call in enumerate(calls)]
                    reason = "tool_calls"
            chunks.append(self._chunk(i, {"delta": delta} if self._is_chat else {"text": ""}, reason, self._new_logprobs(i)))
        if self._job.include_usage:
            chunks.append({**self._chunk_head, "choices": [], "usage": self.usage()})
        return chunks

    def _chunk(self, i: int, content: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        chunk = {**self._chunk_head, "choices": [{"index": i, **content, "logprobs": logprobs, "finish_reason": reason}]}
        return {**chunk, "usage": None} if self._job.include_usage else chunk

    def _new_logprobs(self, i: int) -> dict[str, Any] | None:
        """Of the tokens that no chunk had; the text may lag behind them."""
        if self._job.top is None:
            return None
        tokens = _shown(self.requests[i])[self._n_shown[i] :]
        self._n_shown[i] += len(tokens)
        if self._is_chat:
            return self._chat_logprobs(tokens)
        made = self._text_logprobs(tokens, self._offset[i])
        self._offset[i] += sum(len(t.text) for t in tokens)
        return made

    # -- choices

    def _chat_choice(self, i: int) -> dict[str, Any]:
        request = self.requests[i]
        text, calls, reason = "".join(request.pieces), list[dict[str, Any]](), _reason(request)
        if self._job.tools:
            text, calls = self._job.tools.calls(text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
            reason = "tool_calls"
        logprobs = None if self._job.top is None else self._chat_logprobs(_shown(request))
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _text_choice(self, i: int) -> dict[str, Any]:
        request = self.requests[i]
        text = "" if self._job.is_empty else "".join(request.pieces)
        logprobs = None
        if self._job.top is not None:
            tokens: list[TokenLogprob | None] = [] if self._job.is_empty else list(_shown(request))
            logprobs = self._text_logprobs([*self._prompt_logprobs(request), *tokens], 0)
        if self._job.echo:
            text = self._model.detokenize(request.prompt) + text
        reason = "length" if self._job.is_empty else _reason(request)
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob | None]:
        if request.prompt_logprobs is None:
            return []
        first = request.prompt[0]
        return [TokenLogprob(first, self._model.tokenizer.id_to_text(first), float("nan")), *request.prompt_logprobs[1:]]

    # -- log-probabilities

    def _chat_logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._named(t.token_id, t.text, t.logprob), "top_logprobs": [self._named(*top) for top in t.top[: self._job.top]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token_id: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": _finite(logprob), "bytes": list(self._model.tokenizer.token_bytes(token_id))}

    def _text_logprobs(self, tokens: Sequence[TokenLogprob | None], offset: int) -> dict[str, Any]:
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for t in tokens:
            if t is None:
                continue
            is_first = t.logprob != t.logprob  # of a prompt: it follows nothing
            made["tokens"].append(t.text)
            made["token_logprobs"].append(None if is_first else _finite(t.logprob))
            made["top_logprobs"].append(None if is_first else {text: _finite(logprob) for _, text, logprob in t.top})
            made["text_offset"].append(offset)
            offset += len(t.text)
        return made


def _shown(request: Request) -> list[TokenLogprob]:
    """Log-probabilities of the tokens so far, without the one that is no text but the end."""
    tokens = list(request.logprobs or ())
    ends = request.stop_ids if request.params.ignore_eos else request.stop_ids | request.eos_ids
    return tokens[:-1] if tokens and tokens[-1].token_id in ends else tokens


def _reason(request: Request) -> str:
    return "length" if request.finish_reason == "length" else "stop"


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity
