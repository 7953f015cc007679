#!/usr/bin/env python3
"""Several replicas of a model behind one address, with Ray Serve. Needs `pip install 'pyruntime[ray]'`.

    python examples/ray_serve.py smollm2-135m --replicas 2,4 --cpus 1

Every replica is a pyruntime.Model in a process of its own, wherever the Ray cluster has room, and answers what `pyruntime serve` does:
chat, completions, streams, tools, JSON schemas. Inside a replica, requests share every step of the model; between them, Ray's proxy sends
each request to the less busy of two. Replicas are added while there are more than --target requests in progress for each, and ended when
there are fewer. A replica that dies is replaced.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Serve replicas of a model with Ray Serve, on this machine or the Ray cluster it is part of."
    )
    parser.add_argument("model", help="catalogue name, hub repository, folder or file; where the replicas run, it must mean the same")
    parser.add_argument("--replicas", default="1,4", metavar="MIN,MAX", help="(default 1,4)")
    parser.add_argument("--target", type=float, default=8, metavar="N", help="requests in progress per replica to aim at (default 8)")
    parser.add_argument("--cpus", type=int, default=2, metavar="N", help="cores, and threads, of a replica (default 2)")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs of a replica: 1, or 0 for the CPU (default 0)")
    parser.add_argument("--max-context", type=int, metavar="N", help="most tokens of a sequence (default: the model's own, or what fits)")
    parser.add_argument("--attention", default="full", metavar="A", help="full (default), tactic, tactic:p=0.75, ...")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address of the proxy (default 127.0.0.1); others need --api-key")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="(default 8000)")
    parser.add_argument("--api-key", metavar="@FILE", help="a file with the key that clients must send")
    return parser.parse_args()


def application(options: argparse.Namespace, api_key: str | None) -> Any:
    """The deployment: how a replica is made, what it takes, and how many there are."""
    from ray import serve

    fewest, most = map(int, options.replicas.split(","))

    def replica() -> Any:  # runs in every replica when it starts
        import pyruntime
        from pyruntime.server import Settings, asgi_app

        model = pyruntime.Model(
            options.model,
            device="cuda" if options.gpus else "cpu",
            threads=options.cpus,
            max_context=options.max_context,
            attention=options.attention,
        )
        return asgi_app(model, Settings(name=Path(options.model).name, api_key=api_key))

    deployment = serve.deployment(
        name="model",
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        autoscaling_config={
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": options.target,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        },
        max_ongoing_requests=128,  # of one replica; the proxy holds the others back
        graceful_shutdown_timeout_s=60,
    )
    return deployment(serve.ingress(replica)()).bind()


def main() -> int:
    options = arguments()
    if options.api_key is None and options.host != "127.0.0.1":
        print(f"{options.host} can be reached from other machines: give --api-key @FILE", file=sys.stderr)
        return 2
    api_key = Path(options.api_key.removeprefix("@")).read_text().strip() if options.api_key else None

    from ray import serve

    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(application(options, api_key), name="pyruntime", route_prefix="/")
    print(f"{options.model} is served at http://{options.host}:{options.port}/v1; Ctrl-C stops", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
