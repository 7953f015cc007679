"""The examples for Ray, run as their pages say. They need the extra `ray`; .ci/run has an environment of its own for them.

cd tests && python -m pytest -q test_ray.py
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import pyruntime

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'pyruntime[ray]' (.ci/run does, in a step of its own)")
pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPTS = ["One, two,", "The sky is", "Water boils at", "My name is", "In the year 1969", "Once upon a time"]
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """What one model in one process says."""
    with pyruntime.Model(MODEL, max_context=512, threads=1) as model:
        return [done.text for done in model.generate(PROMPTS, max_tokens=8, temperature=0)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One for all: the programs inherit its address and Ray's token for it. Its four "CPUs" are places for actors, not cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    ray.shutdown()
    del os.environ["RAY_ADDRESS"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """ray_serve.py with two replicas."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, EXAMPLES / "ray_serve.py", MODEL, "--replicas", "2,2", "--cpus", "1", "--max-context", "512", "--port", port]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(180):
                assert process.poll() is None and time.sleep(1) is None, (folder / "log").read_text()
                if "is served at" in (folder / "log").read_text():
                    break
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, (folder / "log").read_text()


def test_serve_answers_like_one_model(server: str, alone: list[str]) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:

        def ask(prompt: str) -> str:
            return client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0).choices[0].text

        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            for _ in range(3):
                assert list(pool.map(ask, PROMPTS)) == alone

        said = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0)
        assert said.choices[0].message.content and said.usage and said.usage.completion_tokens == 4
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model=MODEL, prompt="x", temperature=-1)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="x")


def test_serve_streams(server: str, alone: list[str]) -> None:
    """Piece by piece: the first one is there well before the last."""
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
        stream = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=8, temperature=0, stream=True)
        pieces = [(time.perf_counter(), chunk.choices[0].text) for chunk in stream if chunk.choices]
    assert "".join(text for _, text in pieces) == alone[0]
    assert len({when for when, text in pieces if text}) >= 6 and pieces[-1][0] - pieces[0][0] > 0.01


def test_serve_uses_both_replicas(server: str) -> None:
    """Each counts for itself; which one answers is Ray's choice."""
    prompts = ["One"] * 31 + ["two " * 400]  # whoever gets the last one has counted more than the other
    with httpx.Client(base_url=server, timeout=120) as web:

        def count() -> int:
            return int(re.findall(r"^pyruntime_prompt_tokens_total (\d+)", web.get("/metrics").text, re.MULTILINE)[0])

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            done = pool.map(lambda p: web.post("/v1/completions", json={"prompt": p, "max_tokens": 2}).status_code, prompts)
        assert set(done) == {200}
        assert len({count() for _ in range(40)}) == 2


def test_data(tmp_path: Path, alone: list[str]) -> None:
    """A file of prompts, in batches of two by two actors: the rows in their order, with the fields they had."""
    rows = [{"id": 7 * i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, EXAMPLES / "ray_data.py", MODEL, "prompts.jsonl", "answers"]
    command += ["--actors", "2", "--cpus", "1", "--batch", "2", "--max-tokens", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for path in sorted((tmp_path / "answers").iterdir()) for line in path.read_text().splitlines()]
    assert [{key: row[key] for key in ("id", "prompt")} for row in found] == rows
    assert [row["text"] for row in found] == alone and {row["completion_tokens"] for row in found} == {8}
    for wrong, option in (("exists", "1"), ("the cluster has 4", "4")):
        command[4], command[8] = "answers" if option == "1" else "other", option
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and wrong in done.stderr, done.stderr


def test_data_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import ray_data

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    assert ray_data.read(tmp_path / "prompts.txt").take_all() == [{"prompt": prompt} for prompt in PROMPTS]
