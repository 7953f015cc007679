"""pyruntime.Model with the real model: numbers from outside, settings, lifetime, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import forward
from tiny import log_softmax, write_tiny_model

import pyruntime
from pyruntime.checkpoint import open_checkpoint
from pyruntime.errors import ContextLengthError, DeviceError, InvalidArgumentError

# exp(mean negative log-likelihood) of the first 2048 tokens, from an independent float32 implementation
PERPLEXITY_2048 = 13.44
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


# ---------------------------------------------------------------- numbers from outside


def test_the_capital_of_france(smollm2: pyruntime.Model) -> None:
    answer = smollm2.chat(MESSAGES, temperature=0, max_tokens=30)
    assert "Paris" in answer.text and answer.finish_reason == "stop"
    assert "".join(smollm2.chat(MESSAGES, stream=True, temperature=0, max_tokens=30)) == answer.text
    assert smollm2.chat_prompt(MESSAGES).endswith("<|im_start|>assistant\n")


def test_perplexity_from_gguf(smollm2: pyruntime.Model, text: str) -> None:
    assert smollm2.perplexity(text, max_tokens=2048) == pytest.approx(PERPLEXITY_2048, rel=0.005)


def test_perplexity_from_hugging_face(smollm2_hf: Path, smollm2: pyruntime.Model, text: str) -> None:
    """The bf16 folder holds the dequantised weights rounded as the GGUF loader rounds them: the same bits, so the same number."""
    with pyruntime.Model(smollm2_hf, threads=2) as model:
        assert model.dtype == "bf16" and model.config.rope == smollm2.config.rope
        ids = model.tokenize(text, add_special_tokens=False)
        assert ids == smollm2.tokenize(text, add_special_tokens=False)
        assert np.array_equal(model.logits(ids[:40]), smollm2.logits(ids[:40]))
        assert model.perplexity(ids[:2048]) == pytest.approx(PERPLEXITY_2048, rel=0.005)
        assert "Paris" in model.chat(MESSAGES, temperature=0, max_tokens=30).text


def test_dtypes_agree(smollm2_gguf: Path, smollm2: pyruntime.Model, text: str) -> None:
    ids = smollm2.tokenize(text)[:512]
    values = {"bf16": smollm2.perplexity(ids)}
    for dtype in ("f32", "f16"):
        with pyruntime.Model(smollm2_gguf, dtype=dtype, threads=2, max_context=512) as model:
            assert model.dtype == dtype
            values[dtype] = model.perplexity(ids)
            if dtype == "f32":
                check_against_reference(model, ids[:16])
    for dtype in ("bf16", "f16"):
        assert values[dtype] == pytest.approx(values["f32"], rel=0.01), values


def check_against_reference(model: pyruntime.Model, ids: list[int]) -> None:
    """Logits of the real weights in f32 against the numpy reference in float64: 30 layers of float32 rounding may cost at most four times
    what they cost a plain numpy forward pass in float32."""
    config = {
        "model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
        "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    with open_checkpoint(model.path) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            words = name.split(".")
            outer = {"embed": "model.embed_tokens", "norm": "model.norm"}
            long = f"model.layers.{words[1]}.{parts[words[2]]}" if words[0] == "layers" else outer[words[0]]
            weights[f"{long}.weight"] = tensor.read(0, tensor.shape[0])
    exact = forward(config, weights, np.array(ids))
    plain = np.abs(forward(config, weights, np.array(ids), dtype=np.float32) - exact)
    error = np.abs(model.logits(ids) - exact)
    assert error.max() <= 4 * plain.max() and error.mean() <= 2 * plain.mean()


# ---------------------------------------------------------------- text and scores


def test_tokens_round_trip(smollm2: pyruntime.Model, text: str) -> None:
    for sample in (text[:20_000], "naïve 你好 🙂\n\ttabs  and   spaces ", ""):
        ids = smollm2.tokenize(sample, add_special_tokens=False)
        assert smollm2.detokenize(ids) == sample and all(0 <= i < smollm2.config.n_vocab for i in ids)
    assert smollm2.detokenize([1, 2], skip_special=False) == "<|im_start|><|im_end|>" and smollm2.detokenize([1, 2]) == ""
    bad: list[tuple[Any, str]] = [(["x"], r"ids\[0\] is 'x'"), ([49152], r"ids\[0\] is 49152"), ("text", "is str"), ([True], "is True")]
    for ids, message in bad:
        with pytest.raises(InvalidArgumentError, match=message):
            smollm2.detokenize(ids)
    with pytest.raises(InvalidArgumentError, match="text must be a string, got int"):
        smollm2.tokenize(5)  # type: ignore[arg-type]


def test_perplexity_is_the_mean_of_the_log_softmax(smollm2: pyruntime.Model, text: str) -> None:
    ids = smollm2.tokenize(text)[:60]
    logits = smollm2.logits(ids)
    assert logits.shape == (60, 49152) and logits.dtype == np.float32
    expected = math.exp(-log_softmax(logits)[np.arange(59), ids[1:]].mean())
    assert smollm2.perplexity(ids) == pytest.approx(expected, rel=1e-5)
    assert smollm2.perplexity(text, max_tokens=60) == pytest.approx(expected, rel=1e-5)


def test_perplexity_in_windows(tiny: Path) -> None:
    """A text longer than max_context is scored window by window; a last window of one token has nothing to predict."""
    with pyruntime.Model(tiny, max_context=100, threads=1) as model:
        ids = np.random.default_rng(0).integers(4, 90, 301).tolist()
        nats = [math.log(model.perplexity(ids[i : i + 100])) for i in (0, 100, 200)]
        assert model.perplexity(ids) == pytest.approx(math.exp(sum(nats) / 3), rel=1e-6)
        for n, message in ((1, "max_tokens is 1, the text has 301 tokens: expected 2 to 301"), (302, "max_tokens is 302")):
            with pytest.raises(InvalidArgumentError, match=message):
                model.perplexity(ids, max_tokens=n)
        with pytest.raises(InvalidArgumentError, match="at least 2 tokens, the text has 1"):
            model.perplexity("x")


def test_chat_errors(smollm2: pyruntime.Model) -> None:
    for messages in ([], "Hi", [{"role": "user"}], [{"content": "x"}], [5], None):
        with pytest.raises(pyruntime.PyruntimeError) as caught:
            smollm2.chat(messages, max_tokens=1)  # type: ignore[arg-type]
        assert len(str(caught.value)) > 10


# ---------------------------------------------------------------- settings


def test_max_context(tiny: Path) -> None:
    with pyruntime.Model(tiny, threads=1) as model:
        assert model.max_context == 512
    with pyruntime.Model(tiny, max_context=8, threads=1) as model:
        assert model.max_context == 8 and model.stats()["max_context"] == 8
        made = model.generate("abcdef", temperature=0, ignore_eos=True)
        assert len(made.token_ids) == 2 and made.finish_reason == "length"
        with pytest.raises(ContextLengthError, match="the prompt has 8 tokens, max_context is 8"):
            model.generate("abcdefgh")
        with pytest.raises(ContextLengthError, match="9 tokens were given, expected 1 to 8"):
            model.logits([5] * 9)
        assert model.logits([5] * 8).shape == (8, 96)
        assert made.token_ids == model.generate("abcdef", temperature=0, ignore_eos=True).token_ids
    with pyruntime.Model(tiny, max_context=1, threads=1) as model:
        assert model.logits([5]).shape == (1, 96)
        with pytest.raises(ContextLengthError):
            model.generate("a")
    with pytest.raises(ContextLengthError, match=r"max_context is 513, .* is made for 512 tokens"):
        pyruntime.Model(tiny, max_context=513)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention": "magic"}, InvalidArgumentError, "policy 'magic' is unknown, expected one of 'full', 'tactic', 'recycled'"),
        ({"dtype": "int3"}, InvalidArgumentError, "dtype is 'int3', expected 'auto', 'f32', 'f16', 'bf16'"),
        ({"dtype": None}, InvalidArgumentError, "dtype is None"),
        ({"max_context": 0}, InvalidArgumentError, "max_context is 0, expected an integer from 1"),
        ({"max_context": "8k"}, InvalidArgumentError, "max_context is '8k'"),
        ({"threads": -1}, InvalidArgumentError, "threads is -1"),
        ({"threads": 2.0}, InvalidArgumentError, r"threads is 2\.0"),
        ({"threads": 100_000}, InvalidArgumentError, "threads is 100000, expected an integer from 1 to 1024"),
        ({"threads": 2**40 + 1}, InvalidArgumentError, "threads is 1099511627777"),
        ({"device": "tpu"}, InvalidArgumentError, "device is 'tpu', expected 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ({"device": None}, InvalidArgumentError, "device is None"),
        ({"device": "cuda:99"}, DeviceError, "device 'cuda:99': .*available: cpu"),
        ({"device": "cuda:x"}, DeviceError, "device 'cuda:x': .*available: cpu"),
    ],
)
def test_bad_settings(tiny: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pyruntime.Model(tiny, **options)


@pytest.mark.parametrize("name", [None, 5, b"smollm2-135m", "", " ", "a\0b", ["smollm2-135m"]])
def test_bad_names(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="model must be a name, a hub repository or a path"):
        pyruntime.Model(name)


def test_cuda_without_cuda(tiny: Path) -> None:
    if any(d.is_cuda and d.usable for d in pyruntime._lib.devices()):
        pytest.skip("this machine has a usable CUDA device")
    with pytest.raises(DeviceError, match=r"device 'cuda': (this build has no CUDA \(.+\)|no NVIDIA driver|.* cannot be used)"):
        pyruntime.Model(tiny, device="cuda")
    with pyruntime.Model(tiny, device="auto") as model:
        assert model.device == "cpu"


def test_threads_and_isa(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_THREADS", "2")
    with pyruntime.Model(tiny) as model:
        assert model.stats()["n_threads"] == 2
        expected = model.logits([5, 6, 7])
    with pyruntime.Model(tiny, threads=1) as model:
        assert model.stats()["n_threads"] == 1
        assert np.array_equal(model.logits([5, 6, 7]), expected)
    for name, value in (("PYRUNTIME_THREADS", "many"), ("PYRUNTIME_CPU_ISA", "mmx")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InvalidArgumentError, match=f"{name} must be .*{value}"):
                pyruntime.Model(tiny)


# ---------------------------------------------------------------- lifetime


def test_close(tiny: Path) -> None:
    with pyruntime.Model(tiny, threads=1) as model:
        model.generate("abc", max_tokens=2)
    assert "tiny" in repr(model)
    model.close()
    model.close()
    calls = [
        lambda: model.generate("abc"),
        lambda: model.generate("abc", stream=True),
        lambda: model.chat(MESSAGES),
        lambda: model.logits([5]),
        lambda: model.perplexity([5, 6]),
        lambda: model.stats(),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match="tiny is closed"):
            call()
    assert model.detokenize(model.tokenize("abc")) == "abc"  # needs no weights


def test_a_dropped_model_is_freed_at_once(tiny: Path) -> None:
    model = pyruntime.Model(tiny, threads=1)
    model.generate("abc", max_tokens=3)
    there = weakref.ref(model._session)
    del model
    assert there() is None


def test_two_models_at_once(smollm2: pyruntime.Model, tiny: Path) -> None:
    with pyruntime.Model(tiny, threads=1) as other, pyruntime.Model(tiny, threads=1, dtype="f32") as third:
        expected = other.generate("abc", temperature=0, max_tokens=20).token_ids
        big = smollm2.generate("Water", temperature=0, max_tokens=6).token_ids
        results: list[list[int]] = []
        thread = threading.Thread(target=lambda: results.append(smollm2.generate("Water", temperature=0, max_tokens=6).token_ids))
        thread.start()
        for _ in range(3):
            assert other.generate("abc", temperature=0, max_tokens=20).token_ids == expected
        third.generate("abc", max_tokens=2)
        thread.join()
        assert results == [big]


def test_calls_at_once_that_need_more_pages_than_there_are(tiny: Path) -> None:
    """Eight sequences of full length fit. Ten have their turns, also with scoring in between, and each is as it is alone."""
    with pyruntime.Model(tiny, threads=1) as model:
        expected = model.generate("abc", temperature=0, ignore_eos=True)
        assert expected.usage.total_tokens == model.max_context
        streams = [model.generate("abc", stream=True, temperature=0, ignore_eos=True) for _ in range(10)]
        first = [next(stream) for stream in streams]
        assert model.logits([5] * 512).shape == (512, 96)
        assert [piece + "".join(stream) for piece, stream in zip(first, streams, strict=True)] == [expected.text] * 10
        model.clear_cache()
        assert model.stats()["n_page_free"] == model.stats()["n_page"]


def test_stats(tiny: Path) -> None:
    with pyruntime.Model(tiny, threads=1) as model:
        before = model.stats()
        model.generate(["abcdefgh", "xyz"], temperature=0, max_tokens=5, ignore_eos=True)
        stats = model.stats()
    assert (stats["device"], stats["dtype"], stats["attention"]) == ("cpu", "bf16", "full")
    assert stats["n_prefill_token"] - before["n_prefill_token"] == 11 and stats["n_decode_token"] - before["n_decode_token"] == 8
    assert stats["n_step"] - before["n_step"] == 5 and stats["prefill_tok_s"] > 0 < stats["decode_tok_s"]
    n_weight = 2 * 96 * 256 + 2 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 136 * 256)
    assert 2 * n_weight <= stats["weight_bytes"] <= 2 * n_weight * 1.2
    assert stats["n_page_peak"] == 2 and stats["kv_bytes"] == stats["n_page"] * stats["page_bytes"]


def test_timings_and_usage(tiny: Path) -> None:
    with pyruntime.Model(tiny, threads=1) as model:
        made = model.generate("abcdefgh", temperature=0, max_tokens=5, ignore_eos=True)
        t = made.timings
        assert 0 < t.time_to_first_token <= t.total and t.prefill_tok_s > 0 and t.decode_tok_s > 0
        assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (8, 5, 13)
        stream = model.generate("abc", stream=True)
        empty = stream.completion
        assert (empty.text, empty.token_ids, empty.finish_reason) == ("", [], "abort")
        assert (empty.timings.time_to_first_token, empty.timings.total) == (0.0, 0.0)


# ---------------------------------------------------------------- memory

MEMORY = """
import json, sys, pyruntime
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
model = pyruntime.Model(sys.argv[1], threads=2, **json.loads(sys.argv[2]))
after_load, peak_load = status("VmRSS"), status("VmHWM")
model.generate("Once upon a time", temperature=0, max_tokens=8)
stats = model.stats()
print(json.dumps({"load": after_load, "peak_load": peak_load, "run": status("VmRSS"), "weights": stats["weight_bytes"],
                  "kv": stats["n_page_peak"] * stats["page_bytes"], "workspace": stats["workspace_bytes"]}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_memory(smollm2_gguf: Path, smollm2_hf: Path, kind: str) -> None:
    """Resident after load and after a short generation: at most weights + KV pages in use + 100 MB, Python and its libraries included."""
    path = {"gguf": smollm2_gguf, "hf": smollm2_hf}[kind]
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path), "{}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(f"{kind}: " + ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in figures.items()))
    assert figures["load"] <= figures["weights"] + 100e6
    assert figures["run"] <= figures["weights"] + figures["kv"] + 100e6
