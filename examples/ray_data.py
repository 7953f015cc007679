#!/usr/bin/env python3
"""Batch inference over a file with Ray Data. Needs `pip install 'pyruntime[ray]'`.

    python examples/ray_data.py smollm2-135m prompts.jsonl answers --actors 2 --cpus 1

The input has a prompt per line, as text or as JSON with a field "prompt" (.jsonl); the output is a folder of JSON lines, the same rows with
what was generated, in the same order. Every actor opens the model once and then answers batch after batch; Ray Data hands them out, also
over the machines of a cluster, and repeats those of an actor that died.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

Batch = dict[str, Any]  # column: values


class Generate:
    """What an actor holds: the model, and how to generate."""

    def __init__(self, model: str, settings: dict[str, Any], sampling: dict[str, Any]) -> None:
        import pyruntime

        self._model, self._sampling = pyruntime.Model(model, **settings), sampling

    def __call__(self, batch: Batch) -> Batch:
        done = self._model.generate([str(prompt) for prompt in batch["prompt"]], **self._sampling)
        return {
            **batch,
            "text": [each.text for each in done],
            "finish_reason": [each.finish_reason for each in done],
            "completion_tokens": [each.usage.completion_tokens for each in done],
        }


def read(path: Path) -> Any:
    """The file as a data set with the column "prompt", whose order is kept."""
    import ray

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    if path.suffix == ".jsonl":
        return ray.data.read_json(str(path.resolve()), lines=True)
    return ray.data.read_text(str(path.resolve())).rename_columns({"text": "prompt"})


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate for every line of a file with Ray Data.")
    parser.add_argument("model", help="catalogue name, hub repository, folder or file; where the actors run, it must mean the same")
    parser.add_argument("input", type=Path, help=".jsonl with a field 'prompt', or text with a prompt per line")
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="most models at a time (default 1)")
    parser.add_argument("--cpus", type=int, default=1, metavar="N", help="cores, and threads, of each (default 1)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of each: 1, or 0 for the CPU (default 0)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="prompts that an actor gets at a time (default 64)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="(default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(default 0: greedy)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of every prompt (default 0)")
    options = parser.parse_args()

    if options.output.exists():
        parser.error(f"{options.output} exists: name another folder, or Ray Data would add to it")

    import ray

    ray.init()
    if (there := ray.cluster_resources().get("CPU", 0)) < options.cpus + 1:  # it would wait for ever
        parser.error(f"--cpus is {options.cpus} and reading and writing need one more; the cluster has {there:g}")
    answers = (
        read(options.input)
        .repartition(target_num_rows_per_block=options.batch)
        .map_batches(
            Generate,
            fn_constructor_kwargs={
                "model": options.model,
                "settings": {"device": "cuda" if options.gpus else "cpu", "threads": options.cpus},
                "sampling": {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed},
            },
            batch_size=options.batch,
            concurrency=(1, options.actors),
            num_cpus=options.cpus,
            num_gpus=options.gpus,
        )
    )
    answers.write_json(str(options.output.resolve()))
    print(f"the answers are in {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
