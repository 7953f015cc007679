"""The `pyruntime` command. Everything heavy is imported by the subcommand that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InvalidArgumentError, PyruntimeError

_EXAMPLES = """\
examples:
  pyruntime run smollm2-135m --chat "What is the capital of France?"
  pyruntime chat smollm2-135m --system "Answer in one sentence."
  pyruntime serve smollm2-135m --port 8000
  pyruntime run ./my-model "Once upon a time" --max-tokens 64 --temperature 0
  pyruntime perplexity smollm2-135m --file book.txt --tokens 2048
  pyruntime info
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 stopped by Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? where it can't show a character
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.command(arguments))
    except PyruntimeError as error:
        print(f"pyruntime: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\npyruntime: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: not worth a traceback
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, say
        print(f"pyruntime: error: {error.strerror or error}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line. Wrong ones end the process with code 2, as argparse does."""
    parser = _parser()
    # argparse gives up on an optional positional that comes after options ("run MODEL --chat PROMPT"): it lands in `rest`. The "--" before
    # a prompt that starts with a dash is handled here, because what argparse does with it then differs between Python versions.
    words, tail = list(argv), list[str]()
    if words[:1] == ["run"] and words[-2:-1] == ["--"]:
        words, tail = words[:-2], words[-1:]
    arguments, rest = parser.parse_known_args(words)
    rest += tail
    if rest and getattr(arguments, "prompt", "") is None and (rest == tail or rest[0] == "-" or not rest[0].startswith("-")):
        arguments.prompt = rest.pop(0)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="pyruntime",
        description="A lightweight long-context LLM runtime.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pyruntime {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="generate text from a prompt")
    _model_arguments(run)
    run.add_argument("prompt", nargs="?", help="the prompt; - or nothing: read it from stdin")
    run.add_argument("--file", type=Path, metavar="F", help="put this text file before the prompt")
    run.add_argument("--chat", action="store_true", help="answer the prompt as a chat message, through the model's chat template")
    run.add_argument("--system", metavar="TEXT", help="system message (with --chat)")
    run.add_argument("--json", action="store_true", help="print the completion as one JSON object instead of streaming text")
    _sampling_arguments(run)
    run.set_defaults(command=_run)

    chat = commands.add_parser("chat", help="talk with a model in the terminal; /help there lists the commands")
    _model_arguments(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--load", type=Path, metavar="FILE", help="go on from a conversation that /save wrote")
    _sampling_arguments(chat)
    chat.set_defaults(command=_chat)

    serve = commands.add_parser("serve", help="serve a model over HTTP as OpenAI does, with a chat page (needs the extra 'server')")
    _model_arguments(serve)
    server = serve.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default 127.0.0.1); others need --api-key")
    server.add_argument("--port", type=int, default=8000, metavar="P", help="(default 8000; 0: a free one)")
    server.add_argument("--api-key", metavar="KEY", help="what clients must send; @FILE reads it from a file, where no other user sees it")
    server.add_argument("--name", metavar="NAME", help="what clients call the model (default: its own name)")
    server.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait to begin (default 256)")
    server.add_argument("--prefix-cache", type=int, metavar="N", help="tokens kept for later prompts that begin alike (0: none)")
    server.add_argument("--max-body", type=int, default=8, metavar="MIB", help="size of a request (default 8)")
    server.add_argument("--grace", type=int, default=30, metavar="S", help="seconds for answers to end when stopped (default 30)")
    server.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="let web pages of this origin in (may be repeated)")
    serve.set_defaults(command=_serve)

    pull = commands.add_parser("pull", help="download a model")
    pull.add_argument("model", help="catalogue name or hub repository")
    pull.set_defaults(command=_pull)

    listing = commands.add_parser("list", help="list the models known by name")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_list)

    info = commands.add_parser("info", help="show build, devices, environment and, if named, a model's facts")
    info.add_argument("model", nargs="?", help="also describe this model (nothing is downloaded)")
    info.add_argument("--json", action="store_true")
    info.set_defaults(command=_info)

    perplexity = commands.add_parser("perplexity", help="perplexity of a text file")
    _model_arguments(perplexity)
    perplexity.add_argument("--file", type=Path, required=True, metavar="F")
    perplexity.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens (default: all)")
    perplexity.add_argument("--json", action="store_true")
    perplexity.set_defaults(command=_perplexity)

    evaluate = commands.add_parser(
        "eval", help="compare sparse attention with dense attention: on a text, or with --tasks on questions about a long context"
    )
    _model_arguments(evaluate, attention=False)
    evaluate.add_argument("--file", type=Path, required=True, metavar="F", help="the text; with --tasks what the facts are hidden in")
    evaluate.add_argument("--attention", default="tactic", metavar="A,B,...", help="policies, e.g. tactic:p=0.5,tactic:p=0.9,tail=0")
    evaluate.add_argument("--true-mass", action=argparse.BooleanOptionalAction, default=True, help="measure the softmax mass attended to")
    evaluate.add_argument("--json", action="store_true")
    evaluate.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON there; with --tasks, go on from what is in it")
    evaluate.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it (needs matplotlib: the extra 'plot')")
    text = evaluate.add_argument_group("on a text")
    text.add_argument("--prompt-tokens", type=int, default=7936, metavar="N", help="read densely (default 7936)")
    text.add_argument("--decode-tokens", type=int, default=64, metavar="M", help="then decoded one by one, sparsely (default 64)")
    text.add_argument(
        "--density", type=_share_list, default=[], metavar="P,..", help="each policy with so many percent of the context chosen"
    )
    text.add_argument("--generate", type=int, metavar="N", help="instead, N tokens as each policy would go on: how long they are the same")
    text.add_argument("--ask", metavar="QUESTION", help="with --generate: the text and this question are a chat message")
    tasks = evaluate.add_argument_group("on questions")
    tasks.add_argument("--tasks", metavar="T,..", help="needle, multikey, multivalue, kv, chain, words, count")
    tasks.add_argument("--lengths", type=_int_list, default=[8192], metavar="N,..", help="tokens of context and question (default 8192)")
    tasks.add_argument("--questions", type=int, default=50, metavar="N", help="of each kind and length (default 50)")
    tasks.add_argument("--limit", type=int, metavar="N", help="ask only the first N of them in this run")
    tasks.add_argument("--share", type=int, default=5, metavar="N", help="questions about one context, which is read once (default 5)")
    tasks.add_argument("--question", choices=("sparse", "dense"), default="sparse", help="how its last 24 tokens are read (default sparse)")
    tasks.add_argument("--seed", type=int, default=0, metavar="S", help="other questions (default 0)")
    evaluate.set_defaults(command=_eval)

    bench = commands.add_parser("bench", help="measure prefill and decode speed")
    _model_arguments(bench)
    bench.add_argument("-p", "--n-prompt", type=_int_list, default=[512], metavar="N,..", help="prompt tokens (default 512; 0: skip)")
    bench.add_argument("-n", "--n-gen", type=_int_list, default=[128], metavar="N,..", help="generated tokens (default 128; 0: skip)")
    bench.add_argument("-d", "--n-depth", type=_int_list, default=[0], metavar="N,..", help="tokens already in the cache (default 0)")
    bench.add_argument("-b", "--batch", type=_int_list, default=[1], metavar="N,..", help="sequences decoded together (default 1)")
    bench.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="(default 5)")
    bench.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md")
    bench.set_defaults(command=_bench)
    return parser


def _int_list(text: str) -> list[int]:
    """ "0,8192" -> [0, 8192]"""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a list of numbers with commas") from None


def _share_list(text: str) -> list[float]:
    """ "1,2.5" (percent) -> [0.01, 0.025]"""
    try:
        return [float(item) / 100 for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage or a list of them with commas") from None


def _model_arguments(parser: argparse.ArgumentParser, *, attention: bool = True) -> None:
    parser.add_argument("model", help="catalogue name, hub repository (org/name), folder, or .gguf file")
    group = parser.add_argument_group("model")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    group.add_argument("--dtype", default="auto", help="auto, bf16, f16 or f32: weights and KV cache (default auto)")
    group.add_argument("--max-context", type=int, metavar="N", help="most tokens of a sequence (default: the model's own, or what fits)")
    if attention:
        group.add_argument(
            "--attention", default="full", metavar="A", help="of decoded tokens: full (default), tactic:p=0.75, recycled, ..."
        )
    group.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    group.add_argument("--offline", action="store_true", help="use only what is on disk")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, no timings on stderr")


_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "seed", "stop", "ignore_eos", "min_tokens", "json_schema", "regex", "grammar")  # fmt: skip


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="most new tokens (default: until the end token)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R")
    sampling.add_argument("--presence-penalty", type=float, metavar="R")
    sampling.add_argument("--frequency-penalty", type=float, metavar="R")
    sampling.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)")
    sampling.add_argument("--min-tokens", type=int, metavar="N", help="no end before that many")
    sampling.add_argument("--json-schema", metavar="JSON", help="answer with JSON of this schema; @FILE reads it from a file")
    sampling.add_argument("--regex", metavar="R", help="answer with text that matches this regular expression; @FILE as above")
    sampling.add_argument("--grammar", metavar="LARK", help="answer with text of this grammar; @FILE as above")
    sampling.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end token")


def _sampling_options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in _SAMPLING}
    for name in ("json_schema", "regex", "grammar"):
        if options[name] and options[name].startswith("@"):
            options[name] = _read_text(Path(options[name][1:]))
    return options


def _open(arguments: argparse.Namespace) -> Any:
    from .model import Model

    given = {} if arguments.command is _eval else {"attention": arguments.attention}
    if arguments.command is _serve:
        given |= {"max_queue": arguments.max_queue, "prefix_cache": arguments.prefix_cache}
    model = Model(
        arguments.model,
        **given,
        device=arguments.device,
        dtype=arguments.dtype,
        max_context=arguments.max_context,
        threads=arguments.threads,
        offline=arguments.offline,
        progress=not arguments.quiet,
    )
    if not arguments.quiet:
        stats = model.stats()
        threads = f", {stats['n_threads']} threads" if model.device == "cpu" else ""
        print(f"{model.name} on {model.device}{threads}, {model.dtype}, max_context {model.max_context}", file=sys.stderr)
    return model


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error.strerror})") from None


def _run(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    prompt = arguments.prompt
    if prompt in (None, "-"):
        if sys.stdin is None or sys.stdin.isatty():
            raise InvalidArgumentError("no prompt: give it as an argument or on stdin")
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"stdin: is not UTF-8 text (byte {error.start})") from None
    if arguments.file:
        prompt = _read_text(arguments.file) + ("\n\n" + prompt if prompt else "")
    if arguments.system is not None and not arguments.chat:
        raise InvalidArgumentError("--system needs --chat")
    options = _sampling_options(arguments)
    with _open(arguments) as model:
        messages = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
        messages.append({"role": "user", "content": prompt})

        def start(**how: Any) -> Any:
            return model.chat(messages, **how, **options) if arguments.chat else model.generate(prompt, **how, **options)

        if arguments.json:
            completion = start()
            print(json.dumps(asdict(completion)))
            return 0
        stream = start(stream=True)
        code = 0
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            code = 130
        print(flush=True)
        if not arguments.quiet:
            done = stream.completion
            t, usage = done.timings, done.usage
            print(
                f"[{usage.prompt_tokens} prompt tokens at {t.prefill_tok_s:.1f} tok/s, first token after {t.time_to_first_token:.2f} s; "
                f"{usage.completion_tokens} new tokens at {t.decode_tok_s:.1f} tok/s; "
                f"{'stopped by Ctrl-C' if code else done.finish_reason}]",
                file=sys.stderr,
            )
    return code


def _chat(arguments: argparse.Namespace) -> int:
    from . import terminal
    from .conversation import Conversation

    with _open(arguments) as model:
        conversation = Conversation(model, system=arguments.system, **_sampling_options(arguments))
        if arguments.load:
            said = terminal.load(model, conversation, arguments.load)
            if arguments.system is not None:
                conversation.set_system(arguments.system)
            if not arguments.quiet:
                print(said, file=sys.stderr)
        return terminal.chat(model, conversation, quiet=arguments.quiet)


def _serve(arguments: argparse.Namespace) -> int:
    from .server import Settings, serve

    if not 1 <= arguments.max_body <= 1024 or not 0 <= arguments.grace <= 86400:
        raise InvalidArgumentError(f"--max-body is {arguments.max_body} and --grace {arguments.grace}, expected 1 to 1024 and 0 to 86400")
    key = arguments.api_key
    if key and key.startswith("@"):
        key = _read_text(Path(key[1:])).strip()
    settings = Settings(arguments.name, key, arguments.host, arguments.max_body << 20, tuple(arguments.cors))
    serve(
        lambda: _open(arguments),
        settings,
        port=arguments.port,
        grace=arguments.grace,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from . import catalog, download

    print(download.fetch(catalog.resolve(arguments.model)))
    return 0


def _list(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from . import catalog

    entries = catalog.entries()
    if arguments.json:
        print(json.dumps([asdict(e) for e in entries]))
        return 0
    width = max(len(e.name) for e in entries)
    for e in entries:
        gated = " (gated: needs an account and a token)" if e.gated else ""
        print(f"{e.name:{width}}  {e.size_gb:6.1f} GB  {e.context:>7} tokens  {e.license:12}  {e.about}{gated}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    import json

    from . import env
    from ._lib import build_info, devices, library_path

    report: dict[str, Any] = {
        "build": {**build_info(), "library": str(library_path())},
        "devices": [
            {
                "id": d.id.decode(),
                "name": d.name.decode(),
                "features": d.features.decode(),
                "memory_total": d.memory_total,
                "memory_free": d.memory_free,
                "usable": bool(d.usable),
                "note": d.note.decode(),
            }
            for d in devices()
        ],
        "environment": {name: value for name, value, _ in env.describe()},
    }
    if arguments.model:
        report["model"] = _model_facts(arguments.model)
    if arguments.json:
        print(json.dumps(report, default=str))
        return 0
    print("build")
    for key, value in report["build"].items():
        print(f"  {key:20} {value}")
    print("devices")
    for d in report["devices"]:
        note = "" if d["usable"] else f"  NOT USABLE: {d['note']}"
        print(f"  {d['id']:20} {d['name']} ({d['features']}), {d['memory_free'] >> 20} of {d['memory_total'] >> 20} MiB free{note}")
    print("environment")
    for name, value, meaning in env.describe():
        print(f"  {name:20} {value or '-':12} {meaning}")
    if arguments.model:
        print("model")
        for key, value in report["model"].items():
            print(f"  {key:20} {value}")
    return 0


def _model_facts(name: str) -> dict[str, Any]:
    from dataclasses import asdict

    from . import catalog, download
    from .checkpoint import open_checkpoint

    with open_checkpoint(download.fetch(catalog.resolve(name), progress=False, offline=True)) as checkpoint:
        parameters = 0
        for shape in checkpoint.config.tensor_shapes().values():
            size = 1
            for n in shape:
                size *= n
            parameters += size
        facts = {"path": checkpoint.path, "kind": checkpoint.kind, "parameters": parameters, "context": checkpoint.config.context_length}
        return {**facts, **asdict(checkpoint.config), "eos_ids": checkpoint.eos_ids, "generation": checkpoint.generation_config}


def _perplexity(arguments: argparse.Namespace) -> int:
    import json
    import time

    text = _read_text(arguments.file)
    with _open(arguments) as model:
        ids = model.tokenize(text, add_special_tokens=False)
        started = time.perf_counter()
        value = model.perplexity(ids, max_tokens=arguments.tokens)
        seconds = time.perf_counter() - started
        n = arguments.tokens or len(ids)
        if arguments.json:
            print(json.dumps({"perplexity": value, "tokens": n, "seconds": seconds, "file": str(arguments.file), "model": model.name}))
        else:
            print(f"{value:.4f}")
            if not arguments.quiet:
                print(f"[{n} of {len(ids)} tokens, {n / seconds:.1f} tok/s]", file=sys.stderr)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from .evaluate import command

    command.run(arguments, _open, _read_text(arguments.file))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench import bench, render

    with _open(arguments) as model:
        rows = bench(
            model,
            n_prompt=arguments.n_prompt,
            n_gen=arguments.n_gen,
            depth=arguments.n_depth,
            batch=arguments.batch,
            repetitions=arguments.repetitions,
        )
    print(render(rows, arguments.output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
