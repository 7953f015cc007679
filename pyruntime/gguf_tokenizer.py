"""The `tokenizers` object that a GGUF file's metadata describes: byte-level BPE, or SentencePiece BPE as merges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

    from .gguf import GgufTokenizerMetadata

_MAX_PIECE = 1024  # characters of a SentencePiece token; its default limit is 16
_NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expressions that cut text into words before byte-level BPE, by the name in tokenizer.ggml.pre; each cuts
# the pieces that the one before left. The last one of GPT-2's kind is ByteLevel's own.
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", "gpt-2", r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": ("gpt-2",),
    "llama-bpe": (_LLAMA3_SPLIT,),
    "qwen2": (_LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "smollm": (r"\p{N}", "gpt-2"),
}
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


@contextmanager
def library_errors(source: str, error: type[Exception] = ModelFileError) -> Iterator[None]:
    """Everything that the tokenizers library raises, panics of its Rust code included, as one of our errors."""
    try:
        yield
    except Exception as e:
        raise error(f"{source}: the tokenizers library refuses it: {e}") from e
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise error(f"{source}: the tokenizers library fails on it: {e}") from None


def check_gguf_lists(meta: GgufTokenizerMetadata, source: str) -> list[str]:
    """The vocabulary, after every list and id of the metadata was found to fit it."""
    n_vocab = len(meta.tokens)
    if n_vocab and not meta.token_types:
        raise UnsupportedModelError(
            f"{source}: has no token types (tokenizer.ggml.token_type), so control tokens cannot be told from text;"
            " convert the model again with a current llama.cpp"
        )
    if len(meta.token_types) != n_vocab:
        raise ModelFileError(f"{source}: {n_vocab} tokens but {len(meta.token_types)} token types")
    if meta.scores is not None and len(meta.scores) != n_vocab:
        raise ModelFileError(f"{source}: {n_vocab} tokens but {len(meta.scores)} scores")
    for name in ("bos_id", "eos_id", "unk_id", "pad_id", "eot_id"):
        value = getattr(meta, name)
        if value is not None and not 0 <= value < n_vocab:
            raise ModelFileError(f"{source}: {name} is {value}, but there are {n_vocab} tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(meta.tokens)]
    if len(set(tokens)) != n_vocab:
        twice = Counter(tokens).most_common(1)[0][0]
        raise ModelFileError(f"{source}: token {twice!r:.80} is there twice")
    return tokens


def add_tokens(tk: tokenizers.Tokenizer, tokens: list[tuple[str, bool]]) -> None:
    from tokenizers import AddedToken

    tk.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in tokens])


def build_byte_level(meta: GgufTokenizerMetadata, tokens: list[str], source: str) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    known = sorted([*_PRE_TOKENIZERS, *PRE_ALIASES])
    if meta.pre is None:
        raise UnsupportedModelError(
            f"{source}: does not name its pre-tokenizer (tokenizer.ggml.pre), so text would be cut in the wrong places;"
            " convert the model again with a current llama.cpp"
        )
    pre = PRE_ALIASES.get(meta.pre, meta.pre)
    if pre not in _PRE_TOKENIZERS:
        raise UnsupportedModelError(f"{source}: pre-tokenizer {meta.pre!r} is not implemented (known: {', '.join(known)})")
    merges = []
    for i, merge in enumerate(meta.merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelFileError(f"{source}: merge {i} must be two tokens with a space between, is {merge!r}")
        merges.append((left, right))
    with library_errors(source):
        # Llama 3 looks a whole word up first: some of its words cannot be reached by merges.
        model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe")
        tk = Tokenizer(model)
    if pre == "qwen2":
        tk.normalizer = normalizers.NFC()
    splits = [
        pre_tokenizers.Split(Regex(_GPT2_SPLIT if split == "gpt-2" else split), behavior="isolated") for split in _PRE_TOKENIZERS[pre]
    ]
    tk.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tk.decoder = decoders.ByteLevel()
    return tk


def build_sentencepiece(meta: GgufTokenizerMetadata, tokens: list[str], source: str) -> tokenizers.Tokenizer:
    """SentencePiece BPE as merges: a pair may join if the result is a piece, and the best score goes first."""
    from tokenizers import Tokenizer, models, normalizers

    if meta.scores is None:
        raise UnsupportedModelError(f"{source}: a 'llama' tokenizer needs scores (tokenizer.ggml.scores), has none")
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    byte_fallback = byte_tokens <= {t for t, kind in zip(tokens, meta.token_types, strict=True) if kind == _BYTE}
    if not byte_fallback and meta.unk_id is None:
        raise UnsupportedModelError(f"{source}: has neither all 256 byte tokens nor an unknown token")
    longest = max(tokens, key=len, default="")
    if len(longest) > _MAX_PIECE:
        raise ModelFileError(f"{source}: token {longest!r:.40} has {len(longest)} characters, at most {_MAX_PIECE}")
    # Control, byte and user-defined tokens are not made of smaller ones: nothing may merge into or out of them.
    score = {token: s for token, s, kind in zip(tokens, meta.scores, meta.token_types, strict=True) if kind in (_NORMAL, _UNUSED)}
    merges = [
        (s, token[:at], token[at:])
        for token, s in score.items()
        for at in range(1, len(token))
        if token[:at] in score and token[at:] in score
    ]
    merges.sort(key=lambda m: (-m[0], -len(m[1])))
    with library_errors(source):
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for _, left, right in merges],
            unk_token=None if meta.unk_id is None else tokens[meta.unk_id],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
        tk = Tokenizer(model)
    to_space = normalizers.Replace(" ", "▁")
    # llama.cpp puts the space before every stretch of text between control tokens; so does Prepend.
    add_space = meta.add_space_prefix is not False
    tk.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_space]) if add_space else to_space
    return tk
