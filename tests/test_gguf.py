"""GGUF files made by gguf.GGUFWriter, hostile headers made by hand, the real SmolLM2 against its Hugging Face form."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from pyruntime.models.gguf import llama3_divisors

from pyruntime.checkpoint import Checkpoint, open_checkpoint
from pyruntime.config import RopeConfig
from pyruntime.errors import ModelFileError, PyruntimeError, UnsupportedModelError
from pyruntime.gguf import LOADABLE, read_gguf, shortest

N_LAYER, H_Q, H_KV, D_HEAD, D_MODEL, D_FF, N_VOCAB = 1, 4, 2, 16, 256, 256, 32
KIND = gguf.GGMLQuantizationType


def heads_of(name: str) -> int:
    """Heads of a tensor that llama.cpp's converter permutes, else 0."""
    return {"attn_q": H_Q, "attn_k": H_KV}.get(name.split(".")[2], 0) if name.startswith("blk.") else 0


def permute(w: Any, n_head: int) -> Any:
    """What llama.cpp's converter does to Llama's Q and K: halves to interleaved pairs."""
    return w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape) if n_head else w


def tiny(arch: str, *, bias: bool = False, qk_norm: bool = False, tied: bool = False) -> dict[str, Any]:
    """Random tensors under GGUF names, in Hugging Face row order."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_VOCAB, D_MODEL), "output_norm.weight": (D_MODEL,)}
    if not tied:
        shapes["output.weight"] = (N_VOCAB, D_MODEL)
    q, kv = H_Q * D_HEAD, H_KV * D_HEAD
    for i in range(N_LAYER):
        b = f"blk.{i}."
        shapes |= {b + "attn_norm.weight": (D_MODEL,), b + "ffn_norm.weight": (D_MODEL,)}
        shapes |= {
            b + "attn_q.weight": (q, D_MODEL),
            b + "attn_k.weight": (kv, D_MODEL),
            b + "attn_v.weight": (kv, D_MODEL),
        }
        shapes |= {b + "attn_output.weight": (D_MODEL, q), b + "ffn_gate.weight": (D_FF, D_MODEL)}
        shapes |= {b + "ffn_up.weight": (D_FF, D_MODEL), b + "ffn_down.weight": (D_MODEL, D_FF)}
        if bias:
            shapes |= {b + "attn_q.bias": (q,), b + "attn_k.bias": (kv,), b + "attn_v.bias": (kv,)}
        if qk_norm:
            shapes |= {b + "attn_q_norm.weight": (D_HEAD,), b + "attn_k_norm.weight": (D_HEAD,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path,
    tensors: dict[str, Any],
    arch: str = "llama",
    types: dict[str, Any] | None = None,
    blocks: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **extra: Any,
) -> Path:
    """A file as the converter writes it. types: other types than F32, by name.

    blocks: raw rows that are stored as they are.

    extra: metadata keys below the architecture, with "__" for "."; a leading "_" makes a key absolute.
    """
    writer = gguf.GGUFWriter(path, arch)
    keys: dict[str, Any] = {
        "block_count": N_LAYER, "context_length": 512, "embedding_length": D_MODEL, "feed_forward_length": D_FF,
        "attention.head_count": H_Q, "attention.head_count_kv": H_KV, "attention.key_length": D_HEAD,
        "attention.value_length": D_HEAD, "rope.dimension_count": D_HEAD, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    absolute = {k[1:].replace("__", "."): v for k, v in extra.items() if k.startswith("_")}
    keys |= {k.replace("__", "."): v for k, v in extra.items() if not k.startswith("_")}
    absolute |= {f"{arch}.{k}": v for k, v in keys.items() if k not in drop}
    for key, value in absolute.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data in tensors.items():
        kind = (types or {}).get(name, KIND.F32)
        if blocks and name in blocks:
            rows = blocks[name]
        else:
            permuted = permute(data, heads_of(name) if arch == "llama" else 0)
            rows = gguf.quants.quantize(np.ascontiguousarray(permuted), kind)
        writer.add_tensor(name, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NAMES = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
NAMES |= {
    f"layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in (
        ("attn_norm.weight", "attn_norm.weight"), ("q.weight", "attn_q.weight"), ("k.weight", "attn_k.weight"),
        ("v.weight", "attn_v.weight"), ("o.weight", "attn_output.weight"), ("q.bias", "attn_q.bias"),
        ("k.bias", "attn_k.bias"), ("v.bias", "attn_v.bias"), ("q_norm.weight", "attn_q_norm.weight"),
        ("k_norm.weight", "attn_k_norm.weight"), ("ffn_norm.weight", "ffn_norm.weight"),
        ("gate.weight", "ffn_gate.weight"), ("up.weight", "ffn_up.weight"), ("down.weight", "ffn_down.weight"),
    )
}  # fmt: skip


def assert_equal(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    assert set(checkpoint.tensors) == {ours for ours, theirs in NAMES.items() if theirs in expected}
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[NAMES[name]], err_msg=name)


@pytest.mark.parametrize(
    ("arch", "bias", "qk_norm", "tied"),
    [
        ("llama", False, False, False),
        ("llama", True, False, True),
        ("qwen2", True, False, True),
        ("qwen3", False, True, False),
    ],
)
def test_families_come_back_in_hugging_face_order(arch: str, bias: bool, qk_norm: bool, tied: bool, tmp_path: Path) -> None:
    tensors = tiny(arch, bias=bias, qk_norm=qk_norm, tied=tied)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", tensors, arch))
    assert_equal(checkpoint, tensors)
    c = checkpoint.config
    assert (c.family, c.n_layer, c.h_q, c.h_kv, c.d_head, c.d_model, c.d_ff) == (
        arch,
        1,
        H_Q,
        H_KV,
        D_HEAD,
        D_MODEL,
        D_FF,
    )
    assert (c.n_vocab, c.max_position, c.norm_eps, c.dtype) == (N_VOCAB, 512, 1e-5, "f32")
    assert (c.qkv_bias, c.qk_norm, c.tied_embeddings) == (bias, qk_norm, tied)
    assert c.rope == RopeConfig("default", 10000.0)
    assert (checkpoint.kind, checkpoint.gguf_tokenizer, checkpoint.eos_ids) == ("gguf", None, ())


def random_blocks(kind: Any, rows: int, columns: int) -> Any:
    """Random Q4_K or Q6_K blocks, which gguf cannot quantise to, whose half-precision scales are finite and small."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(3).integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    for at in {KIND.Q6_K: [208], KIND.Q4_K: [0, 2]}[kind]:
        raw[:, :, at + 1] = 0x20 + raw[:, :, at + 1] % 8
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", [KIND[name] for name in LOADABLE], ids=LOADABLE)
def test_every_type_is_dequantised_in_any_row_chunks(kind: Any, tmp_path: Path) -> None:
    tensors = tiny("llama")
    block = gguf.GGML_QUANT_SIZES[kind][0]
    types = {name: kind for name, data in tensors.items() if data.ndim == 2 and data.shape[1] % block == 0}
    blocks: dict[str, Any] = {}
    for name in types:
        permuted = permute(tensors[name], heads_of(name))
        if kind in (KIND.Q4_K, KIND.Q6_K):
            blocks[name] = random_blocks(kind, *permuted.shape)
        else:
            blocks[name] = gguf.quants.quantize(permuted, kind)
    path = write(tmp_path / "m.gguf", tensors, types=types, blocks=blocks)
    for name in types:
        stored = gguf.quants.dequantize(blocks[name], kind)
        n_head = heads_of(name)
        rows = stored.reshape(n_head, -1, 2, stored.shape[1]).swapaxes(1, 2) if n_head else stored
        tensors[name] = rows.reshape(stored.shape)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.dtype == {KIND.F32: "f32", KIND.F16: "f16"}.get(kind, "bf16")
    assert_equal(checkpoint, tensors)
    rng = random.Random(5)
    for name in ("layers.0.q.weight", "layers.0.k.weight", "layers.0.down.weight"):
        tensor, whole = checkpoint.tensors[name], tensors[NAMES[name]]
        assert tensor.read(D_HEAD, D_HEAD).shape == (0, *tensor.shape[1:])
        for _ in range(12):
            begin = rng.randrange(tensor.shape[0] + 1)
            end = rng.randrange(begin, tensor.shape[0] + 1)
            np.testing.assert_array_equal(tensor.read(begin, end), whole[begin:end])


def test_other_types_are_refused_by_tensor_and_type(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny("llama"), types={"blk.0.ffn_up.weight": KIND.Q5_0})
    with pytest.raises(UnsupportedModelError, match=r"'blk.0.ffn_up.weight': has type Q5_0; supported are F32"):
        open_checkpoint(path)


def rope_of(tmp_path: Path, freqs: Any = None, **extra: Any) -> RopeConfig:
    tensors = tiny("llama")
    if freqs is not None:
        tensors["rope_freqs.weight"] = np.array(freqs, np.float32)
    return open_checkpoint(write(tmp_path / "m.gguf", tensors, **extra)).config.rope


def test_rope_scaling(tmp_path: Path) -> None:
    assert rope_of(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0) == RopeConfig("linear", 1e4, 4.0)
    assert rope_of(tmp_path, rope__scaling__factor=4.0) == RopeConfig("linear", 1e4, 4.0)
    assert rope_of(tmp_path, rope__scaling__type="none") == RopeConfig("default", 1e4)
    yarn = rope_of(tmp_path, rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=128)
    assert replace(yarn, attention_factor=0.0) == RopeConfig("yarn", 1e4, 4.0, 128)
    assert yarn.attention_factor == pytest.approx(1.138629)
    for kind in ("longrope", "x"):
        with pytest.raises(UnsupportedModelError, match=f"rope scaling is '{kind}'"):
            rope_of(tmp_path, rope__scaling__type=kind)
    with pytest.raises(ModelFileError, match="expected at least 1 for yarn"):
        rope_of(tmp_path, rope__scaling__type="yarn")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_are_recognised(factor: float, tmp_path: Path) -> None:
    llama3 = RopeConfig("llama3", 500000.0, factor, 8192, 1.0, 4.0)
    freqs = converter_factors(500000.0, D_HEAD, factor)
    np.testing.assert_allclose(freqs, llama3_divisors(llama3, D_HEAD), rtol=1e-5)
    assert freqs[0] == 1.0 and freqs[-1] == factor
    assert rope_of(tmp_path, freqs, rope__freq_base=500000.0) == llama3
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight.*not those of Llama 3"):
        rope_of(tmp_path, [*freqs[:-1], factor + 1], rope__freq_base=500000.0)
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight.*shape \[7\], expected \[8\]"):
        rope_of(tmp_path, freqs[:-1], rope__freq_base=500000.0)
    assert rope_of(tmp_path, [1.0] * 8).kind == "default"


def converter_factors(theta: float, d: int, factor: float) -> list[float]:
    """The formula of llama.cpp's converter, by wavelength."""
    out = []
    for freq in 1.0 / theta ** (np.arange(0, d, 2, dtype=np.float32) / d):
        wavelength = 2 * np.pi / freq
        smooth = (8192 / wavelength - 1.0) / 3.0
        out.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else 1 / ((1 - smooth) / factor + smooth))
    return [float(x) for x in out]


TOKENIZER: dict[str, Any] = {
    "_tokenizer__ggml__model": "gpt2", "_tokenizer__ggml__pre": "llama-bpe",
    "_tokenizer__ggml__tokens": [f"t{i}é" for i in range(N_VOCAB)], "_tokenizer__ggml__token_type": [1] * N_VOCAB,
    "_tokenizer__ggml__merges": ["t 1", "t 2"], "_tokenizer__ggml__bos_token_id": 1,
    "_tokenizer__ggml__eos_token_id": 2, "_tokenizer__ggml__eot_token_id": 5, "_tokenizer__ggml__padding_token_id": -1,
    "_tokenizer__ggml__add_bos_token": True, "_tokenizer__chat_template": "{{ x }}",
}  # fmt: skip


def test_tokenizer_metadata(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        write(tmp_path / "m.gguf", tiny("llama"), **TOKENIZER, _general__sampling__temp=0.5, _general__sampling__top_k=40)
    )
    t = checkpoint.gguf_tokenizer
    assert t is not None
    assert (t.tokens[3], t.merges, t.token_types, t.scores) == ("t3é", ["t 1", "t 2"], [1] * N_VOCAB, None)
    assert (t.model, t.pre, t.chat_template, t.n_vocab) == ("gpt2", "llama-bpe", "{{ x }}", N_VOCAB)
    assert (t.bos_id, t.eos_id, t.eot_id, t.unk_id, t.pad_id) == (1, 2, 5, None, None)
    assert (t.add_bos, t.add_eos, t.add_space_prefix) == (True, None, None)
    assert (checkpoint.bos_id, checkpoint.eos_ids, checkpoint.pad_id) == (1, (2, 5), None)
    assert checkpoint.generation_config == {"temperature": 0.5, "top_k": 40}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_tokenizer__ggml__tokens": ["a"]}, "has 1 tokens, expected 32"),
        ({"_tokenizer__ggml__tokens": [1, 2]}, "expected an array of str"),
        ({"_tokenizer__ggml__token_type": [1]}, "'tokenizer.ggml.token_type' has 1 values"),
        ({"_tokenizer__ggml__bos_token_id": 32}, "'tokenizer.ggml.bos_token_id' is 32"),
        ({"_tokenizer__ggml__bos_token_id": "x"}, "'tokenizer.ggml.bos_token_id' is 'x'"),
        ({"_tokenizer__ggml__add_bos_token": 1}, "expected true or false"),
        ({"_tokenizer__ggml__model": 1}, "expected a string"),
    ],
)
def test_bad_tokenizer_metadata(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny("llama"), **{**TOKENIZER, **changes})
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": 0}, "'block_count' is 0"),
        ({"block_count": 2}, "'blk.1.attn_norm.weight' of shape [256] is missing"),
        ({"attention__head_count": 3}, "3 attention heads are not a multiple"),
        ({"attention__key_length": 7}, "value_length"),
        ({"feed_forward_length": 128}, "'blk.0.ffn_gate.weight' has shape [256, 256], expected [128, 256]"),
        ({"new_thing": 1}, "'new_thing'"), ({"expert_count": 8}, "'expert_count' is 8"),
        ({"rope__dimension_count": 8}, "'rope.dimension_count' is 8"), ({"_split__count": 2}, "one of 2 parts"),
        ({"_general__type": "adapter"}, "'general.type' is 'adapter'"),
        ({"_general__alignment": 3}, "'general.alignment' is 3"),
        ({"attention__scale": 0.5}, "'attention.scale' is 0.5"), ({"logit_scale": 0.5}, "'logit_scale' is 0.5"),
        ({"rope__freq_base": 0.0}, "'rope.freq_base' is 0"), ({"attention__head_count_kv": [2]}, "head_count_kv"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "is nan"), ({"context_length": "x"}, "is 'x'"),
        ({"drop": ("context_length",)}, "'context_length' is missing"),
    ],
)  # fmt: skip
def test_bad_metadata(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny("llama"), **changes)
    with pytest.raises((ModelFileError, UnsupportedModelError)) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_other_architectures_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"architecture is 'mamba'; supported in GGUF are llama, qwen2, qwen3"):
        open_checkpoint(write(tmp_path / "m.gguf", tiny("llama"), "mamba"))
    extra = {**tiny("llama"), "blk.0.ffn_gate_inp.weight": np.zeros((8, 256), np.float32)}
    with pytest.raises(ModelFileError, match=r"'blk.0.ffn_gate_inp.weight' of shape \[8, 256\] is not part of"):
        open_checkpoint(write(tmp_path / "m.gguf", extra))


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(n_tensor: int = 0, n_key: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensor, n_key) + body


KEY = string(b"a.b")
ENTRY = string(b"t") + struct.pack("<I", 1)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version 1": (header(version=1), "GGUF version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensor count": (header(n_tensor=2**64 - 1), "the number of tensors is"),
    "key count": (header(n_key=2**40), "the number of metadata keys is"),
    "key count past the end": (header(n_key=1000), "a metadata key"),
    "key length": (header(n_key=1, body=struct.pack("<Q", 2**63)), "reaches past the end"),
    "key not UTF-8": (header(n_key=1, body=string(b"\xff") + bytes(40)), "not UTF-8"),
    "value type": (header(n_key=1, body=KEY + struct.pack("<I", 77) + bytes(9)), "has type 77"),
    "string length": (header(n_key=1, body=KEY + struct.pack("<IQ", 8, 2**62)), "reaches past the end"),
    "array length": (header(n_key=1, body=KEY + struct.pack("<IIQ", 9, 4, 2**62)), "the length of 'a.b'"),
    "array past the end": (header(n_key=1, body=KEY + struct.pack("<IIQ", 9, 4, 2**20)), "reaches past the end"),
    "string array": (header(n_key=1, body=KEY + struct.pack("<IIQ", 9, 8, 2**24)), "reaches past the end"),
    "nested array": (header(n_key=1, body=KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(32)), "nests arrays"),
    "duplicate key": (header(n_key=2, body=(KEY + struct.pack("<II", 4, 0)) * 2), "'a.b' occurs twice"),
    "dimensions": (header(1, 0, string(b"t") + struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
    "no dimensions": (header(1, 0, string(b"t") + bytes(40)), "has 0 dimensions"),
    "zero dimension": (header(1, 0, ENTRY + struct.pack("<QIQ", 0, 0, 0)), "has the dimensions [0]"),
    "huge dimension": (header(1, 0, ENTRY + struct.pack("<QIQ", 2**63, 0, 0)), "expected numbers from 1"),
    "tensor type": (header(1, 0, ENTRY + struct.pack("<QIQ", 32, 999, 0)), "type number 999"),
    "block size": (header(1, 0, string(b"t") + struct.pack("<IQQIQ", 2, 33, 1, 8, 0)), "multiple of Q8_0's 32"),
    "past the end": (header(1, 0, ENTRY + struct.pack("<QIQ", 32, 0, 2**63) + bytes(99)), "ends at byte"),
    "unaligned": (header(1, 0, ENTRY + struct.pack("<QIQ", 1, 0, 4) + bytes(99)), "starts at byte 4"),
    "overlap": (
        header(2, 0, ENTRY + struct.pack("<QIQ", 9, 0, 0) + string(b"u") + struct.pack("<IQIQ", 1, 9, 0, 32) + bytes(199)),
        "starts at byte 32",
    ),
    "same name": (header(2, 0, (ENTRY + struct.pack("<QIQ", 1, 0, 0)) * 2 + bytes(99)), "occurs twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises((ModelFileError, UnsupportedModelError)) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny("llama"), **TOKENIZER)
    whole = path.read_bytes()
    for length in [*range(0, 4000, 31), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(PyruntimeError):
            open_checkpoint(path)


def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tiny("llama"))
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="was it changed"):
        checkpoint.tensors["layers.0.q.weight"].read()


def test_shortest_decimal_of_a_float32() -> None:
    assert shortest(struct.unpack("<f", struct.pack("<f", 1e-6))[0]) == 1e-6
    exact = struct.unpack("<f", struct.pack("<f", 1 / 3))[0]
    assert struct.pack("<f", shortest(exact)) == struct.pack("<f", exact)


def test_the_header_equals_what_the_gguf_package_reads(smollm2_gguf: Path) -> None:
    ours, theirs = read_gguf(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(fields) == set(ours.metadata)
    for key, value in fields.items():
        mine = ours.metadata[key]
        assert (list(mine) if isinstance(value, list) else np.float32(mine) if isinstance(value, float) else mine) == value
    assert {t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.type_name, t.shape, t.offset, t.nbytes) for t in ours.tensors.values()
    }


def test_the_real_model_equals_its_hugging_face_form(smollm2_gguf: Path, smollm2_hf: Path) -> None:
    one, other = open_checkpoint(smollm2_gguf), open_checkpoint(smollm2_hf)
    assert replace(one.config, architecture=other.config.architecture) == other.config
    assert (one.bos_id, one.eos_ids, one.pad_id) == (other.bos_id, other.eos_ids, other.pad_id)
    assert set(one.tensors) == set(other.tensors)
    for name, tensor in one.tensors.items():
        for begin in range(0, tensor.shape[0], 5000):
            end = min(begin + 5000, tensor.shape[0])
            ours, theirs = tensor.read(begin, end), other.tensors[name].read(begin, end)
            u = ours.view(np.uint32)
            rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16 << 16
            np.testing.assert_array_equal(rounded.view(np.float32), theirs, err_msg=name)
