"""Bodies of requests, checked by hand: what a field must be, and which option of Model.generate it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ApiError, invalid
from .tools import Tools

MAX_LOGPROBS = 20
MAX_STOP = 16
MAX_N = 128
MAX_SEQUENCES = 512  # prompts x n of one request
MAX_MESSAGES = 4096
MAX_TEXT = 65536  # characters of a stop string, regular expression, grammar or schema
MAX_LIST = 1024  # entries of logit_bias and stop_token_ids

# Fields that mean the same as in SamplingParams, which checks their ranges; those after top_k are ours.
_SAMPLING: dict[str, type] = {
    "temperature": float, "top_p": float, "presence_penalty": float, "frequency_penalty": float, "n": int, "max_tokens": int,
    "top_k": int, "min_p": float, "repetition_penalty": float, "min_tokens": int, "ignore_eos": bool, "regex": str, "grammar": str,
}  # fmt: skip
_COMMON = {*_SAMPLING, "model", "stream", "stream_options", "stop", "stop_token_ids", "seed", "logit_bias", "logprobs"}
# Without effect on the text, so they may be there.
_IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
            "prompt_cache_options"}  # fmt: skip
_CHAT = {"messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls",
         "chat_template_kwargs"}  # fmt: skip
_COMPLETION = {"prompt", "echo"}
# Allowed with the one value that asks for what happens anyway.
_ONLY: dict[str, Any] = {"modalities": ["text"], "best_of": 1, "suffix": "", "logprobs_mode": "raw_logprobs"}


@dataclass
class Job:
    """A checked request for text. top: alternatives per token that are shown; None: no logprobs."""

    model: str | None
    stream: bool
    include_usage: bool
    options: dict[str, Any]
    top: int | None = None
    prompts: list[str] | list[list[int]] = field(default_factory=list)
    echo: bool = False
    is_empty: bool = False  # max_tokens is 0: only the prompt is wanted
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: Tools | None = None
    template: dict[str, Any] = field(default_factory=dict)


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError 400 for anything else, NaN and halves of characters included."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON in UTF-8: {reason}"[:400], code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, it is {_kind(value)}", code="invalid_json")
    return {name: item for name, item in value.items() if item is not None}


def chat_job(body: Mapping[str, Any]) -> Job:
    job = _job(body, _CHAT)
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise invalid("max_completion_tokens", "and max_tokens are the same: give one of them")
        job.options["max_tokens"] = _checked(body, "max_completion_tokens", int)
    if _checked(body, "logprobs", bool):
        job.top = _ranged(body, "top_logprobs", 0, MAX_LOGPROBS) or 0
        job.options["logprobs"] = job.top
    elif "top_logprobs" in body:
        raise invalid("top_logprobs", "needs logprobs to be true")
    job.messages = messages(body)
    job.template = template_options(body)
    schema = _response_schema(body)
    if schema is not None:
        job.options["json_schema"] = schema
    _checked(body, "parallel_tool_calls", bool)
    job.tools = Tools.parse(body)
    if job.tools:
        forced = job.tools.forced_schema()
        if schema is not None or "regex" in body or "grammar" in body:
            raise invalid("tools", "cannot be combined with response_format, regex or grammar; tool_choice 'none' turns tools off")
        if forced is not None:
            job.options["json_schema"] = forced
    return job


def completion_job(body: Mapping[str, Any]) -> Job:
    job = _job(body, _COMPLETION)
    top = _ranged(body, "logprobs", 0, MAX_LOGPROBS)
    job.echo = bool(_checked(body, "echo", bool))
    job.prompts = _prompts(body)
    if top is not None:
        job.top = job.options["logprobs"] = top
        if job.echo:
            job.options["prompt_logprobs"] = top
    if job.echo and job.stream:
        raise invalid("echo", "cannot be combined with stream")
    if job.echo and job.options.get("max_tokens") == 0:
        job.is_empty, job.options["max_tokens"] = True, 1
    if len(job.prompts) * job.options.get("n", 1) > MAX_SEQUENCES:
        raise invalid("prompt", f"asks for {len(job.prompts)} x {job.options['n']} texts, at most {MAX_SEQUENCES} at once")
    return job


def messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as chat templates know them: no developers, and arguments of calls as objects. The rest is for the template to check."""
    found = _checked(body, "messages", list)
    if not found:
        raise invalid("messages", "must hold at least one message")
    if len(found) > MAX_MESSAGES:
        raise invalid("messages", f"holds {len(found)} messages, at most {MAX_MESSAGES}")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(found)]


def template_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """chat_template_kwargs: switches such as enable_thinking. No free text, which could spell control tokens."""
    given = _checked(body, "chat_template_kwargs", dict) or {}
    for name, value in given.items():
        plain = isinstance(value, (bool, int, float)) or (isinstance(value, str) and re.fullmatch(r"[\w-]{1,64}", value))
        if not re.fullmatch(r"[a-z][a-z_]{0,63}", name) or name in ("messages", "tools", "literal", "add_generation_prompt", "self"):
            raise invalid("chat_template_kwargs", f"has {name!r:.80}, which cannot be set")
        if not plain:
            raise invalid("chat_template_kwargs", f"has a {name} that is neither a number, true, false nor a word")
    return dict(given)


def token_ids(body: Mapping[str, Any], name: str) -> list[int]:
    found = _checked(body, name, list)
    if found is None or not all(_is(item, int) for item in found):
        raise invalid(name, "must be a list of token ids")
    return list(found)


def text(body: Mapping[str, Any], name: str) -> str:
    found = _checked(body, name, str)
    if found is None:
        raise invalid(name, "must be a string")
    return str(found)


def flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    found = _checked(body, name, bool)
    return default if found is None else bool(found)


def check_known(body: Mapping[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED or (name in _ONLY and value == _ONLY[name]):
            continue
        raise ApiError(400, f"{name[:80]!r} is not a parameter that this server supports", param=name[:80], code="unknown_parameter")


def _job(body: Mapping[str, Any], own: set[str]) -> Job:
    check_known(body, _COMMON | own)
    options: dict[str, Any] = {}
    for name, kind in _SAMPLING.items():
        if name in body:
            options[name] = _checked(body, name, kind)
    for name in ("regex", "grammar"):
        if len(options.get(name, "")) > MAX_TEXT:
            raise invalid(name, f"has {len(options[name])} characters, at most {MAX_TEXT}")
    _ranged(body, "n", 1, MAX_N)
    if "seed" in body:  # theirs is signed
        options["seed"] = _checked(body, "seed", int) % 2**64
    if "stop" in body:
        options["stop"] = _stop(body["stop"])
    if "stop_token_ids" in body:
        options["stop_token_ids"] = _short(token_ids(body, "stop_token_ids"), "stop_token_ids")
    if "logit_bias" in body:
        bias = _short(_checked(body, "logit_bias", dict), "logit_bias")
        if not all(re.fullmatch(r"[0-9]{1,9}", key) and _is(value, float) for key, value in bias.items()):
            raise invalid("logit_bias", "must be an object of token ids and numbers")
        options["logit_bias"] = {int(key): value for key, value in bias.items()}
    stream = flag(body, "stream", False)
    how = _checked(body, "stream_options", dict) or {}
    if how and not stream:
        raise invalid("stream_options", "needs stream to be true")
    for name in how:
        if name not in ("include_usage", "include_obfuscation"):
            raise invalid("stream_options", f"has {name!r:.80}, known is include_usage")
    include_usage = how.get("include_usage")
    if include_usage is not None and not isinstance(include_usage, bool):
        raise invalid("stream_options", "must have true or false as include_usage")
    return Job(_checked(body, "model", str), stream, bool(include_usage), options)


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content, it is {_kind(message)}", param="messages")
    made: dict[str, Any] = {key: value for key, value in message.items() if value is not None or key == "content"}
    role = made.get("role")
    if role == "developer":
        made["role"] = "system"
    elif role not in ("system", "user", "assistant", "tool"):
        raise ApiError(400, f"{where}.role is {role!r:.80}, expected system, developer, user, assistant or tool", param="messages")
    calls = made.get("tool_calls")
    if calls is None:
        return made
    if not isinstance(calls, list) or not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls):
        raise ApiError(400, f"{where}.tool_calls must be a list of calls, each with a function", param="messages")
    if made["role"] != "assistant":
        raise ApiError(400, f"{where} has tool_calls, which only an assistant can have", param="messages")
    made["tool_calls"] = [{**c, "function": {**c["function"], "arguments": _arguments(where, c["function"])}} for c in calls]
    if not calls:
        del made["tool_calls"]
    return made


def _arguments(where: str, function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where}.tool_calls: a function needs a name and arguments that are a JSON object", param="messages")
    return arguments


def _response_schema(body: Mapping[str, Any]) -> dict[str, Any] | None:
    given = _checked(body, "response_format", dict)
    kind = given.get("type") if given is not None else "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise invalid("response_format", f"has type {kind!r:.80}, expected text, json_object or json_schema")
    assert given is not None
    wrapped = given.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise invalid("response_format", "of type json_schema needs json_schema.schema, an object")
    if len(json.dumps(schema)) > MAX_TEXT:
        raise invalid("response_format", f"has a schema of more than {MAX_TEXT} characters")
    return schema


def _prompts(body: Mapping[str, Any]) -> list[str] | list[list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt):
            return _limited(prompt)
        if all(_is(item, int) for item in prompt):
            return [prompt]
        if all(isinstance(item, list) and item and all(_is(i, int) for i in item) for item in prompt):
            return _limited(prompt)
    raise invalid("prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists")


def _limited(prompts: list[Any]) -> list[Any]:
    if len(prompts) > MAX_SEQUENCES:
        raise invalid("prompt", f"is a list of {len(prompts)}, at most {MAX_SEQUENCES}")
    return prompts


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= 1024 for s in stops):
        raise invalid("stop", "must be a string or a list of strings of 1 to 1024 characters")
    if len(stops) > MAX_STOP:
        raise invalid("stop", f"holds {len(stops)} strings, at most {MAX_STOP}")
    return stops


def _short(value: Any, name: str) -> Any:
    if len(value) > MAX_LIST:
        raise invalid(name, f"has {len(value)} entries, at most {MAX_LIST}")
    return value


def _ranged(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    value = _checked(body, name, int)
    if value is not None and not low <= value <= high:
        raise invalid(name, f"is {value}, expected an integer from {low} to {high}")
    return value if value is None else int(value)


_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object"}


def _checked(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """body[name], or None; of the kind, or an ApiError."""
    value = body.get(name)
    if value is not None and not _is(value, kind):
        raise invalid(name, f"must be {_NAMES[kind]}, it is {_kind(value)}")
    return value


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
