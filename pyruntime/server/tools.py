"""Tools: what the chat template is told of them, and the calls in what the model answers."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import invalid

MAX_TOOLS = 128
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_MARKS = (_OPEN, "[TOOL_CALLS]")


@dataclass
class Tools:
    """functions: as OpenAI describes them.  forced: the one that must be called, "" for any; None: the model decides."""

    functions: list[dict[str, Any]]
    forced: str | None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Tools | None:
        given, choice = body.get("tools"), body.get("tool_choice")
        if given is None or given == []:
            if choice not in (None, "none", "auto"):
                raise invalid("tool_choice", "needs tools")
            return None
        if not isinstance(given, list) or len(given) > MAX_TOOLS:
            raise invalid("tools", f"must be a list of at most {MAX_TOOLS} functions")
        for i, tool in enumerate(given):
            function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
                raise invalid("tools", f"[{i}] must be of type function and have a function with a name of letters, digits, _ and -")
            assert isinstance(function, dict)
            if not isinstance(function.get("parameters", {}), dict) or not isinstance(function.get("description", ""), str):
                raise invalid("tools", f"[{i}].function must have an object as parameters and a string as description")
        names = [tool["function"]["name"] for tool in given]
        if choice in (None, "auto"):
            return cls(given, None)
        if choice == "none":
            return None
        if choice == "required":
            return cls(given, "")
        named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = named.get("name") if isinstance(named, dict) else None
        if name not in names:
            raise invalid("tool_choice", "must be 'none', 'auto', 'required', or {type: function, function: {name}} with one of the tools")
        return cls(given, name)

    def forced_schema(self) -> dict[str, Any] | None:
        """The schema of a call, if there must be one."""
        if self.forced is None:
            return None
        schemas = [
            {
                "type": "object",
                "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in (tool["function"] for tool in self.functions)
            if self.forced in ("", f["name"])
        ]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def calls(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """(text without the calls, the calls): <tool_call> {...} </tool_call> as Qwen and Hermes write them, or, as Llama and Mistral do,
        nothing but JSON. What is no call of a known function stays text."""
        found: list[dict[str, Any]] = []
        if _OPEN in text:
            rest = []
            head, *blocks = text.split(_OPEN)
            for block in blocks:
                inner, _, after = block.partition(_CLOSE)
                calls = self._read(inner)
                found += calls
                rest.append(after if calls else _OPEN + block)
            text = head + "".join(rest)
        else:
            found = self._read(text.strip().removeprefix("[TOOL_CALLS]"))
            text = "" if found else text
        return (text.strip() if found else text), found

    def _read(self, text: str) -> list[dict[str, Any]]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        names = {tool["function"]["name"] for tool in self.functions}
        calls = []
        for item in value if isinstance(value, list) else [value]:
            arguments = item.get("arguments", item.get("parameters", {})) if isinstance(item, dict) else None
            if not isinstance(arguments, dict) or item.get("name") not in names:
                return []
            function = {"name": item["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return calls


class ToolStream:
    """Lets text through as long as it cannot be part of a call."""

    def __init__(self, tools: Tools) -> None:
        self._tools, self._held, self._is_call, self._begun = tools, "", False, False

    def push(self, text: str) -> str:
        self._held += text
        if self._is_call:
            return ""
        stripped = self._held.lstrip()
        if not self._begun and (not stripped or stripped[0] in "{["):
            self._is_call = bool(stripped)
            return ""
        self._begun = True
        cut = len(self._held)
        for mark in _MARKS:
            at = self._held.find(mark)
            if at >= 0:
                cut, self._is_call = min(cut, at), True
            else:
                overlap = next((n for n in range(min(len(mark) - 1, len(self._held)), 0, -1) if self._held.endswith(mark[:n])), 0)
                cut = min(cut, len(self._held) - overlap)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """(text that was held and is no call, the calls)."""
        return self._tools.calls(self._held)
