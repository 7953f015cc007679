"""Questions about long contexts, made from a seed and any text as the haystack; the same seed gives the same questions.

| task | the context holds | asked is |
|---|---|---|
| needle | a sentence with a number of 7 digits per question, the haystack around them | the number |
| multikey | the same, and 8 more that nobody asks about | the number |
| multivalue | one name with 4 numbers, far apart | all 4, in their order |
| kv | nothing but pairs of 8 random hexadecimal digits | the value of a key |
| chain | VAR A = 12345, VAR B = VAR A, ... far apart, the haystack around them | the value of the last variable, or one before |
| words | made-up words, three of them frequent | those three, most frequent first |
| count | a sentence several times | how often |

Several questions may share a context. Their facts then all lie in it, so a needle among n questions has n - 1 others beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from ..errors import InvalidArgumentError

HOPS = 4  # assignments of a variable to the next in a chain
DISTRACTORS = 8
VALUES = 4

_ADJECTIVES = """
amber ancient bitter bright broken calm clever crimson curious distant eager early fearless fragile gentle golden grim hidden hollow
humble idle ivory jolly keen lively lonely lucky mellow mighty modest narrow noble odd pale patient plain proud quiet rapid restless
rusty secret silent silver simple slow solemn spare steady stormy sturdy subtle sudden tender thin tidy urgent vague vivid wandering
wild
"""
_NOUNS = """
anchor apple arrow badge barrel basket beacon bell bottle branch bridge bucket button candle canyon carpet castle cellar chimney clock
copper cradle curtain desert dragon engine falcon feather fiddle forest fountain garden glacier hammer harbor hinge island jacket kettle
ladder lantern marble meadow mirror needle orchard paddle pebble pencil pillow pocket quarry ribbon river saddle shovel spoon tunnel
valley
"""
_SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True, slots=True)
class Question:
    """What follows the context, and what must come then."""

    prompt: list[int]
    answer: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens that are read once, and the questions about them."""

    tokens: list[int]
    questions: list[Question]


@dataclass(slots=True)
class _Form:
    """What a task is made of: facts [group][sentence] (a group stays in order), the text around them, and questions with answers."""

    facts: list[list[str]]
    fill: Iterable[str]
    questions: list[tuple[str, str]]


class Haystack:
    """A text cut into sentences, as tokens; it starts over when it is shorter than a context."""

    def __init__(self, text: str, encode: Callable[[str], list[int]]) -> None:
        self.encode = encode
        self.sentences = [ids for s in re.split(r"(?<=[.!?\n])(?=\s+\S)", text) if (ids := encode(s))]
        self.n_token = sum(map(len, self.sentences))
        if not self.sentences:
            raise InvalidArgumentError("the haystack has no text in it")

    def sentences_from(self, start: int) -> Iterator[list[int]]:
        while True:
            yield from self.sentences[start:]
            start = 0


def make_context(task: str, haystack: Haystack, *, length: int, n_question: int, seed: str, begin: Sequence[int] = ()) -> Context:
    """A context with its questions; with any of them and its answer it has at most `length` tokens. begin: what every text begins with."""
    if task not in TASKS:
        raise InvalidArgumentError(f"task {task!r} is unknown, expected some of {', '.join(TASKS)}")
    rng, encode = random.Random(seed), haystack.encode
    form = TASKS[task](rng, n_question)
    questions = [Question(encode(q), encode(a), q + a) for q, a in form.questions]
    facts = [[encode(s) for s in group] for group in form.facts]
    room = length - len(begin) - max(len(q.prompt) + len(q.answer) for q in questions) - sum(map(len, chain(*facts)))
    fill = map(encode, form.fill) if form.fill else haystack.sentences_from(rng.randrange(len(haystack.sentences)))
    around: list[list[int]] = []
    for sentence in fill:
        if len(sentence) > room:
            break
        around.append(sentence)
        room -= len(sentence)
    if not around:
        raise InvalidArgumentError(f"task {task!r} with {n_question} questions does not fit {length} tokens")
    # (place, number) of every fact, in the order of their places; a group's places are sorted, so its facts keep their order
    placed = [(at, fact) for group in facts for at, fact in zip(sorted(rng.randrange(len(around) + 1) for _ in group), group, strict=True)]
    placed.sort(key=lambda item: item[0])
    tokens, done = list(begin), 0
    for at, fact in placed:
        tokens += chain(*around[done:at])
        tokens += fact
        done = at
    return Context([*tokens, *chain(*around[done:])], questions)


def _names(rng: random.Random, n: int) -> list[str]:
    first, second = _ADJECTIVES.split(), _NOUNS.split()
    return [f"{first[i // len(second)]} {second[i % len(second)]}" for i in rng.sample(range(len(first) * len(second)), n)]


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _needle(name: str, number: str) -> str:
    return f" The special magic number for {name} is {number}."


def _needle_question(name: str) -> str:
    return f" What is the special magic number for {name}? The special magic number for {name} is "


def _single(rng: random.Random, n: int, n_other: int = 0) -> _Form:
    pairs = [(name, _number(rng, 7)) for name in _names(rng, n + n_other)]
    return _Form([[_needle(*p)] for p in pairs], (), [(_needle_question(name), number) for name, number in pairs[:n]])


def _multikey(rng: random.Random, n: int) -> _Form:
    return _single(rng, n, DISTRACTORS)


def _multivalue(rng: random.Random, n: int) -> _Form:
    values = [(name, [_number(rng, 7) for _ in range(VALUES)]) for name in _names(rng, n)]
    ask = " What are all the special magic numbers for {0}? The special magic numbers for {0} are "
    facts = [[_needle(name, v) for v in numbers] for name, numbers in values]
    return _Form(facts, (), [(ask.format(name), ", ".join(numbers)) for name, numbers in values])


def _kv(rng: random.Random, n: int) -> _Form:
    def pair() -> tuple[str, str]:
        return f"{rng.getrandbits(32):08x}", f"{rng.getrandbits(32):08x}"

    def others() -> Iterator[str]:
        while True:
            yield ' "{}": "{}",'.format(*pair())

    pairs = [pair() for _ in range(n)]
    return _Form([[' "{}": "{}",'.format(*p)] for p in pairs], others(), [(f' The value of key "{k}" is "', v) for k, v in pairs])


def _chain(rng: random.Random, n: int) -> _Form:
    """A chain has one question for each of its variables, the last one's first. Another chain begins only when they are used up."""
    letters, size = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", HOPS + 1
    n_chain = -(-n // size)
    names = ["".join(letters[i // 26**k % 26] for k in range(4)) for i in rng.sample(range(26**4), n_chain * size)]
    facts, questions = [], []
    for first in range(0, len(names), size):
        variables, value = names[first : first + size], _number(rng, 5)
        facts.append([f" VAR {a} = {b}" for a, b in zip(variables, [value, *(f"VAR {v}" for v in variables[:-1])], strict=True)])
        questions += [(f" The value of VAR {v} is ", value) for v in reversed(variables)]
    return _Form(facts, (), questions[:n])


def _words(rng: random.Random, n: int) -> _Form:
    """One question whatever n is: the three words are a property of the context."""
    words = ["".join(rng.sample(_SYLLABLES, 3)) for _ in range(400)]
    frequent, others = words[:3], words[3:]

    def blocks() -> Iterator[str]:  # in each the order of the counts is the answer's, wherever the context is cut
        while True:
            block = [w for w, k in zip(frequent, (7, 5, 3), strict=True) for _ in range(k)] + rng.sample(others, 15)
            rng.shuffle(block)
            yield "".join(f" {w}" for w in block)

    question = " What are the three most frequent words above? The three most frequent words, the most frequent first, are "
    return _Form([], blocks(), [(question.rstrip(), " " + ", ".join(frequent))])


def _count(rng: random.Random, n: int) -> _Form:
    counts = [(name, rng.randrange(2, 10)) for name in _names(rng, n)]
    question = " How many times does the {0} appear? The number of times that the {0} appears is "
    return _Form([[f" Here the {name} appears."] * k for name, k in counts], (), [(question.format(name), str(k)) for name, k in counts])


TASKS: dict[str, Callable[[random.Random, int], _Form]] = {
    "needle": _single,
    "multikey": _multikey,
    "multivalue": _multivalue,
    "kv": _kv,
    "chain": _chain,
    "words": _words,
    "count": _count,
}
