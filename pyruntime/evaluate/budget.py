"""The same density for every policy: the option of each that decides how much it attends to, set so that a given share of the context is
chosen. Sinks (16) and window (128) come on top and are the same for all."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..attention import Attention
from ..errors import InvalidArgumentError

COMMON = {"sinks": 16, "window": 128}
BY_MASS = ("tactic", "tactic_recycled", "oracle")  # these choose until a share p of the mass is reached
STRIDE = 50  # of Recycled Attention, as published
ROUNDS = 5  # of the search for p


def at_density(policy: Attention, target: float, *, n_context: int, n_decode: int, measure: Callable[[Attention], float]) -> Attention:
    """The policy with the option that makes it choose the share `target` of n_context rows, over n_decode tokens after a prompt.

    quest, token_select, oracle with k: `budget`. streaming: a longer `window`. recycled: `budget` of the steps that are not full; full
    steps count, so they come as seldom as it takes for them to be half of all that is read. tactic, oracle: p, which `measure` (the
    density of a policy, taken from a few steps) is searched for: what these choose varies by head and step.
    """
    if not 0 < target < 1:
        raise InvalidArgumentError(f"density is {target:g}, expected a share of the context between 0 and 1")
    given = {**COMMON, **policy.options}
    if policy.policy == "full":
        return policy
    if policy.policy == "streaming":
        return Attention(policy.policy, {**given, "window": COMMON["window"] + round(target * n_context)})
    if policy.policy in BY_MASS and (policy.policy != "oracle" or not given.keys() & {"k", "budget"}):
        return _search(Attention(policy.policy, given), target, measure)
    given = {name: value for name, value in given.items() if name != "k"}
    if policy.policy == "recycled":
        stride = int(given.get("stride", 0)) or max(STRIDE, round(2 / target))
        full = n_decode // stride / n_decode
        given |= {"stride": stride, "budget": f"{max(1e-6, (target - full) / (1 - full)):.6f}"}
    else:
        given["budget"] = f"{target:.6f}"
    return Attention(policy.policy, given)


def _search(policy: Attention, target: float, measure: Callable[[Attention], float]) -> Attention:
    """By bisection: density grows with p, about as -log(1 - p)."""
    low, high = 0.0, 5.0
    best, error = policy, float("inf")
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        tried = policy.with_options(p=f"{1 - math.exp(-middle):.4f}")
        density = measure(tried)
        if abs(density - target) < error:
            best, error = tried, abs(density - target)
        low, high = (middle, high) if density < target else (low, middle)
    return best
