"""Attention policies as users write them: "full", "tactic", "recycled:stride=10,k=2048", or {"policy": "tactic", "p": 0.75}."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from typing import Any

from . import _abi
from ._lib import check, lib
from .errors import InvalidArgumentError

POLICIES = tuple(
    name.removeprefix("PRT_ATTENTION_").lower() for name in vars(_abi) if re.fullmatch(r"PRT_ATTENTION_[A-Z_]+", name)
)  # the library knows them, and what they take


class Attention:
    """One policy with all its values; names, defaults and checks are the library's. `str()` gives back the short form."""

    def __init__(self, policy: str, options: Mapping[str, Any]) -> None:
        self.policy = policy
        self.options = dict(options)
        for name, value in self.options.items():
            if re.search(r"[,=:]", f"{name}{_text(value)}"):
                raise InvalidArgumentError(f"attention option {name} is {value!r}, expected one value")
        self.struct = _abi.prt_attention()
        check(lib().prt_attention_parse(str(self).encode(), ctypes.byref(self.struct)))

    @classmethod
    def parse(cls, value: Any) -> Attention:
        """From "NAME", "NAME:key=value,key=value", a mapping with the key "policy", or an Attention."""
        if isinstance(value, Attention):
            return value
        if isinstance(value, Mapping):
            options = dict(value)
            policy = options.pop("policy", None)
            if not isinstance(policy, str):
                raise InvalidArgumentError(
                    f"attention is {value!r}, its 'policy' is {policy!r}, expected one of {', '.join(map(repr, POLICIES))}"
                )
            return cls(policy, options)
        if not isinstance(value, str):
            raise InvalidArgumentError(f"attention is {value!r}, expected a name such as 'tactic', or a dictionary with the key 'policy'")
        policy, _, rest = value.partition(":")
        options = {}
        for part in filter(None, rest.split(",")):
            name, equals, text = part.partition("=")
            if not equals:
                raise InvalidArgumentError(f"attention {value!r}: {part!r} is not of the form key=value")
            if name in options:
                raise InvalidArgumentError(f"attention {value!r}: {name} is given twice")
            options[name] = text
        return cls(policy, options)

    def with_options(self, **options: Any) -> Attention:
        """The same policy with some options changed or added."""
        return Attention(self.policy, {**self.options, **options})

    def __str__(self) -> str:
        return self.policy + (":" + ",".join(f"{k}={_text(v)}" for k, v in self.options.items()) if self.options else "")

    def __repr__(self) -> str:
        return f"<Attention {self}>"


def parse_list(text: str) -> list[Attention]:
    """Policies separated by commas; a part with = but without a policy's name belongs to the one before: "full,tactic:p=0.5,tail=0"."""
    specs: list[str] = []
    for part in filter(None, text.split(",")):
        if specs and part.partition(":")[0] not in POLICIES:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return [Attention.parse(s) for s in specs]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
