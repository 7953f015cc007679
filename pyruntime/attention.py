"""Attention policies as users write them: "full", "tactic", "tactic:p=0.75,cluster=32", or {"policy": "tactic", "p": 0.75}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import _abi
from .errors import InvalidArgumentError

_POLICIES = {"full": _abi.PRT_ATTENTION_FULL, "tactic": _abi.PRT_ATTENTION_TACTIC}
_ESTIMATORS = {"fit": _abi.PRT_ESTIMATOR_FIT, "moment": _abi.PRT_ESTIMATOR_MOMENT}
_NUMBERS = ("cluster", "segment", "iterations", "sinks", "window", "min_context", "dense_layers", "seed")
_OPTIONS = ("p", *_NUMBERS, "estimator", "tail", "measure", "selected")
_SWITCH = {"0": False, "1": True, "false": False, "true": True, "off": False, "on": True}


class Attention:
    """One policy with all its values; the defaults are the library's. `str()` gives back the short form."""

    def __init__(self, policy: str, options: Mapping[str, Any]) -> None:
        if policy not in _POLICIES:
            raise InvalidArgumentError(f"attention policy {policy!r} is unknown, expected {' or '.join(map(repr, _POLICIES))}")
        self.policy = policy
        self.options = dict(options)
        if policy == "full" and options:
            raise InvalidArgumentError(f"attention 'full' takes no options, got {', '.join(options)}")
        self.struct = _abi.prt_attention(policy=_POLICIES[policy])
        for name, value in options.items():
            if name not in _OPTIONS:
                raise InvalidArgumentError(f"attention {policy!r} has no option {name!r}, expected some of {', '.join(_OPTIONS)}")
            setattr(self.struct, name, _READ.get(name, _integer)(name, value))

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
                    f"attention is {value!r}, its 'policy' is {policy!r}, expected {' or '.join(map(repr, _POLICIES))}"
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

    def __str__(self) -> str:
        return self.policy + (":" + ",".join(f"{k}={_text(v)}" for k, v in self.options.items()) if self.options else "")

    def __repr__(self) -> str:
        return f"<Attention {self}>"


def parse_list(text: str) -> list[Attention]:
    """Policies separated by commas; a part with = but without a policy's name belongs to the one before: "full,tactic:p=0.5,tail=0"."""
    specs: list[str] = []
    for part in filter(None, text.split(",")):
        if specs and part.partition(":")[0] not in _POLICIES:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return [Attention.parse(s) for s in specs]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _real(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0 < number <= 1:
        raise InvalidArgumentError(f"attention option {name} is {value!r}, expected a number above 0 and up to 1")
    return number


def _integer(name: str, value: Any) -> int:
    most = 2**63 - 1 if name == "seed" else 2**31 - 1
    try:
        number = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else -1
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise InvalidArgumentError(f"attention option {name} is {value!r}, expected an integer from 0 to {most}")
    return number


def _switch(name: str, value: Any) -> bool:
    result = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
    if result is None:
        raise InvalidArgumentError(f"attention option {name} is {value!r}, expected true or false")
    return result


def _estimator(name: str, value: Any) -> int:
    if value not in _ESTIMATORS:
        raise InvalidArgumentError(f"attention option {name} is {value!r}, expected {' or '.join(map(repr, _ESTIMATORS))}")
    return _ESTIMATORS[value]


_READ: dict[str, Any] = {"p": _real, "selected": _real, "estimator": _estimator, "tail": _switch, "measure": _switch}
