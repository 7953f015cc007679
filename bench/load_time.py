"""Time from Model(...) on a large safetensors folder to its first token, in a fresh process and with the files in the page cache.

    python bench/load_time.py FOLDER [--config llama3.1-8b] [--device cuda:0] [--out FILE.json]

FOLDER is made if it does not exist: a model of the named shape with random bf16 weights, sharded like a hub's, and the tokenizer of the
tests' small models.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPES = {
    "llama3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHARD = 5 << 30  # bytes, as on the hub

MEASURE = """
import json, sys, time
start = time.perf_counter()
import pyruntime
model = pyruntime.Model(sys.argv[1], device=sys.argv[2], max_context=int(sys.argv[3]))
loaded = time.perf_counter()
model.generate([5, 6, 7], temperature=0, max_tokens=1, ignore_eos=True)
done = time.perf_counter()
import resource
print(json.dumps({"load_seconds": loaded - start, "first_token_seconds": done - start, "weight_bytes": model.stats()["weight_bytes"],
                  "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def tensors(c: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Hub name -> shape of every tensor."""
    d, ff = c["hidden_size"], c["intermediate_size"]
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (w, d) for n, w in (("q", d), ("k", kv), ("v", kv), ("o", d))}
        shapes |= {f"{at}.mlp.gate_proj.weight": (ff, d), f"{at}.mlp.up_proj.weight": (ff, d), f"{at}.mlp.down_proj.weight": (d, ff)}
    shapes["model.norm.weight"] = (d,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], d)
    return shapes


def write_folder(folder: Path, name: str) -> None:
    """Random bf16 weights: one block of random values, repeated, with the exponents of a standard deviation of about 0.02."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for tensor, shape in tensors(SHAPES[name]).items():
        n_byte = 2 * int(np.prod(shape))
        if size + n_byte > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][tensor] = shape
        size += n_byte
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for tensor, shape in shard.items():
            n_byte = 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + n_byte]}
            offset += n_byte
            index[tensor] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _ in range(offset // len(block)):
                out.write(block)
            out.write(block[: offset % len(block)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": 2,
              "torch_dtype": "bfloat16", **SHAPES[name]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    tokenizer = {"version": "1.0", "model": model, "pre_tokenizer": byte_level, "decoder": byte_level}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", choices=SHAPES, default="llama3.1-8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.folder.exists():
        start = time.perf_counter()
        write_folder(args.folder, args.config)
        print(f"{args.folder} written in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    runs = []
    for _ in range(args.runs):
        command = [sys.executable, "-c", MEASURE, str(args.folder), args.device, str(args.max_context)]
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(json.dumps(runs[-1]))
    if args.out:
        args.out.write_text(json.dumps({"config": args.config, "device": args.device, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
