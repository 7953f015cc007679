"""Writes a bf16 GGUF of a Llama-family Hugging Face folder, without a tokenizer: what llama-bench needs and no more.

    python bench/peers/gguf_from_hf.py FOLDER OUT.gguf

Needs numpy and gguf. Weights must be bfloat16 and are copied bit for bit, norms widened to float32 as llama.cpp wants.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def read_bf16_tensors(folder: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """Every tensor of the folder's safetensors files as the bits of its bfloat16 values."""
    tensors: dict[str, npt.NDArray[np.uint16]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + int(data[:8].view("<u8")[0])
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{path}: {name} is {entry['dtype']}, expected BF16")
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = data[first:last].view("<u2").reshape(entry["shape"])
    if not tensors:
        raise SystemExit(f"{folder}: no .safetensors file")
    return tensors


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def interleave_rope_rows(x: npt.NDArray[np.uint16], n_head: int) -> npt.NDArray[np.uint16]:
    """Row order (i, i + d_head/2) of Hugging Face to the (2i, 2i + 1) that llama.cpp rotates for Llama."""
    halves = x.reshape(n_head, 2, x.shape[0] // n_head // 2, x.shape[1])
    return np.swapaxes(halves, 1, 2).reshape(x.shape)


def write_gguf(folder: Path, out: Path) -> None:
    """Writes `out` from the config.json and the safetensors files of `folder`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise SystemExit(f"{folder}: only model_type llama without rope scaling is supported here")
    h_q, h_kv = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    d_head = config.get("head_dim") or config["hidden_size"] // h_q

    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(h_q)
    writer.add_head_count_kv(h_kv)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # llama-bench feeds random ids
    for name, bits in read_bf16_tensors(folder).items():
        if bits.ndim == 1:
            widened: npt.NDArray[np.float32] = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), widened)
            continue
        if ".q_proj." in name or ".k_proj." in name:
            bits = interleave_rope_rows(bits, h_q if ".q_proj." in name else h_kv)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(bits).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_gguf(args.folder, args.out)
    print(args.out, file=sys.stderr)
