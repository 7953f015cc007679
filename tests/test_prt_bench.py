"""prt-bench, the scripts that compare it with others, and the report of a GPU."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyruntime import errors
from pyruntime.bench import native_path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "bench" / "peers")]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def prt_bench() -> Run:
    try:
        program = native_path()
    except errors.InternalError as error:
        pytest.skip(str(error))

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    return run


TINY = ("--config", "tiny", "--device", "cpu", "-t", "1", "-r", "2")


def test_rows(prt_bench: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = prt_bench(*TINY, "-p", "16,40", "-n", "4", "-d", "0,70", "-b", "1,2", "-o", "json", "--commit", 'a"b', "--out", str(file))
    result = json.loads(done.stdout)
    names = [f"{test}{depth}{batch}" for depth in ("", " @ d70") for batch in ("", " b2") for test in ("pp16", "pp40", "tg4")]
    assert [t["test"] for t in result["tests"]] == names
    for t in result["tests"]:
        assert len(t["tok_s"]) == 2 and min(t["tok_s"]) > 0
        assert t["tok_s_mean"] == pytest.approx(np.mean(t["tok_s"]), rel=1e-6)
        # Printed with 8 digits: each number is off by 5e-8 of itself at most, and the deviation of two speeds by sqrt(2) times that.
        assert t["tok_s_sd"] == pytest.approx(np.std(t["tok_s"], ddof=1), rel=0, abs=(2**0.5 + 1) * 5e-8 * max(t["tok_s"]))
    assert result["skipped"] == result["ops"] == []
    assert result["commit"] == 'a"b' and result["machine"]["device"] == "cpu" and result["date"]
    assert json.loads(file.read_text()) == result
    assert "tg4 @ d70 b2" in done.stderr  # progress


def test_forms(prt_bench: Run) -> None:
    base = (*TINY, "-p", "16", "-n", "0", "-q")
    markdown = prt_bench(*base)
    assert "| pp16 | " in markdown.stdout and "±" in markdown.stdout and not markdown.stderr
    table = list(csv.reader(io.StringIO(prt_bench(*base, "-o", "csv").stdout)))
    assert table[0][:2] == ["test", "n_prompt"] and [row[0] for row in table[1:]] == ["pp16"]


def test_sparse_rows(prt_bench: Run) -> None:
    """Beside the dense rows; the share of the clustered rows is what was asked for, as far as whole clusters allow."""
    base = (*TINY, "-p", "0", "-n", "4", "-q", "-o", "json", "--attention", "tactic")
    result = json.loads(prt_bench(*base, "-d", "0,2100", "-b", "1,2", "--selected", "0.1,0.3").stdout)
    names = [
        f"tg4{depth}{batch}{how}" for depth in ("", " @ d2100") for batch in ("", " b2") for how in ("", " tactic 10 %", " tactic 30 %")
    ]
    assert [t["test"] for t in result["tests"]] == names
    tests = {t["test"]: t for t in result["tests"]}
    assert tests["tg4 tactic 10 %"]["selected_rows"] == 0 and tests["tg4 tactic 10 %"]["read_rows"] == 1  # too short to be sparse
    for name, t in tests.items():
        if "2100" not in name or "tactic" not in name:
            continue
        assert t["selected_rows"] == pytest.approx(t["selected"], rel=0.1) and t["selected"] < t["read_rows"] < t["selected"] + 0.2
        assert t["cluster_seconds"] > 0 and t["prompt_seconds"] > 0 and t["bytes"] < tests[name.split(" tactic")[0]]["bytes"]
    memory = result["memory"]
    assert 0 < memory["index_bytes"] < memory["kv_bytes"]
    by_mass = json.loads(prt_bench(*base, "-d", "1500").stdout)["tests"]
    assert [t["test"] for t in by_mass] == ["tg4 @ d1500", "tg4 @ d1500 tactic"] and by_mass[1]["selected_rows"] > 0.1


def test_rows_of_other_policies(prt_bench: Run) -> None:
    policies = ["streaming:window=300", "quest:k=64,dense_layers=0", "recycled:k=64,stride=2", "tactic_recycled"]
    base = (*TINY, "-p", "0", "-n", "4", "-d", "1500", "-q", "-o", "json", "--selected", "0.1")
    tests = json.loads(prt_bench(*base, *(word for p in policies for word in ("--attention", p))).stdout)["tests"]
    assert [t["test"] for t in tests] == ["tg4 @ d1500", *(f"tg4 @ d1500 {p}" for p in [*policies[:3], "tactic_recycled 10 %"])]
    assert [t.get("attention") for t in tests] == [None, *policies]
    read = [t["read_rows"] for t in tests[1:]]
    assert 304 / 1504 <= read[0] <= 304 / 1500  # four sinks and the window; the prompt is dense
    assert 0.1 < read[1] < 0.25 and read[1] < read[2] < 0.75 and 0.15 < read[3] < 0.4
    assert [t["cluster_seconds"] > 0 for t in tests[1:]] == [False, False, False, True]


def test_bytes_and_operations(prt_bench: Run) -> None:
    """The floor of a step, counted from the shapes: a decode step reads every weight but the embedding, and the KV rows."""
    configs = {c["name"]: c for c in json.loads(prt_bench("--list-configs", "-o", "json").stdout)}
    c = configs["tiny"]
    q, kv = c["h_q"] * c["d_head"], c["h_kv"] * c["d_head"]
    layers = c["n_layer"] * (c["d_model"] * (2 * q + 2 * kv) + 3 * c["d_model"] * c["d_ff"])
    output = c["d_model"] * c["n_vocab"]
    result = json.loads(prt_bench(*TINY, "-p", "16", "-n", "2", "-d", "64", "-b", "3", "-q", "-o", "json").stdout)
    prompt, decode = result["tests"]
    row = 4 * c["n_layer"] * kv
    assert prompt["bytes"] == 2 * (layers + output) + 3 * (64 + 16) * row
    assert decode["bytes"] == 2 * (2 * (layers + output) + 3 * (65 + 1) * row)
    assert prompt["flops"] == 3 * (2 * 16 * layers + 2 * output + 4 * c["n_layer"] * q * (16 * 64 + 16 * 17 / 2))


def test_configs_are_the_published_ones(prt_bench: Run) -> None:
    """By the number of parameters that everybody quotes."""
    from gguf_random import tensors_of

    configs = json.loads(prt_bench("--list-configs", "-o", "json").stdout)
    found = {c["name"]: sum(int(np.prod(s)) for name, s in tensors_of(c) if not name.startswith("rope_freqs")) for c in configs}
    published = {"llama3.1-8b": 8_030_261_248, "llama3.2-1b": 1_235_814_400, "qwen2.5-7b": 7_615_616_512, "smollm2-135m": 134_515_008}
    assert {name: n for name, n in found.items() if name != "tiny"} == published
    assert all(name in prt_bench("--list-configs").stdout for name in published)


def test_a_test_without_room_is_skipped(prt_bench: Run) -> None:
    result = json.loads(prt_bench(*TINY, "-p", "16,8000000", "-n", "0", "-b", "1000", "-q", "-o", "json").stdout)
    assert [t["test"] for t in result["tests"]] == ["pp16 b1000"]
    (skipped,) = result["skipped"]
    assert skipped["test"] == "pp8000000 b1000" and "MiB" in skipped["why"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "llama9"], "'llama9', expected one of llama3.1-8b, "),
        (["-p", "12x"], "'12x' is not a whole number"),
        (["-p", "1,,2"], "'' is not a whole number"),
        (["-p", "-1"], "-1 is out of range, expected 0.."),
        (["-n", "99999999999999999999"], "is not a whole number"),
        (["-b", "0"], "0 is out of range, expected 1..1024"),
        (["-r", "0"], "0 is out of range"),
        (["-d"], "-d needs a value"),
        (["--config="], "--config is ''"),
        (["-o", "xml"], "'xml', expected md, json or csv"),
        (["--attention", "quests"], "policy 'quests' is unknown, expected one of 'full', 'tactic', "),
        (["--selected", "0.1,2"], "'2' is not a share between 0 and 1"),
        (["--frobnicate"], "'--frobnicate' is not an option"),
        (["--device", "tpu"], "'tpu', available: cpu"),
        (["--device", "cuda:77"], "'cuda:77', available: cpu"),
        (["--ops", "--device", "cpu"], "--ops times the operations of a GPU"),
        (["-p", "0", "-n", "0", "--config", "tiny", "--device", "cpu"], "nothing to measure"),
        (["--out", "/no/such/folder/x", "--config", "tiny", "--device", "cpu"], "/no/such/folder/x cannot be written"),
    ],
)
def test_bad_input(prt_bench: Run, arguments: list[str], says: str) -> None:
    done = prt_bench(*arguments, code=2)
    assert says in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("prt-bench: ") and not done.stdout


def test_help_and_version(prt_bench: Run) -> None:
    assert "usage: prt-bench" in prt_bench("--help").stdout
    assert prt_bench("--version").stdout.startswith("prt-bench ")


@pytest.mark.gpu
def test_on_a_gpu(prt_bench: Run) -> None:
    base = ("--config", "tiny", "--device", "cuda:0", "-r", "2", "-q", "-o", "json")
    result = json.loads(prt_bench(*base, "-p", "40", "-n", "8", "-d", "0,100", "-b", "1,3", "--ops").stdout)
    assert len(result["tests"]) == 8 and all(t["tok_s_mean"] > 0 and 0 < t["share"] < 1 for t in result["tests"])
    ceilings, machine = result["ceilings"], result["machine"]
    assert 0.05 < ceilings["copy_gb_s"] / ceilings["read_gb_s"] < 20 and ceilings["bf16_tflops"] > 1
    assert machine["name"] and machine["cuda"] and machine["driver"]
    assert not result["skipped"]
    names = {op["op"] for op in result["ops"]}
    assert {"linear qkv", "linear lm_head", "attention_decode", "attention_prefill", "rope_kv_write", "sample", "linear"} <= names
    assert all(op["us"] > 0 for op in result["ops"])
    assert result["memory"]["beyond_weights_and_kv"] > 0
    sparse = ("-p", "0", "-n", "4", "-d", "3000", "--attention", "tactic", "--selected", "0.2")
    result = json.loads(prt_bench(*base, *sparse).stdout)
    assert [t["test"] for t in result["tests"]] == ["tg4 @ d3000", "tg4 @ d3000 tactic 20 %"] and not result["skipped"]
    sparse = ("--config", "smollm2-135m", "--ops-only", "--structured", "--match", "decode attention", "--selected", "0.2")
    result = json.loads(prt_bench(*base, *sparse).stdout)
    assert not result["skipped"]
    rows = {(op["op"], op["shape"]): op for op in result["ops"]}
    assert all(op["us"] > 0 and op["selected_rows"] == pytest.approx(0.2, rel=0.05) for op in rows.values() if "selected" in op)
    for shape in ("1 x 8192", "8 x 65536"):
        assert {n for n, s in rows if s == shape} == {
            "attention_decode",
            "cluster",
            "select",
            "sparse_attention",
            "select + sparse_attention",
        }


# ---------------------------------------------------------------- the peers and the report


def test_random_gguf(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf_random import random_block, tensors_of, write_random_gguf

    config: dict[str, Any] = {"name": "t", "n_layer": 2, "h_q": 4, "h_kv": 2, "d_head": 32, "d_model": 64, "d_ff": 96, "n_vocab": 300}
    config |= {"max_position": 512, "tied_embeddings": 0, "qkv_bias": 0, "norm_eps": 1e-5, "rope_theta": 10000.0, "rope_factor": 8.0}
    out = tmp_path / "t.gguf"
    write_random_gguf(config, out)
    reader = gguf.GGUFReader(str(out))
    assert {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors} == dict(tensors_of(config))
    tensors = {t.name: t for t in reader.tensors}
    assert np.all(np.asarray(tensors["output_norm.weight"].data) == 1)
    down = np.asarray(tensors["blk.1.ffn_down.weight"].data).view(np.uint16).reshape(64, 96)
    assert np.array_equal(down.reshape(-1), random_block(96)[: 64 * 96])
    values = (down.astype(np.uint32) << 16).view(np.float32)
    assert np.std(values) == pytest.approx(96**-0.5, rel=0.05)


def test_best_of_llama_bench() -> None:
    from llama_cpp_cuda import best_samples

    def row(p: int, n: int, d: int, rates: list[float]) -> dict[str, Any]:
        return {"n_prompt": p, "n_gen": n, "n_depth": d, "samples_ts": rates}

    rows = [row(512, 0, 0, [1.0, 2.0]), row(512, 0, 0, [3.0, 4.0]), row(0, 64, 8192, [5.0])]
    assert best_samples(rows) == {"pp512": [3.0, 4.0], "tg64 @ d8192": [5.0]}


def test_rounds_of_flashinfer() -> None:
    from flashinfer_attention import median_of

    rounds = [[{"batch": 1, "us": us, "us_all": [us, us + 1, us + 2], "tb_s": 12 / (us + 1)}] for us in (1.0, 2.0, 6.0)]
    (row,) = median_of(rounds)
    assert row["us"] == 3.0 and len(row["us_all"]) == 9 and row["batch"] == 1
    assert row["tb_s"] == pytest.approx(rounds[0][0]["tb_s"] * 1.0 / 3.0)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report

    def write(name: str, value: object) -> str:
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    head = {"prt_bench": 1, "commit": "abc", "date": "today", "machine": {"name": "NVIDIA H200"}, "model": {"name": "llama3.1-8b"}}
    short = head | {
        "memory": {"beyond_weights_and_kv": 500 << 20},
        "tests": [{"test": "tg128", "tok_s_mean": 260.0}, {"test": "tg64 @ d2048 b8", "tok_s_mean": 1.0, "share": 0.85}],
        "ops": [],
    }
    decode = {"group": "decode attention, one layer", "op": "attention_decode", "us": 9.0, "flops": 1.0, "bytes": 1.0, "calls": 0}
    ops = [decode | {"shape": "1 x 8192"}, decode | {"shape": "4 x 8192", "us": 44.0}]
    sparse = {"op": "select + sparse_attention", "selected": 0.02, "selected_rows": 0.0201, "shape": "1 x 131072", "us": 20.0}
    ops.append(decode | sparse)
    ops.append(decode | {"op": "linear", "shape": "8192 x 4096 x 14336", "us": 1000.0, "flops": 650e9})
    peer = {"rows": [{"test": "decode", "batch": b, "context": 8192, "page": 16, "us": us} for b, us in ((1, 10.0), (1, 12.0), (4, 40.0))]}
    peer["rows"].append({"test": "decode", "batch": 1, "context": 131072, "page": 16, "us": 130.0})
    llama = {"rows": [{"test": "pp512", "ours": {"tok_s_mean": 30000.0}, "theirs": {"tok_s_mean": 24000.0}, "ratio": 1.25}]}
    out = tmp_path / "h200.json"
    arguments = ["--prt-bench", write("a.json", short), write("b.json", head | {"memory": {}, "tests": [], "ops": ops}), "--out", str(out)]
    load = {"runs": [{"first_token_seconds": seconds} for seconds in (3.0, 9.0, 3.5)]}
    more = [("--llama", llama), ("--flashinfer", peer), ("--load-time", load), ("--more", {"wheel_bytes": 70e6})]
    for option, value in more:
        arguments += [option, write(f"{option[2:]}.json", value)]
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments])
    assert gpu_report.main() == 0
    targets = {t["what"]: t for t in json.loads(out.read_text())["targets"]}
    verdicts = {what.split(",")[0]: t["verdict"] for what, t in targets.items()}
    assert targets["decode, batch 1, tg128"]["verdict"] == "aim"
    assert targets["decode, batch 8, depth 2048, of the bytes floor"]["verdict"] == "pass"
    worst = targets["decode attention, slowest row over FlashInfer's time"]
    assert worst["verdict"] == "FAIL" and worst["value"] == pytest.approx(1.1)
    assert verdicts["matrix product 8192 x 4096 x 14336"] == verdicts["prefill pp512 over llama.cpp"] == "pass"
    assert verdicts["memory beyond weights and KV"] == "pass" and verdicts["wheel with all architectures"] == "FAIL"
    assert targets["Model(...) to the first token, 16 GB in the page cache"]["verdict"] == "aim"
    assert targets["sparse decode attention 1 x 131072, 2 %, over FlashInfer dense"]["verdict"] == "pass"
    printed = capsys.readouterr().out
    assert "| 1 x 8192 | 9.0 | 10.0 | 0.90 |" in printed
    assert "| 1 x 131072, 2.01 % | - | - | 20.0 | - | 130.0 (6.5x) |" in printed
    turns = peer | {"ours": [{"batch": 4, "context": 8192, "us": 38.0}]}  # measured in turns: what the other run said does not count
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments, "--flashinfer", write("turns.json", turns)])
    assert gpu_report.main() == 0
    targets = {t["what"]: t for t in json.loads(out.read_text())["targets"]}
    assert targets["decode attention, slowest row over FlashInfer's time"]["value"] == pytest.approx(0.95)
    monkeypatch.setattr(
        sys, "argv", ["gpu_report.py", "--prt-bench", str(tmp_path / "a.json"), write("c.json", short | {"commit": "other"})]
    )
    with pytest.raises(SystemExit, match="commit other"):
        gpu_report.main()
