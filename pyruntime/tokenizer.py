"""Text to token ids and back.

One class over `tokenizers.Tokenizer`, whether the vocabulary comes from a tokenizer.json or from the metadata of a GGUF
file. Encoding is the library's; decoding is done here, from the bytes of each token, so that decoding a whole list and
decoding it token by token are the same computation.
"""

from __future__ import annotations

import codecs
import json
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidArgumentError, ModelFileError, UnsupportedModelError
from .gguf_tokenizer import (
    CONTROL,
    PRE_ALIASES,
    UNKNOWN,
    USER_DEFINED,
    add_tokens,
    build_byte_level,
    build_sentencepiece,
    check_gguf_lists,
    library_errors,
)

if TYPE_CHECKING:
    import tokenizers

    from .gguf import GgufTokenizerMetadata

LITERAL_MARK = "\ufdd0"  # around words of a rendered chat that must stay words; no character, so no text needs it
_MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json seen is 34 MB
# Control tokens that end a turn or a text, whatever the file says its eos is: files name one, chat models use two.
_END_TEXTS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>",
    "</s>", "<EOT>",
})  # fmt: skip


class Tokenizer:
    """A vocabulary with its rules. Safe to use from several threads.

    n_vocab: number of token ids, added tokens included (a model's embedding may be padded beyond it)
    bos_id: id that starts a text, or None
    eos_ids: ids that end a text or a turn; generation_config.json may know more
    special_ids: ids of the control tokens, which decode to nothing unless asked for
    """

    def __init__(
        self,
        tk: tokenizers.Tokenizer,
        *,
        token_to_bytes: Callable[[str], bytes],
        strip_space: bool,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        unk_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        """For from_file and from_gguf. `strip_space`: the text starts with one space that is not part of it."""
        tk.no_truncation()
        tk.no_padding()
        added = tk.get_added_tokens_decoder()
        self._tk = tk
        self._lock = threading.Lock()  # encode_special_tokens is a setting of the object, not of the call
        self._token_to_bytes = token_to_bytes
        self._added_text = {i: token.content for i, token in added.items()}
        self._bytes: dict[int, bytes] = {}
        self._strip_space = strip_space
        self._prefix, self._suffix = list(prefix), list(suffix)
        self.n_vocab: int = tk.get_vocab_size(with_added_tokens=True)
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.unk_id = unk_id
        self.pad_id = pad_id
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def from_file(cls, tokenizer_json: Path, tokenizer_config: Path | None = None) -> Tokenizer:
        """Reads a tokenizer.json and, where there is one, the tokenizer_config.json beside it (bos, eos, unk, pad).

        Raises ModelFileError for a file that is damaged, UnsupportedModelError for a decoder that is not implemented.
        """
        import tokenizers

        config = _read_json_object(tokenizer_config) if tokenizer_config is not None else {}
        text = _read_text(tokenizer_json)
        with library_errors(str(tokenizer_json)):
            tk = tokenizers.Tokenizer.from_str(text)
        token_to_bytes, strip_space = _read_decoder(tk, str(tokenizer_json))
        prefix, suffix = _read_post_processor(tk, str(tokenizer_json))
        named = {}
        for name in ("bos", "eos", "unk", "pad"):
            value = config.get(f"{name}_token")
            if isinstance(value, dict):
                value = value.get("content")
            named[name] = tk.token_to_id(value) if isinstance(value, str) else None
        if str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
            # Only this class lets the configuration overrule the post-processor of tokenizer.json.
            for name, at in (("bos", prefix), ("eos", suffix)):
                add, token = config.get(f"add_{name}_token"), named[name]
                if isinstance(add, bool) and token is not None:
                    at[:] = [token] if add else []
        if named["bos"] is None and tokenizer_config is None and prefix:
            named["bos"] = prefix[0]
        return cls(
            tk, token_to_bytes=token_to_bytes, strip_space=strip_space, prefix=prefix, suffix=suffix,
            bos_id=named["bos"], eos_ids=[] if named["eos"] is None else [named["eos"]],
            unk_id=named["unk"], pad_id=named["pad"],
        )  # fmt: skip

    @classmethod
    def from_gguf(cls, meta: GgufTokenizerMetadata, *, source: str = "GGUF tokenizer") -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes. `source`: the file, for messages.

        Models: "gpt2" (byte-level BPE, pre-tokenizers default, gpt-2, llama-bpe, qwen2, smollm) and "llama"
        (SentencePiece BPE). Raises UnsupportedModelError for others, by name, and ModelFileError for lists that
        disagree.
        """
        tokens = check_gguf_lists(meta, source)
        if meta.model == "gpt2":
            tk = build_byte_level(meta, tokens, source)
            token_to_bytes, strip_space = _byte_level_bytes, False
        elif meta.model == "llama":
            tk = build_sentencepiece(meta, tokens, source)
            token_to_bytes, strip_space = _sentencepiece_bytes, meta.add_space_prefix is not False
        else:
            raise UnsupportedModelError(f"{source}: tokenizer model {meta.model!r} is not implemented (only 'gpt2' and 'llama' are)")
        special = {i for i, kind in enumerate(meta.token_types) if kind in (CONTROL, UNKNOWN)}
        add_tokens(tk, [(tokens[i], True) for i in sorted(special)])
        add_tokens(tk, [(tokens[i], False) for i, kind in enumerate(meta.token_types) if kind == USER_DEFINED])
        ends = [meta.eos_id, meta.eot_id, *(i for i in sorted(special) if tokens[i] in _END_TEXTS)]
        # What llama.cpp assumes where the file is silent.
        starts_with_bos = meta.model == "llama" or PRE_ALIASES.get(meta.pre or "", meta.pre) == "llama-bpe"
        add_bos = starts_with_bos if meta.add_bos is None else meta.add_bos
        return cls(
            tk, token_to_bytes=token_to_bytes, strip_space=strip_space,
            prefix=[meta.bos_id] if add_bos and meta.bos_id is not None else [],
            suffix=[meta.eos_id] if meta.add_eos and meta.eos_id is not None else [],
            bos_id=meta.bos_id, eos_ids=[i for i in ends if i is not None], unk_id=meta.unk_id, pad_id=meta.pad_id,
        )  # fmt: skip

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: put the ids around it that the model was trained with (usually bos in front, or nothing)
        parse_special: a control token spelt in the text, such as "<|im_end|>", becomes that token. With False it is
            plain text, and no text of whatever kind can produce a control token (the unknown token excepted).

        Raises InvalidArgumentError for anything but a string that UTF-8 can hold.
        """
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise InvalidArgumentError(
                f"text has a lone surrogate {text[e.start]!r} at character {e.start}, which no UTF-8 text can hold;"
                " decode its source as UTF-8, or replace the character"
            ) from None
        with self._lock, library_errors("tokenizer", InvalidArgumentError):
            self._tk.encode_special_tokens = not parse_special
            ids: list[int] = self._tk.encode(text, add_special_tokens=False).ids
        if not parse_special:
            leaked = {i for i in self.special_ids.intersection(ids) if i != self.unk_id}
            if leaked:  # a vocabulary in which ordinary merges spell a control token
                raise InvalidArgumentError(
                    f"text contains {self._added_text[min(leaked)]!r}, which this tokenizer cannot encode as plain text"
                )
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat: control tokens are those of the template, nothing is added around.

        What ChatTemplate.render() put between LITERAL_MARKs because it came from a message is encoded as plain text.
        """
        ids: list[int] = []
        for i, part in enumerate(text.split(LITERAL_MARK)):
            if part:
                ids += self.encode(part, add_special_tokens=False, parse_special=i % 2 == 0)
        return ids

    @property
    def special_texts(self) -> list[str]:
        """How the control tokens are spelt."""
        return [self._added_text[i] for i in sorted(self.special_ids)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids without a token decode to nothing.

        skip_special: leave control tokens out
        continuation: the ids go on from an earlier text, so a SentencePiece model's first space is kept
        """
        stream = self.stream(skip_special=skip_special, continuation=continuation)
        return stream.push_many(ids) + stream.finish()

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> Detokenizer:
        """A detokenizer that takes ids one by one; options as in decode()."""
        return Detokenizer(self, skip_special=skip_special, strip_space=self._strip_space and not continuation)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for (control tokens: their name; no such token: b"")."""
        found = self._bytes.get(token_id)
        if found is None:
            if token_id < 0:
                raise InvalidArgumentError(f"token id must not be negative, got {token_id}")
            if token_id in self._added_text:
                found = self._added_text[token_id].encode("utf-8")
            else:
                token = self._tk.id_to_token(token_id) if token_id < self.n_vocab else None
                found = b"" if token is None else self._token_to_bytes(token)
            self._bytes[token_id] = found
        return found

    def id_to_text(self, token_id: int) -> str:
        """One token for people to read, spaces and control tokens included; half characters show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry as the model file spells it ("<|im_end|>", "Ġthe"), or None."""
        found: int | None = self._tk.token_to_id(token)
        return found


class Detokenizer:
    """Turns ids into text one by one. All pieces together are exactly decode() of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, strip_space: bool) -> None:
        """For Tokenizer.stream()."""
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes: possibly "", never half a character."""
        return self.push_many((token_id,))

    def push_many(self, ids: Iterable[int]) -> str:
        """The same for several ids at once."""
        return self._emit(self._utf8.decode(b"".join(self._pieces(ids))))

    def finish(self) -> str:
        """No more ids: an incomplete character at the end becomes U+FFFD."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _pieces(self, ids: Iterable[int]) -> Iterator[bytes]:
        for value in ids:
            try:
                token_id = operator.index(value)
            except TypeError:
                raise InvalidArgumentError(f"a token id must be an integer, got {value!r}") from None
            if token_id not in self._skip:
                yield self._token_bytes(token_id)

    def _emit(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise ModelFileError(f"{path}: {size} bytes is more than a tokenizer file may have ({_MAX_JSON_BYTES})")
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ModelFileError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise ModelFileError(f"{path}: is not UTF-8 (byte {e.start})") from None


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        raise ModelFileError(f"{path}: is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value


def _read_decoder(tk: tokenizers.Tokenizer, source: str) -> tuple[Callable[[str], bytes], bool]:
    """(bytes of a token, whether one leading space is dropped), from the decoder section of tokenizer.json."""
    decoder: Any = tk.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes, False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == "▁":
        return _spaced_bytes, steps[0]["prepend_scheme"] != "never"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        strip = steps[3] if kinds[3:] else {"content": " ", "start": 0, "stop": 0}
        to_space = steps[0]["pattern"] == {"String": "▁"} and steps[0]["content"] == " "
        if to_space and strip["content"] == " " and strip["start"] in (0, 1) and strip["stop"] == 0:
            return _sentencepiece_bytes, strip["start"] == 1
    raise UnsupportedModelError(
        f"{source}: decoder {' + '.join(map(str, kinds))} is not implemented (byte-level and SentencePiece ones are)"
    )


def _read_post_processor(tk: tokenizers.Tokenizer, source: str) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text, found by trying."""
    with library_errors(source):
        bare = tk.encode("a", add_special_tokens=False).ids
        full = tk.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UnsupportedModelError(f"{source}: post-processor turns ids {bare} into {full}; only ids around are known")


def _spaced_bytes(token: str) -> bytes:
    return token.replace("▁", " ").encode("utf-8")


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return _spaced_bytes(token)


def _byte_level_table() -> dict[str, int]:
    """GPT-2's 256 letters: printable Latin-1 bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_LETTER = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode("utf-8")  # an entry that was never made of bytes
