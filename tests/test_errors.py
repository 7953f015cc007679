"""Bad input through pyruntime.Model: one clear error that names the thing and the values, and everything else goes on working."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from goldens.weights import make_weights, write_safetensors
from tiny import write_tiny_model

import pyruntime
from pyruntime.checkpoint import open_checkpoint
from pyruntime.errors import (
    InvalidArgumentError,
    ModelFileError,
    ModelNotFoundError,
    OutOfMemoryError,
    PyruntimeError,
    UnsupportedModelError,
)
from pyruntime.session import Weights


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(write_tiny_model(tmp_path_factory.mktemp("errors") / "survivor"), threads=1) as model:
        yield model


@pytest.fixture(autouse=True)
def a_loaded_model_still_answers(survivor: pyruntime.Model) -> Iterator[None]:
    before = survivor.generate("Hello", temperature=0, max_tokens=6).token_ids
    yield
    assert survivor.generate("Hello", temperature=0, max_tokens=6).token_ids == before


def error_of(path: Any, kind: type[PyruntimeError], **options: Any) -> str:
    """The message of the error that loading must raise: of exactly that class, one line, without a trace of Python's own wording."""
    with pytest.raises(PyruntimeError) as caught:
        pyruntime.Model(path, **options)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text and 20 < len(text) < 600 and "Traceback" not in text and "object at 0x" not in text
    return text


# ---------------------------------------------------------------- Hugging Face folders

Damage = Callable[[Path], None]


def edit_config(**keys: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        values = {k: v for k, v in {**json.loads(path.read_text()), **keys}.items() if v != "DELETE"}
        path.write_text(json.dumps(values))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def truncate_weights(keep: float) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, int(path.stat().st_size * keep))

    return damage


def lie_about_length(length: int) -> Damage:
    def damage(folder: Path) -> None:
        with open(folder / "model.safetensors", "r+b") as file:
            file.write(struct.pack("<Q", length))

    return damage


def rewrite_weights(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        weights: dict[str, Any] = dict(make_weights(json.loads((folder / "config.json").read_text()), "llama3"))
        change(weights)
        write_safetensors(folder / "model.safetensors", weights, "bf16")

    return damage


def rewrite_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :])

    return damage


Q = "model.layers.1.self_attn.q_proj.weight"
FOLDERS: dict[str, tuple[Damage, type[PyruntimeError], list[str]]] = {
    "config that is no JSON": (write("config.json", "{'a': 1}"), ModelFileError, ["config.json"]),
    "config that is a list": (write("config.json", "[1]"), ModelFileError, ["config.json"]),
    "config that is not UTF-8": (write("config.json", b"\xff\xfe{"), ModelFileError, ["config.json"]),
    "unknown family": (
        edit_config(architectures=["MambaForCausalLM"], model_type="mamba"), UnsupportedModelError, ["config.json", "MambaForCausalLM"],
    ),
    "unknown rope": (edit_config(rope_scaling={"rope_type": "spiral", "factor": 2.0}), UnsupportedModelError, ["spiral"]),
    "unknown activation": (edit_config(hidden_act="gelu"), UnsupportedModelError, ["hidden_act", "gelu"]),
    "a key that changes the computation": (edit_config(logit_softcapping=30.0), UnsupportedModelError, ["logit_softcapping"]),
    "missing number": (edit_config(hidden_size="DELETE"), ModelFileError, ["hidden_size"]),
    "no layers": (edit_config(num_hidden_layers=0), ModelFileError, ["num_hidden_layers", "0"]),
    "a million layers": (edit_config(num_hidden_layers=10**6), ModelFileError, ["num_hidden_layers", "1000000"]),
    "heads that do not divide": (edit_config(num_attention_heads=4, num_key_value_heads=3), ModelFileError, ["3", "4"]),
    "text for a number": (edit_config(rms_norm_eps="small"), ModelFileError, ["rms_norm_eps", "small"]),
    "another vocabulary": (edit_config(vocab_size=97), ModelFileError, ["model.embed_tokens.weight", "[96, 256]", "[97, 256]"]),
    "petabytes": (
        edit_config(hidden_size=1 << 17, intermediate_size=1 << 20, num_hidden_layers=1000, num_attention_heads=1024, head_dim=256),
        ModelFileError, ["model.embed_tokens.weight", "[96, 256]", "[96, 131072]"],
    ),
    "no weights": (remove("model.safetensors"), ModelFileError, ["has no weights, expected model.safetensors"]),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin") and None,
        ModelFileError, ["pytorch_model.bin", "pickle"],
    ),
    "empty weights": (truncate_weights(0), ModelFileError, ["model.safetensors", "0"]),
    "weights cut off": (truncate_weights(0.9), ModelFileError, ["model.safetensors", "bytes"]),
    "weights cut off in the header": (truncate_weights(0.001), ModelFileError, ["model.safetensors"]),
    "header longer than the file": (lie_about_length(1 << 40), ModelFileError, ["model.safetensors", f"{1 << 40:,}"]),
    "header of 2^64 bytes": (lie_about_length((1 << 64) - 1), ModelFileError, ["model.safetensors"]),
    "missing tensor": (rewrite_weights(lambda w: w.pop(Q) is None), ModelFileError, [Q, "[256, 256]", "missing"]),
    "extra tensor": (rewrite_weights(lambda w: w.update(extra=w[Q])), ModelFileError, ["extra", "[256, 256]"]),
    "wrong shape": (rewrite_weights(lambda w: w.update({Q: w[Q][:255]})), ModelFileError, [Q, "[255, 256]", "[256, 256]"]),
    "transposed shape": (
        rewrite_weights(lambda w: w.update({"lm_head.weight": w["lm_head.weight"].T})), ModelFileError, ["[256, 96]", "[96, 256]"],
    ),
    "unknown dtype": (rewrite_header(lambda h: h[Q].update(dtype="F9")), (ModelFileError), [Q, "F9"]),
    "integers": (rewrite_header(lambda h: h[Q].update(dtype="I16")), UnsupportedModelError, [Q, "I16"]),
    "overlap": (rewrite_header(lambda h: h[Q].update(data_offsets=h["lm_head.weight"]["data_offsets"])), ModelFileError, ["safetensors"]),
    "negative shape": (rewrite_header(lambda h: h[Q].update(shape=[-256, -256])), ModelFileError, [Q, "-256"]),
    "no tokenizer": (remove("tokenizer.json"), UnsupportedModelError, ["no tokenizer.json"]),
    "tokenizer that is no JSON": (write("tokenizer.json", "{"), ModelFileError, ["tokenizer.json"]),
    "tokenizer of another kind": (write("tokenizer.json", '{"model": {"type": "Rune"}}'), ModelFileError, ["tokenizer.json"]),
    "end token outside the vocabulary": (edit_config(eos_token_id=96), ModelFileError, ["eos_token_id", "96", "95"]),
    "bad generation config": (write("generation_config.json", '{"temperature": "hot"}'), ModelFileError, ["generation_config.json", "hot"]),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_damaged_folder(what: str, tmp_path: Path) -> None:
    damage, kind, parts = FOLDERS[what]
    folder = write_tiny_model(tmp_path / "model")
    damage(folder)
    text = error_of(folder, kind)
    assert text.startswith(str(folder)), text
    for part in parts:
        assert part in text, text


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", vocab_size=90)
    write_safetensors(folder / "model.safetensors", make_weights(json.loads((folder / "config.json").read_text()), "llama3"), "bf16")
    assert "the tokenizer has 93 tokens, the model's embedding 90 rows" in error_of(folder, UnsupportedModelError)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), ["model-00002-of-00003.safetensors"]),
        (lambda f: os.truncate(f / "model-00003-of-00003.safetensors", 1000), ["model-00003-of-00003.safetensors"]),
        (lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"), ["00002-of-00003"]),
        (lambda f: edit_index(f, "../../etc/passwd"), ["../../etc/passwd"]),
        (lambda f: edit_index(f, 7), ["model.safetensors.index.json", "7"]),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": 5}'), ["model.safetensors.index.json"]),
    ],
    ids=["missing shard", "cut off", "wrong shard", "outside the folder", "no name", "no map"],
)
def test_damaged_shards(change: Callable[[Path], None], parts: list[str], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", shards=3)
    with pyruntime.Model(folder, threads=1):
        pass
    change(folder)
    text = error_of(folder, ModelFileError)
    for part in parts:
        assert part in text, text


def edit_index(folder: Path, shard: Any) -> None:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    values["weight_map"][Q] = shard
    path.write_text(json.dumps(values))


def test_a_file_that_shrinks_while_loading(tmp_path: Path) -> None:
    """Between the check of the header and the reading of the data: the library's own error, with the path."""
    folder = write_tiny_model(tmp_path / "model")
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 50_000)
        weights = Weights(checkpoint.config, dtype="bf16", device="cpu")
        with pytest.raises(ModelFileError, match=r"model\.safetensors"):
            weights.load(checkpoint.tensors, threads=2)


# ---------------------------------------------------------------- GGUF files


@pytest.fixture(scope="module")
def gguf_bytes(smollm2_gguf: Path) -> bytes:
    return smollm2_gguf.read_bytes()


@pytest.mark.parametrize("keep", [0, 3, 20, 5000, 1_000_000, 50_000_000, -1])
def test_truncated_gguf(gguf_bytes: bytes, keep: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_bytes[:keep])
    text = error_of(path, ModelFileError)
    assert text.startswith(str(path))


@pytest.mark.parametrize(
    ("old", "new", "kind", "part"),
    [
        (b"GGUF", b"GGML", ModelFileError, "GGML"),
        (b"GGUF\x03", b"GGUF\x09", UnsupportedModelError, "version 9"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", UnsupportedModelError, "mamba"),
        (b"llama.block_count", b"llama.block_cOunt", ModelFileError, "block_count"),
        (b"token_embd.weight", b"token_embd.wEight", ModelFileError, "token_embd.weight"),
        (b"tokenizer.ggml.pre", b"tokenizer.ggml.prE", UnsupportedModelError, "pre-tokenizer"),
    ],
    ids=["magic", "version", "architecture", "missing key", "missing tensor", "pre-tokenizer"],
)  # fmt: skip
def test_corrupted_gguf(gguf_bytes: bytes, old: bytes, new: bytes, kind: type[PyruntimeError], part: str, tmp_path: Path) -> None:
    assert old in gguf_bytes
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf_bytes.replace(old, new, 1))
    text = error_of(path, kind)
    assert text.startswith(str(path)) and part in text, text


# ---------------------------------------------------------------- names and places


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean smollm2-135m" in error_of("smollm2-135n", ModelNotFoundError)
    assert "'zzzz'" in error_of("zzzz", ModelNotFoundError)
    assert "no such file" in error_of(tmp_path / "nothing.gguf", ModelNotFoundError)
    assert "nobody/nothing" in error_of("nobody/nothing", ModelNotFoundError, offline=True)
    (tmp_path / "empty").mkdir()
    assert "config.json" in error_of(tmp_path / "empty", ModelNotFoundError)
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt" in error_of(tmp_path / "notes.txt", ModelNotFoundError)


def test_no_network(tmp_path: Path) -> None:
    """A hub that cannot be reached: ModelNotFoundError, said once, and soon."""
    code = "import pyruntime\ntry:\n    pyruntime.Model('nobody/nothing')\nexcept pyruntime.ModelNotFoundError as e:\n    print(e)"
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert "nobody/nothing" in done.stdout and done.stdout.count("\n") == 1


# ---------------------------------------------------------------- memory


def test_weights_that_fit_no_machine(tmp_path: Path) -> None:
    with open_checkpoint(write_tiny_model(tmp_path / "model")) as checkpoint:
        huge = replace(checkpoint.config, n_layer=1000, d_model=1 << 17, d_ff=1 << 20, n_vocab=1 << 20)
    with pytest.raises(OutOfMemoryError, match=r"\d+.*(bytes|MiB|GiB).*free"):
        Weights(huge, dtype="bf16", device="cpu")


def test_a_context_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 1.5 GiB free, of which 1 is left alone. Asked for: an error with what would fit. Not asked for: what fits."""
    folder = write_tiny_model(tmp_path / "model", max_position_embeddings=1_000_000)
    real = pyruntime._lib.devices

    def small_machine() -> list[Any]:
        found = real()
        found[0].memory_free = 3 << 29
        return found

    monkeypatch.setattr("pyruntime.model.devices", small_machine)
    text = error_of(folder, OutOfMemoryError, max_context=1_000_000, device="cpu")
    assert "max_context 1000000 needs 976 MiB" in text and "1536 MiB are free" in text
    assert "the largest max_context that fits is 524288" in text
    with pyruntime.Model(folder, threads=1, device="cpu") as model:
        assert model.max_context == 524288 and model.stats()["kv_bytes"] == 1 << 29
        assert len(model.generate("abc", max_tokens=4, ignore_eos=True).token_ids) == 4
    with pyruntime.Model(folder, threads=1, device="cpu", max_context=524288) as model:
        assert model.max_context == 524288
    monkeypatch.setattr("pyruntime.model._KEEP_FREE", 2 << 30)
    assert "the largest max_context that fits is 0" in error_of(folder, OutOfMemoryError, device="cpu")


LIMITED = """
import resource, sys, pyruntime
folder, small = sys.argv[1], sys.argv[2]
survivor = pyruntime.Model(small, threads=1)
before = survivor.generate("Hello", temperature=0, max_tokens=6).token_ids
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), hard))
for options in ({"threads": 1}, {"threads": 1000}):
    try:
        pyruntime.Model(folder, **options)
        print("loaded?", options)
    except pyruntime.PyruntimeError as error:
        print(type(error).__name__, error)
assert survivor.generate("Hello", temperature=0, max_tokens=6).token_ids == before
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
with pyruntime.Model(folder, threads=1) as model:
    model.generate("Hello", max_tokens=2)
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS works on Linux")
@pytest.mark.skipif(pyruntime.build_info()["sanitizers"] == "ON", reason="AddressSanitizer itself ends the process when its mmap fails")
def test_too_little_memory(tmp_path: Path) -> None:
    """An address space that the KV cache does not fit into, and one that a thousand threads do not: errors, not a crash."""
    small, large = write_tiny_model(tmp_path / "small"), write_tiny_model(tmp_path / "large", max_position_embeddings=100_000)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(large), str(small)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("OutOfMemoryError") and "KV cache" in lines[0] and "bytes" in lines[0], lines
    assert lines[1].startswith("OutOfMemoryError"), lines
    assert lines[2] == "done", lines


# ---------------------------------------------------------------- a model that goes on


def test_after_bad_calls(survivor: pyruntime.Model) -> None:
    """Whatever is wrong with a call, the next one works; pages are as before."""
    calls: list[Callable[[], Any]] = [
        lambda: survivor.generate([5] * 512),
        lambda: survivor.generate(["ok", [5] * 600]),
        lambda: survivor.generate("x", temperature=-1),
        lambda: survivor.generate([96]),
        lambda: survivor.generate("é"),
        lambda: survivor.logits([]),
        lambda: survivor.logits([5] * 513),
        lambda: survivor.logits("text"),  # type: ignore[arg-type]
        lambda: survivor.perplexity([5]),
        lambda: survivor.chat([{"role": 5, "content": None}]),
        lambda: survivor.detokenize([-1]),
    ]
    expected = survivor.generate("Hello", temperature=0, max_tokens=6).token_ids
    for call in calls:
        try:
            call()
        except (InvalidArgumentError, PyruntimeError) as error:
            assert len(str(error)) > 15
        assert survivor.generate("Hello", temperature=0, max_tokens=6).token_ids == expected
        survivor.clear_cache()
        stats = survivor.stats()
        assert stats["n_sequence"] == 0 and stats["n_page_free"] == stats["n_page"]
