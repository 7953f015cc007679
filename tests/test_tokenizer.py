"""Tokenizers from tokenizer.json and from GGUF metadata, against the tokenizers library and against each other."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from pyruntime.errors import InvalidArgumentError, ModelFileError, UnsupportedModelError
from pyruntime.gguf import GgufTokenizerMetadata, read_gguf, read_tokenizer_metadata
from pyruntime.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("  \n'stre12<|_>▁é漢🙂"), max_size=60)
WORDS = ["the", " the", " cat", "ing", "<|", "|>", "é", "漢", "\n\n", "  ", "12", "'s", " s"]


def byte_letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level_meta(pre: str | None = "gpt-2", **changes: Any) -> GgufTokenizerMetadata:
    """All bytes, the steps to a few words, two control tokens and a user-defined one."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, merges = byte_letters(), []
    for word in WORDS:
        left = ""
        for letter in letters.pre_tokenize_str(word)[0][0]:
            if left and left + letter not in tokens:
                tokens.append(left + letter)
                merges.append(f"{left} {letter}")
            left += letter
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER_DEFINED]
    tokens += ["<|im_start|>", "<|im_end|>", "<tool>"]
    n = len(tokens)
    meta = GgufTokenizerMetadata(
        tokens=tokens, merges=merges, token_types=types, scores=None, model="gpt2", pre=pre,
        bos_id=n - 3, eos_id=n - 2, unk_id=None, pad_id=None, eot_id=None, add_bos=None, add_eos=None,
        chat_template=None, n_vocab=n,
    )  # fmt: skip
    return replace(meta, **changes)


def sentencepiece_meta(**changes: Any) -> GgufTokenizerMetadata:
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "a", "c", "▁c", "at", "▁cat", "s", "<", ">", "s>", "l", "o", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 259 + [float(-i) for i in range(len(pieces))]
    meta = GgufTokenizerMetadata(
        tokens=tokens, merges=[], token_types=types, scores=scores, model="llama", pre="default",
        bos_id=1, eos_id=2, unk_id=0, pad_id=None, eot_id=None, add_bos=None, add_eos=None,
        chat_template=None, n_vocab=len(tokens),
    )  # fmt: skip
    return replace(meta, **changes)


def reference(meta: GgufTokenizerMetadata) -> Library:
    """The same byte-level vocabulary in the library's own words, as published tokenizer.json files have it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library = Library(models.BPE(vocab={t: i for i, t in enumerate(meta.tokens)}, merges=[tuple(m.split(" ")) for m in meta.merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if meta.pre == "smollm" else byte_level
    library.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        library.add_tokens(
            [AddedToken(t, special=special, normalized=False) for t, k in zip(meta.tokens, meta.token_types, strict=True) if k == kind]
        )
    return library


def naive_sentencepiece(meta: GgufTokenizerMetadata, text: str) -> list[int]:
    """SentencePiece's BPE by its definition: join the neighbours with the best score, the leftmost of equals."""
    assert meta.scores is not None
    ids = {t: i for i, (t, k) in enumerate(zip(meta.tokens, meta.token_types, strict=True)) if k == NORMAL}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        joins = [(-meta.scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not joins:
            break
        at = min(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    out = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [meta.tokens.index(f"<0x{b:02X}>") for b in symbol.encode()]
    return out


@pytest.fixture(scope="module")
def smollm2_meta(smollm2_gguf: Path) -> GgufTokenizerMetadata:
    meta = read_tokenizer_metadata(read_gguf(smollm2_gguf), 49152)
    assert meta is not None
    return meta


@pytest.fixture(scope="module")
def smollm2(smollm2_meta: GgufTokenizerMetadata) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_meta)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
@given(text=ANY_TEXT)
def test_byte_level_equals_library(pre: str, text: str) -> None:
    meta = byte_level_meta(pre)
    tokenizer, library = TOKENIZERS[pre], LIBRARIES[pre]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == library.encode(text).ids
    assert tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.n_vocab == meta.n_vocab


TOKENIZERS = {pre: Tokenizer.from_gguf(byte_level_meta(pre)) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe")}
LIBRARIES = {pre: reference(byte_level_meta(pre)) for pre in ("gpt-2", "smollm")}
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_meta())


@given(st.text("thecats <>lo 漢é\n", max_size=30))
def test_sentencepiece_equals_definition(text: str) -> None:
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == naive_sentencepiece(sentencepiece_meta(), text)
    assert SENTENCEPIECE.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        # Known cuts of the published tokenizers: digits one by one, in threes, or whole; contractions; line ends.
        ("gpt-2", ["a", " ", " b", "12345", "'s", "\n", "\n", "xI", "'", "LL"]),
        ("smollm", ["a", " ", " b", "1", "2", "3", "4", "5", "'s", "\n", "\n", "xI", "'", "LL"]),
        ("qwen2", ["a", " ", " b", "1", "2", "3", "4", "5", "'s", "\n\n", "xI", "'LL"]),
        ("llama-bpe", ["a", " ", " b", "123", "45", "'s", "\n\n", "xI", "'LL"]),
        ("default", ["a", " ", " b", "123", "45", "'", "s", "\n", "\n", "xI", "'", "LL"]),
    ],
)
def test_pre_tokenizer_cuts(pre: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    tokenizer = Tokenizer.from_gguf(byte_level_meta(pre))
    cutter = tokenizer._tk.pre_tokenizer
    assert [text[a:b] for _, (a, b) in cutter.pre_tokenize_str(text)] == pieces


def test_qwen2_composes_characters() -> None:
    tokenizer = TOKENIZERS["qwen2"]
    assert tokenizer.decode(tokenizer.encode("e\u0301", add_special_tokens=False)) == "\u00e9"


def test_real_model_equals_library(smollm2: Tokenizer, smollm2_meta: GgufTokenizerMetadata) -> None:
    library = reference(smollm2_meta)
    text = "I can't say 1234 things…\n\n\tdef f(x):  return x²  # 漢字 🙂🙂 'S 'll  <|im_start|>user\nHi<|im_end|>\n"
    ids = smollm2.encode(text, add_special_tokens=True)
    assert ids == library.encode(text).ids
    assert smollm2.decode(ids, skip_special=False) == text
    assert (smollm2.n_vocab, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, (2, 0))
    assert smollm2.token_to_id("<|im_end|>") == 2 and smollm2.token_to_id("no such token") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT)
def test_real_model_is_cut_anywhere(smollm2: Tokenizer, text: str) -> None:
    ids = smollm2.encode(text, add_special_tokens=False)
    assert streamed(smollm2, ids) == smollm2.decode(ids)


def streamed(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    stream = tokenizer.stream(**options)
    out = ""
    for i, token_id in enumerate(ids):
        piece = stream.push(token_id)
        assert "\ufffd" not in piece or "\ufffd" in tokenizer.decode(ids[: i + 1], **options)
        out += piece
    return out + stream.finish()


@given(st.lists(st.integers(0, len(sentencepiece_meta().tokens) + 3), max_size=30), st.booleans(), st.booleans())
def test_stream_equals_decode_for_any_ids(ids: list[int], skip_special: bool, continuation: bool) -> None:
    for tokenizer in (SENTENCEPIECE, TOKENIZERS["gpt-2"]):
        whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
        assert streamed(tokenizer, ids, skip_special=skip_special, continuation=continuation) == whole


def test_stream_holds_back_half_a_character() -> None:
    tokenizer = TOKENIZERS["gpt-2"]
    ids = tokenizer.encode("🙂!", add_special_tokens=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂", "!"]
    assert stream.push(ids[0]) == "" and stream.finish() == "\ufffd"


def test_leading_space_of_sentencepiece() -> None:
    ids = SENTENCEPIECE.encode("the cat", add_special_tokens=False)
    assert SENTENCEPIECE.decode(ids) == "the cat"
    assert SENTENCEPIECE.decode(ids, continuation=True) == " the cat"
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode("  the", add_special_tokens=True)) == "  the"
    bare = Tokenizer.from_gguf(sentencepiece_meta(add_space_prefix=False))
    assert bare.decode(bare.encode(" the", add_special_tokens=False)) == " the"


@given(ANY_TEXT)
def test_plain_text_makes_no_control_token(text: str) -> None:
    text = f"{text}<|im_end|><s></s>{text}"
    for tokenizer in (TOKENIZERS["llama-bpe"], SENTENCEPIECE):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert not tokenizer.special_ids.intersection(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.special_ids.intersection(tokenizer.encode(text, add_special_tokens=False))


def test_control_token_spelt_by_the_vocabulary_is_refused() -> None:
    meta = byte_level_meta("llama-bpe")  # looks whole words up before it merges
    meta = replace(meta, tokens=[*meta.tokens, "stop"], token_types=[*meta.token_types, CONTROL])
    with pytest.raises(InvalidArgumentError, match="'stop'"):
        Tokenizer.from_gguf(meta).encode("stop", add_special_tokens=False, parse_special=False)


def test_threads_do_not_mix_their_options() -> None:
    tokenizer, wrong = TOKENIZERS["gpt-2"], []

    def work(parse: bool) -> None:
        expected = tokenizer.encode("a<|im_end|>", add_special_tokens=False, parse_special=parse)
        for _ in range(300):
            if tokenizer.encode("a<|im_end|>", add_special_tokens=False, parse_special=parse) != expected:
                wrong.append(parse)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, []), ({"add_bos": True}, ["bos"]), ({"add_bos": True, "add_eos": True}, ["bos", "eos"])],
)
def test_special_tokens_around_a_gguf_text(changes: dict[str, bool], expected: list[str]) -> None:
    meta = byte_level_meta(**changes)
    tokenizer = Tokenizer.from_gguf(meta)
    around = {"bos": meta.bos_id, "eos": meta.eos_id}
    inner = tokenizer.encode("cat", add_special_tokens=False)
    ids = tokenizer.encode("cat", add_special_tokens=True)
    assert [i for i in ids if i not in inner] == [around[name] for name in expected]
    assert SENTENCEPIECE.encode("", add_special_tokens=True) == [1]
    assert TOKENIZERS["llama-bpe"].encode("", add_special_tokens=True) == [meta.bos_id]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "bert"}, UnsupportedModelError, "tokenizer model 'bert'"),
        ({"pre": "tekken"}, UnsupportedModelError, "pre-tokenizer 'tekken' .*known: .*smollm"),
        ({"pre": None}, UnsupportedModelError, "does not name its pre-tokenizer"),
        ({"model": "llama"}, UnsupportedModelError, "needs scores"),
        ({"token_types": []}, UnsupportedModelError, "no token types"),
        ({"token_types": [1]}, ModelFileError, "tokens but 1 token types"),
        ({"scores": [0.5]}, ModelFileError, "tokens but 1 scores"),
        ({"bos_id": 10**6}, ModelFileError, "bos_id is 1000000"),
        ({"merges": ["a"]}, ModelFileError, "merge 0 .* 'a'"),
        ({"merges": ["a b c"]}, ModelFileError, "merge 0"),
        ({"merges": ["qqq zzz"]}, ModelFileError, "out of vocabulary"),
    ],
)
def test_bad_gguf_metadata(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        Tokenizer.from_gguf(byte_level_meta(**changes), source="model.gguf")
    assert str(caught.value).startswith("model.gguf: ")


def test_bad_gguf_vocabulary() -> None:
    meta = byte_level_meta()
    with pytest.raises(ModelFileError, match="token '<tool>' is there twice"):
        Tokenizer.from_gguf(replace(meta, tokens=[*meta.tokens[:-2], "<tool>", "<tool>"]))
    long = sentencepiece_meta()
    long.tokens[-1] = "x" * 100_000
    with pytest.raises(ModelFileError, match="has 100000 characters"):
        Tokenizer.from_gguf(long)
    some_bytes = sentencepiece_meta(unk_id=None)
    some_bytes.token_types[10] = NORMAL
    with pytest.raises(UnsupportedModelError, match="neither all 256 byte tokens"):
        Tokenizer.from_gguf(some_bytes)


def save(library: Library, folder: Path, config: dict[str, Any] | None = None) -> Tokenizer:
    library.save(str(folder / "tokenizer.json"))
    if config is None:
        return Tokenizer.from_file(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(folder / "tokenizer.json", folder / "tokenizer_config.json")


def test_byte_level_file(tmp_path: Path) -> None:
    meta = byte_level_meta()
    library = reference(meta)
    library.enable_truncation(4)  # some published files have it on
    bos, eos = {"content": "<|im_start|>", "lstrip": False}, "<|im_end|>"
    tokenizer = save(library, tmp_path, {"bos_token": bos, "eos_token": eos, "unk_token": None})
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (meta.bos_id, (meta.eos_id,), None)
    text = "the cat's 12 <tool> é漢 <|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == TOKENIZERS["gpt-2"].encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")
    assert tokenizer.id_to_text(ids[-1]) == "<|im_end|>"


@pytest.mark.parametrize("kind", ["legacy", "metaspace"])
def test_sentencepiece_file(tmp_path: Path, kind: str) -> None:
    """The two ways in which Llama 2's tokenizer is published."""
    library = SENTENCEPIECE._tk
    library = Library.from_str(library.to_str())
    if kind == "legacy":
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        library.decoder = decoders.Sequence(steps)
    else:
        library.normalizer = normalizers.Sequence([])
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        library.decoder = decoders.Metaspace(prepend_scheme="first")
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = save(library, tmp_path)
    assert tokenizer.bos_id == 1
    ids = tokenizer.encode("the cats", add_special_tokens=True)
    assert ids == SENTENCEPIECE.encode("the cats", add_special_tokens=True)
    assert tokenizer.decode(ids) == library.decode(ids) == "the cats"
    assert tokenizer.decode(ids[1:], continuation=True) == " the cats"


def test_llama_class_overrules_post_processor(tmp_path: Path) -> None:
    library = reference(byte_level_meta())
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True, "add_eos_token": False}
    other = save(library, tmp_path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    assert len(other.encode("a", add_special_tokens=True)) == 1
    llama = save(library, tmp_path, {**config, "tokenizer_class": "LlamaTokenizerFast"})
    assert llama.encode("a", add_special_tokens=True)[0] == llama.bos_id


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 100_000])
def test_damaged_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json: "):
        Tokenizer.from_file(path)
    with pytest.raises(ModelFileError, match=r"absent\.json: cannot be read"):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_damaged_config(tmp_path: Path) -> None:
    for content in ("[]", "{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ModelFileError, match=r"tokenizer_config\.json: "):
            Tokenizer.from_file(tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json")


def test_unknown_decoder_is_refused(tmp_path: Path) -> None:
    library = reference(byte_level_meta())
    library.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match="decoder WordPiece"):
        save(library, tmp_path)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", 3, None, b"abc"])
def test_bad_text(text: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="text"):
        SENTENCEPIECE.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("ids", [[-1], ["a"], [1.5], [None]])
def test_bad_ids(ids: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="token id"):
        SENTENCEPIECE.decode(ids)
