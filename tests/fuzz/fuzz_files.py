"""Mutation fuzz of everything that reads a model file: safetensors, the sharded index, config.json, GGUF.

    python tests/fuzz/fuzz_files.py --seconds 20 --seed 0

Every outcome must be success or a PyruntimeError. Anything else ends the run with a traceback, the target, the seed and
the path of the file that caused it (kept). Which inputs are tried depends on the seed alone; how many, on the time.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyruntime.checkpoint import open_checkpoint
from pyruntime.errors import PyruntimeError
from pyruntime.safetensors import read_folder, read_header

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_sliding_window": True,
    "sliding_window": 16, "max_window_layers": 0, "layer_types": ["sliding_attention"], "bos_token_id": 1,
    "eos_token_id": [2, 3], "torch_dtype": "float32", "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 32,
                     "beta_slow": 1, "original_max_position_embeddings": 32, "truncate": False},
}  # fmt: skip
GENERATION: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [2, 3]}
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-320, 1e308, "", "x", "\ud800",
    "a\0b",
    "../x.safetensors", "F64", "yarn", [], [[]], {}, {"a": {}}, [0] * 50, "9" * 100, {"": None},
]  # fmt: skip
ODD_NUMBERS = [0, 1, 7, 8, 9, 31, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def tensor_shapes() -> dict[str, list[int]]:
    layer = "model.layers.0."
    shapes = {"model.embed_tokens.weight": [16, 32], "model.norm.weight": [32]}
    shapes |= {f"{layer}{norm}.weight": [32] for norm in ("input_layernorm", "post_attention_layernorm")}
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        shapes |= {f"{layer}self_attn.{name}_proj.weight": [rows, 32], f"{layer}self_attn.{name}_proj.bias": [rows]}
    shapes[f"{layer}self_attn.o_proj.weight"] = [32, 32]
    return shapes | {f"{layer}mlp.{name}_proj.weight": [32, 32] for name in ("gate", "up", "down")}


def safetensors_bytes(shapes: dict[str, list[int]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def gguf_bytes() -> bytes:
    """A small GGUF file, written by hand so that no other code than the reader's is exercised."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def value(v: Any) -> bytes:
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        if isinstance(v, bool):
            return struct.pack("<I?", 7, v)
        if isinstance(v, int):
            return struct.pack("<II", 4, v)
        if isinstance(v, float):
            return struct.pack("<If", 6, v)
        if isinstance(v[0], str):
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        return struct.pack(f"<IIQ{len(v)}i", 9, 5, len(v), *v)

    keys: dict[str, Any] = {
        "general.architecture": "llama", "general.alignment": 32, "llama.block_count": 1, "llama.context_length": 64,
        "llama.embedding_length": 32, "llama.feed_forward_length": 32, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(16)], "tokenizer.ggml.token_type": [1] * 16,
        "tokenizer.ggml.merges": ["t 1"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "general.sampling.temp": 0.5,
    }  # fmt: skip
    b = "blk.0."
    shapes = {
        "token_embd.weight": [16, 32],
        "output_norm.weight": [32],
        b + "attn_norm.weight": [32],
        b + "ffn_norm.weight": [32],
    }
    shapes |= {b + "attn_q.weight": [32, 32], b + "attn_k.weight": [16, 32], b + "attn_v.weight": [16, 32]}
    shapes |= {b + f"{name}.weight": [32, 32] for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    out = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys))
    out += b"".join(string(k) + value(v) for k, v in keys.items())
    at = 0
    for name, shape in shapes.items():
        quantised = len(shape) > 1 and name.startswith("blk")
        out += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 8 if quantised else 0, at)
        at += -(-shape[0] * (34 if quantised else 4 * (shape[1] if len(shape) > 1 else 1)) // 32) * 32
    return out + bytes(-len(out) % 32) + bytes(at)


def mutate_bytes(raw: bytes, rng: random.Random, head: int) -> bytes:
    """One to four edits, most of them in the first `head` bytes."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), head) if rng.random() < 0.9 else len(data)) if data else 0
        edit = rng.randrange(7)
        if edit == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif edit == 1 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif edit == 2:
            width = rng.choice([4, 8])
            data[at : at + width] = (rng.choice(ODD_NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif edit == 3:
            del data[at:]
        elif edit == 4:
            del data[at : at + rng.randint(1, 16)]
        elif edit == 5:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            data[at:at] = data[at : at + rng.randint(1, 64)]
    return bytes(data)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy with one node replaced, dropped, renamed or moved."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        out = dict(value)
        key = rng.choice(list(out))
        edit = rng.randrange(6)
        if edit == 0:
            del out[key]
        elif edit == 1:
            out[rng.choice(["new_key", "_private", "", "factor", "head_dim", "dtype", "rope_parameters"])] = rng.choice(ODD_VALUES)
        elif edit == 2:
            out[key] = out[rng.choice(list(out))]
        else:
            out[key] = mutate_json(out[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.8:
        items = list(value)
        i = rng.randrange(len(items))
        items[i] = mutate_json(items[i], rng)
        return items if rng.random() < 0.7 else items + items[i:]
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice([-1, 1, value, -2 * value])
    return rng.choice(ODD_VALUES)


def json_text(value: Any, rng: random.Random) -> bytes:
    """The value, mutated as a tree and now and then also as text."""
    for _ in range(rng.randint(1, 3)):
        value = mutate_json(value, rng)
    text = json.dumps(value).encode()
    if rng.random() < 0.02:
        return b'{"a":' + b"[" * rng.choice([100, 3000, 200_000])
    return mutate_bytes(text, rng, len(text)) if rng.random() < 0.3 else text


class Fuzzer:
    """A valid model folder and a valid GGUF file in `root`, and one method per target that damages and reads them."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root = root
        self.rng = rng
        self.weights = safetensors_bytes(tensor_shapes())
        self.gguf = gguf_bytes()
        names = list(tensor_shapes())
        self.index = {n: f"m-{1 + i % 2}.safetensors" for i, n in enumerate(names)}
        for i in (1, 2):
            part = {n: s for n, s in tensor_shapes().items() if self.index[n] == f"m-{i}.safetensors"}
            (root / f"m-{i}.safetensors").write_bytes(safetensors_bytes(part))
        self.targets: list[Callable[[], Path]] = [
            self.safetensors,
            self.header,
            self.sharded,
            self.config,
            self.metadata,
        ]

    def safetensors(self) -> Path:
        """Bytes of a safetensors file."""
        path = self.root / "a.safetensors"
        path.write_bytes(mutate_bytes(self.weights, self.rng, 2500))
        read_header(path)
        return path

    def header(self) -> Path:
        """Values in the JSON header of a safetensors file, with a true length."""
        path = self.root / "b.safetensors"
        length = int.from_bytes(self.weights[:8], "little")
        text = json_text(json.loads(self.weights[8 : 8 + length]), self.rng)
        path.write_bytes(struct.pack("<Q", len(text)) + text + self.weights[8 + length :])
        read_header(path)
        return path

    def sharded(self) -> Path:
        """The index of a sharded checkpoint."""
        path = self.root / "model.safetensors.index.json"
        path.write_bytes(json_text({"metadata": {"total_size": 1}, "weight_map": self.index}, self.rng))
        read_folder(self.root)
        return path

    def config(self) -> Path:
        """config.json and generation_config.json of a whole folder."""
        folder = self.root / "model"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(self.weights)
        (folder / "config.json").write_bytes(json_text(CONFIG, self.rng))
        odd = self.rng.random() < 0.3
        (folder / "generation_config.json").write_bytes(json_text(GENERATION, self.rng) if odd else b"{}")
        read_all(folder)
        return folder / "config.json"

    def metadata(self) -> Path:
        """Header and metadata of a GGUF file."""
        path = self.root / "m.gguf"
        path.write_bytes(mutate_bytes(self.gguf, self.rng, 1900))
        read_all(path)
        return path


def read_all(path: Path) -> None:
    """Opens a checkpoint and reads the last row of every tensor."""
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.tensors.values():
            assert tensor.read(tensor.shape[0] - 1).shape == (1, *tensor.shape[1:])


def fuzz(seconds: float, seed: int) -> dict[str, tuple[int, int]]:
    """Runs every target in turn for `seconds` and returns how many inputs were (accepted, refused) by each."""
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="pyruntime-fuzz-"))
    fuzzer = Fuzzer(root, rng)
    read_all_seeds(fuzzer)
    counts = {target.__name__: [0, 0] for target in fuzzer.targets}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for target in fuzzer.targets:
            begin = time.monotonic()
            try:
                target()
                counts[target.__name__][0] += 1
            except PyruntimeError as error:
                str(error).encode()  # a message that cannot be printed is a failure too
                counts[target.__name__][1] += 1
            except BaseException:
                print(
                    f"target {target.__name__}, seed {seed}, round {sum(counts[target.__name__])}: see {root}",
                    file=sys.stderr,
                )
                raise
            if time.monotonic() - begin > 5.0:
                raise AssertionError(f"target {target.__name__}, seed {seed}: an input took more than 5 s, see {root}")
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()
    return {name: (accepted, refused) for name, (accepted, refused) in counts.items()}


def read_all_seeds(fuzzer: Fuzzer) -> None:
    """The undamaged files must be readable, or the mutations would only test the first check."""
    folder = fuzzer.root / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(fuzzer.weights)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (fuzzer.root / "m.gguf").write_bytes(fuzzer.gguf)
    (fuzzer.root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": fuzzer.index}))
    read_folder(fuzzer.root)
    read_all(folder)
    read_all(fuzzer.root / "m.gguf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, (accepted, refused) in fuzz(args.seconds, args.seed).items():
        print(f"{name:12} {accepted + refused:8} inputs, {accepted:6} accepted, {refused:6} refused")


if __name__ == "__main__":
    main()
