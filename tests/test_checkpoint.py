"""open_checkpoint on Hugging Face folders: what it finds, and one clear sentence for each way a folder can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pyruntime.checkpoint import open_checkpoint
from pyruntime.errors import (
    InvalidArgumentError,
    ModelFileError,
    ModelNotFoundError,
    PyruntimeError,
    UnsupportedModelError,
)

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "float16", "rope_theta": 1e4,
}  # fmt: skip


def tensors(n_layer: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (16, 32),
    }
    for i in range(n_layer):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (rows, 32) for name, rows in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (32, 48)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make(folder: Path, weights: dict[str, Any] | None = None, generation: Any = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v != "drop"}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    return folder


def refused(path: Any, kind: type[PyruntimeError] = ModelFileError) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_a_folder(tmp_path: Path) -> None:
    weights = tensors()
    folder = make(tmp_path / "m", weights)
    with open_checkpoint(str(folder)) as checkpoint:
        assert (checkpoint.kind, checkpoint.path, checkpoint.config.dtype) == ("safetensors", folder, "f16")
        assert (checkpoint.bos_id, checkpoint.eos_ids, checkpoint.pad_id) == (1, (2,), None)
        assert set(checkpoint.tensors) == set(checkpoint.config.tensor_shapes())
        assert len(checkpoint.tensors) == len(weights)
        down = checkpoint.tensors["layers.1.down.weight"]
        np.testing.assert_array_equal(down.read(3, 9), weights["model.layers.1.mlp.down_proj.weight"][3:9])
        np.testing.assert_array_equal(checkpoint.tensors["lm_head.weight"].read(), weights["lm_head.weight"])
    assert checkpoint.tensors == {}


def test_a_safetensors_file_stands_for_its_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    assert open_checkpoint(folder / "model.safetensors").path == folder
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert len(open_checkpoint(folder / "other.safetensors").tensors) == len(tensors())
    assert "has no weights, expected model.safetensors" in refused(folder)


def test_dtype_is_the_embedding_s_where_the_config_is_silent(tmp_path: Path) -> None:
    assert open_checkpoint(make(tmp_path / "m", dtype="drop")).config.dtype == "f32"


def test_generation_config_and_token_ids(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 1, "top_k": 40, "bos_token_id": 3,
                  "eos_token_id": [4, 5], "pad_token_id": -1, "transformers_version": "4.42.3", "num_beams": 1,
                  "min_p": None}  # fmt: skip
    checkpoint = open_checkpoint(make(tmp_path / "m", generation=generation))
    assert checkpoint.generation_config == {"do_sample": True, "temperature": 0.6, "top_p": 1.0, "top_k": 40}
    assert (checkpoint.bos_id, checkpoint.eos_ids, checkpoint.pad_id) == (3, (4, 5), None)
    checkpoint = open_checkpoint(make(tmp_path / "m", generation={}, eos_token_id=[7, 8], bos_token_id=None, pad_token_id=16))
    assert (checkpoint.bos_id, checkpoint.eos_ids, checkpoint.pad_id) == (None, (7, 8), None)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "hot"), ("top_p", 1.5), ("top_k", 2.5), ("top_k", True), ("do_sample", 1),
     ("eos_token_id", 16), ("eos_token_id", [2, "3"]), ("eos_token_id", True), ("bos_token_id", -1), ("min_p", 2)],
)  # fmt: skip
def test_bad_generation_config(key: str, value: Any, tmp_path: Path) -> None:
    message = refused(make(tmp_path / "m", generation={key: value}))
    assert message.startswith(str(tmp_path / "m" / "generation_config.json")) and f"{key!r} is {value!r}" in message


def test_tokenizer_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    files = open_checkpoint(folder).tokenizer_files
    assert (files.tokenizer, files.tokenizer_config, files.chat_template) == (None, None, None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    files = open_checkpoint(folder).tokenizer_files
    assert files.tokenizer == folder / "tokenizer.json" and files.tokenizer_config == folder / "tokenizer_config.json"
    assert files.chat_template == folder / "chat_template.jinja"
    os.truncate(folder / "tokenizer.json", (256 << 20) + 1)
    assert "tokenizer.json: has 268,435,457 bytes, expected at most 268,435,456" in refused(folder)


def test_missing_extra_and_misshaped_tensors_are_named_with_shapes(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = tensors()
    del weights[name]
    assert f"tensor '{name}' of shape [48, 32] is missing" in refused(make(tmp_path / "m", weights))
    weights = tensors() | {name: np.zeros((32, 48), np.float32)}
    assert f"tensor '{name}' has shape [32, 48], expected [48, 32]" in refused(make(tmp_path / "m", weights))
    weights = tensors() | {"model.layers.1.mlp.up_proj.bias": np.zeros(48, np.float32)}
    assert "tensor 'model.layers.1.mlp.up_proj.bias' of shape [48] is not part of" in refused(make(tmp_path / "m", weights))
    assert "tensor 'model.layers.2." in refused(make(tmp_path / "m", num_hidden_layers=3))
    assert "'model.layers.1." in refused(make(tmp_path / "m", num_hidden_layers=1))
    weights = tensors() | {name: np.zeros((48, 32), np.float64)}
    assert f"tensor '{name}' has dtype F64" in refused(make(tmp_path / "m", weights), UnsupportedModelError)


def test_what_a_tied_model_and_old_files_may_carry_along(tmp_path: Path) -> None:
    weights = tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float64)}
    weights |= {"model.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    tied = open_checkpoint(make(tmp_path / "m", weights, tie_word_embeddings=True))
    assert "lm_head.weight" not in tied.tensors
    del weights["lm_head.weight"]
    assert tied.tensors.keys() == open_checkpoint(make(tmp_path / "m", weights, tie_word_embeddings=True)).tensors.keys()
    assert "tensor 'lm_head.weight' of shape [16, 32] is missing" in refused(make(tmp_path / "m", weights))


def test_a_hub_snapshot_of_symlinks(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..") / "blobs" / path.name)
    assert len(open_checkpoint(folder).tensors) == len(tensors())
    (blobs / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty).startswith(f"{empty}: the folder is empty, expected config.json")
    (empty / "README.md").write_text("x")
    assert f"{empty}: config.json is missing" in refused(empty)
    (empty / "config.json").write_text(json.dumps(CONFIG))
    assert "has no weights, expected model.safetensors" in refused(empty)
    (empty / "pytorch_model.bin").write_bytes(b"x")
    assert "has only pytorch_model.bin, a pickle that can run any code" in refused(empty)
    assert "no such file or folder" in refused(tmp_path / "nowhere", ModelNotFoundError)
    assert "expected a folder, a .safetensors file or a .gguf file" in refused(empty / "README.md")
    (empty / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_bytes(b"x")
    assert "holds 2 GGUF files (a.gguf, b.gguf" in refused(empty)
    (empty / "b.gguf").unlink()
    assert f"{empty / 'a.gguf'}: has 1 bytes" in refused(empty)


@pytest.mark.parametrize("path", ["", "a\0b", 3, None, b"\xff\0"])
def test_paths_that_are_none(path: Any) -> None:
    assert "expected the path of a folder or file" in refused(path, InvalidArgumentError)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "not valid JSON"), (b"[]", "expected a JSON object"), (b'{"a":' * 99_999, "nested too deeply"),
     (b'{"x": NaN}', "NaN"), (b" " * ((1 << 20) + 1), "has 1,048,577 bytes, expected at most 1,048,576")],
)  # fmt: skip
def test_bad_config_files(text: bytes, message: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    for name in ("generation_config.json", "config.json"):
        (folder / name).write_bytes(text)
        error = refused(folder)
        assert error.startswith(str(folder / name)) and message in error


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert refused(folder) == f"{folder / 'config.json'}: is not a regular file."


def test_the_fuzzer_finds_nothing_in_five_seconds() -> None:
    script = Path(__file__).parent / "fuzz" / "fuzz_files.py"
    run = subprocess.run(
        [sys.executable, str(script), "--seconds", "5", "--seed", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("refused") == 5
