"""`pyruntime eval`: on a text, with --generate on answers, with --tasks on questions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from ..attention import Attention, parse_list
from ..model import Model
from . import plot
from .agreement import agree
from .fidelity import evaluate
from .progress import Bar
from .report import render, render_agreement, render_retrieval
from .retrieval import Plan, retrieve

OpenModel = Callable[[argparse.Namespace], Model]
Report = dict[str, Any]


def run(arguments: argparse.Namespace, open_model: OpenModel, text: str) -> None:
    """Does what the arguments ask for and prints the report."""
    work: Callable[[argparse.Namespace, OpenModel, str, list[Attention]], Report]
    if arguments.tasks:
        work, draw, show = _questions, plot.plot_retrieval, render_retrieval
    elif arguments.generate:
        work, draw, show = _answers, plot.plot_agreement, render_agreement
    else:
        work, draw, show = _fidelity, plot.plot, render
    if arguments.plot:
        plot.pyplot()  # says now that it is missing, not after the work
    report = work(arguments, open_model, text, parse_list(arguments.attention))
    if arguments.out and not arguments.tasks:  # questions are written one after another
        arguments.out.write_text(json.dumps(report) + "\n", encoding="utf-8")
    if arguments.plot:
        draw(report, arguments.plot)
    print(json.dumps({k: v for k, v in report.items() if k != "contexts"}) if arguments.json else show(report))


def _fidelity(arguments: argparse.Namespace, open_model: OpenModel, text: str, policies: list[Attention]) -> Report:
    n_prompt, n_decode = arguments.prompt_tokens, arguments.decode_tokens
    with _sized(arguments, open_model, n_prompt + n_decode) as model:
        bar = Bar("decoded tokens", quiet=arguments.quiet)
        ids = model.tokenize(text)
        return evaluate(
            model,
            ids,
            policies,
            n_prompt=n_prompt,
            n_decode=n_decode,
            true_mass=arguments.true_mass,
            densities=arguments.density,
            progress=bar,
        )


def _answers(arguments: argparse.Namespace, open_model: OpenModel, text: str, policies: list[Attention]) -> Report:
    with open_model(arguments) as model:
        bar = Bar("tokens", quiet=arguments.quiet)
        ids = model.tokenize(text)[: arguments.prompt_tokens]
        if arguments.ask:
            ids = model.chat_ids([{"role": "user", "content": f"{model.detokenize(ids)}\n\n{arguments.ask}"}])
        return agree(model, ids, policies, n_generate=arguments.generate, progress=bar)


def _questions(arguments: argparse.Namespace, open_model: OpenModel, text: str, policies: list[Attention]) -> Report:
    plan = Plan(
        tasks=tuple(arguments.tasks.split(",")),
        lengths=tuple(arguments.lengths),
        questions=arguments.questions,
        share=arguments.share,
        question=arguments.question,
        seed=arguments.seed,
        true_mass=arguments.true_mass,
    )
    with _sized(arguments, open_model, max(plan.lengths)) as model:
        bar = Bar("contexts", quiet=arguments.quiet)
        return retrieve(model, text, policies, plan, out=arguments.out, limit=arguments.limit, progress=bar)


def _sized(arguments: argparse.Namespace, open_model: OpenModel, n_token: int) -> Model:
    """A model with no more pages than are needed: the index of a policy takes memory for all of them."""
    if arguments.max_context is None:
        arguments.max_context = n_token
    return open_model(arguments)
