"""Fixtures: the real model, fetched once into the package's cache, and small random models of every family."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from decoding import open_session, weights  # noqa: F401  the sessions of the attention tests
from tiny import write_tiny_model

import pyruntime
from pyruntime import catalog, download

DATA = Path(__file__).parent / "data"
SPARSE = "tactic:min_context=70,segment=256,window=0,sinks=0,p=0.02,tail=0,cluster=4"  # on short texts already, and few rows of them
TEXT = DATA / "jargon-60k.txt"  # the Jargon File (public domain), 14,608 SmolLM2 tokens


def pytest_configure(config: pytest.Config) -> None:
    """`pytest -m gpu` runs the tests of the GPU. All others are about the CPU, also on a machine that has one: it is hidden from them."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: the programs that tests interrupt would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that use the real model carry the marker `model`, so that they can be left out with -m "not model"."""
    no_gpu = "" if config.option.markexpr == "gpu" else "run with -m gpu, as `make test` does"
    if not no_gpu and not any(d.is_cuda and d.usable for d in pyruntime._lib.devices()):
        no_gpu = "no usable GPU: " + pyruntime.build_info().get("cuda_reason", "no NVIDIA driver or no GPU was found")
    for item in items:
        if any(name.startswith("smollm2") for name in getattr(item, "fixturenames", ())):
            item.add_marker("model")
        if no_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=no_gpu))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, 96 tokens that are characters, and random weights."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF."""
    return download.fetch(catalog.resolve("smollm2-135m"))


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face folder in bf16, made with the gguf and safetensors packages, not with our readers."""
    import gguf
    from safetensors.numpy import save
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HfTokenizer

    reader = gguf.GGUFReader(smollm2_gguf)
    fields = {k: v.contents() for k, v in reader.fields.items() if k.startswith(("tokenizer.", "llama."))}
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    tensors = {}
    for t in reader.tensors:
        w = np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32)
        _, *middle, _ = t.name.split(".")
        if middle:
            layer, short = middle
            if short in ("attn_q", "attn_k"):  # GGUF interleaves the halves of each head
                heads = 9 if short == "attn_q" else 3
                w = w.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(w.shape)
            tensors[f"model.layers.{layer}.{names[short]}.weight"] = w
        else:
            tensors["model.embed_tokens.weight" if t.name.startswith("token_embd") else "model.norm.weight"] = w
    halves = {}
    for name, w in tensors.items():
        u = np.ascontiguousarray(w).view(np.uint32)
        halves[name] = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    folder = tmp_path_factory.mktemp("smollm2_hf")
    raw = save(halves)  # as U16: numpy has no bf16; the header is corrected below
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].replace(b'"U16"', b'"BF16"')
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tk = HfTokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tk.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tk.decoder = decoders.ByteLevel()
    tk.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, types, strict=True) if k == 3])
    tk.save(str(folder / "tokenizer.json"))
    tokenizer_config = {"chat_template": fields["tokenizer.chat_template"], "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Iterator[pyruntime.Model]:
    """The real model in bf16 with its defaults; tests must leave its page pool as they found it."""
    with pyruntime.Model(smollm2_gguf, threads=2) as model:
        yield model


@pytest.fixture(scope="session")
def text() -> str:
    """64 KB of English prose."""
    return TEXT.read_text(encoding="utf-8")
