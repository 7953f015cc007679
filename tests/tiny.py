"""Small models for tests: the weights of a golden, and a whole model folder with a tokenizer that loads in milliseconds."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from goldens.weights import StorageDtype, write_hf_folder

from pyruntime.checkpoint import open_checkpoint
from pyruntime.session import Entry, Session, Weights

GOLDENS = Path(__file__).resolve().parent / "goldens"

# 96 tokens: <unk>, <s>, <|im_end|>, <|im_start|>, then characters as byte-level BPE spells them. The last four are the bytes of one emoji.
EMOJI = "🙂"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-+*/=<>|_#@ĠĊ"
_EMOJI_LETTERS = "ðŁĻĤ"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=4)
def golden_weights(folder: Path, dtype: str = "auto", device: str = "cpu") -> Weights:
    """The tensors of a Hugging Face folder, kept in `dtype` ("auto": the folder's own)."""
    with open_checkpoint(folder) as checkpoint:
        weights = Weights(checkpoint.config, dtype=checkpoint.config.dtype if dtype == "auto" else dtype, device=device)
        weights.load(checkpoint.tensors, threads=2)
    return weights


def all_logits(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits [n_tok, n_vocab] of a fresh sequence, which is freed again."""
    seq = session.create_sequence()
    logits = session.step([Entry(seq, ids)], logits="all").logits
    session.free_sequence(seq)
    assert logits is not None and np.isfinite(logits).all()
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def write_tiny_model(folder: Path, *, dtype: StorageDtype = "bf16", shards: int = 1, **config: Any) -> Path:
    """The golden "llama3" (96 tokens, 2 layers) with a character tokenizer and a chat template; `config` overrides keys of config.json."""
    write_hf_folder(GOLDENS / "llama3", folder, dtype, shards=shards)
    values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2} | config
    (folder / "config.json").write_text(json.dumps(values))
    tokens = ["<unk>", "<s>", "<|im_end|>", "<|im_start|>", *dict.fromkeys(_LETTERS + _EMOJI_LETTERS)]
    assert len(tokens) <= 96, len(tokens)
    plain = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = [{"id": i, "content": text, **plain} for i, text in enumerate(tokens[:4])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    (folder / "tokenizer.json").write_text(
        json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "pre_tokenizer": byte_level,
            "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
        })
    )  # fmt: skip
    tokenizer_config = {"chat_template": CHAT_TEMPLATE, "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder
