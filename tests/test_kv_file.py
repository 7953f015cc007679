"""Model.save and Model.load: the same next tokens as without, and files that are refused."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPARSE
from tiny import write_tiny_model

import pyruntime
from pyruntime import kv_file
from pyruntime.errors import AbortedError, InvalidArgumentError, OutOfPagesError
from pyruntime.session import Entry, Session

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(folder, threads=1) as model:
        yield model
        model.clear_cache()
        assert model.stats()["n_page_free"] == model.stats()["n_page"]


def text(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, 90, n).tolist()


# ---------------------------------------------------------------- the same next tokens


PUBLISHED = "tactic:min_context=70,segment=0,window=8,sinks=16,p=0.3,cluster=8"


def goes_on(folder: Path, tmp_path: Path, attention: str, n_prompt: int, device: str) -> None:
    """A text that was generated for a while, so that sparse attention has clustered it in several goes, then saved. What follows, with its
    log-probabilities, is to the bit what the model that wrote the file makes next; also in the third model."""
    with pyruntime.Model(folder, threads=1, attention=attention, device=device) as model:
        ids = text(1, n_prompt)
        for n_new in (300, 7):
            done = model.generate([*ids, 9, 9], **{**GREEDY, "max_tokens": n_new})
            ids = [*ids, 9, 9, *done.token_ids]
        assert model.save(tmp_path / "a.kv", ids) == len(ids) - 1  # the last one was drawn and not read
        clustered = model.stats()["n_clustered_token"]
        follow = [*ids, *text(2, 30)]
        want = model.generate(follow, logprobs=3, **GREEDY)
    for path in ("a.kv", "b.kv"):
        with pyruntime.Model(folder, threads=2, attention=attention, device=device) as other:
            assert other.load(tmp_path / path) == ids[:-1]
            assert (other.stats()["n_clustered_token"] > 0) == (clustered > 0)
            assert other.save(tmp_path / "b.kv", ids) == len(ids) - 1
            got = other.generate(follow, logprobs=3, **GREEDY)
            assert got.usage.cached_tokens == len(ids) - 1
            assert (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()


@pytest.mark.parametrize("attention", ["full", SPARSE, PUBLISHED])
@pytest.mark.parametrize("n_prompt", [40, 64, 700, 1500])
def test_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path, attention: str, n_prompt: int) -> None:
    goes_on(folder, tmp_path, attention, n_prompt, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["full", SPARSE, PUBLISHED])
@pytest.mark.parametrize("n_prompt", [64, 1500])
def test_on_a_gpu(folder: Path, tmp_path: Path, attention: str, n_prompt: int) -> None:
    goes_on(folder, tmp_path, attention, n_prompt, "cuda")


@pytest.mark.gpu
def test_a_gpu_and_the_cpu_read_the_same_file(folder: Path, tmp_path: Path) -> None:
    with pyruntime.Model(folder, threads=1, device="cuda") as model:
        model.save(tmp_path / "a.kv", text(1, 500))
    with pyruntime.Model(folder, threads=1, device="cpu") as model:
        model.load(tmp_path / "a.kv")
        model.save(tmp_path / "b.kv", text(1, 500))
    assert (tmp_path / "a.kv").read_bytes() == (tmp_path / "b.kv").read_bytes()


def test_real_model(smollm2: pyruntime.Model, tmp_path: Path, text: str) -> None:
    prompt = smollm2.tokenize(text)[:500]
    smollm2.clear_cache()
    want = smollm2.generate([*prompt, 30], logprobs=2, **GREEDY)
    smollm2.clear_cache()
    assert smollm2.save(tmp_path / "a.kv", prompt) == 500  # read for the purpose
    smollm2.clear_cache()
    smollm2.load(tmp_path / "a.kv")
    got = smollm2.generate([*prompt, 30], logprobs=2, **GREEDY)
    assert got.usage.cached_tokens == 500 and (got.token_ids, got.logprobs) == (want.token_ids, want.logprobs)
    smollm2.clear_cache()


def test_across_policies(folder: Path, tmp_path: Path) -> None:
    """Rows are saved in the order of their tokens: a file of a sparse model serves a dense one, and the other way round."""
    prompt = text(3, 900)
    with pyruntime.Model(folder, threads=1, attention=SPARSE) as model:
        ids = prompt + model.generate(prompt, **GREEDY).token_ids
        model.save(tmp_path / "sparse.kv", ids)
        assert model.stats()["n_clustered_token"] > 0
    with pyruntime.Model(folder, threads=1) as dense:
        dense.load(tmp_path / "sparse.kv")
        assert dense.generate(prompt[:880], **GREEDY).usage.cached_tokens == 879  # cut in the middle of what was a segment
        assert dense.n_cached(ids) == len(ids) - 1
        dense.clear_cache()
        want = dense.generate(prompt, **GREEDY)
        dense.save(tmp_path / "dense.kv", prompt)
    with pyruntime.Model(folder, threads=1, attention="tactic:min_context=70,p=1,window=0,sinks=0,segment=256") as model:
        model.load(tmp_path / "dense.kv")
        got = model.generate(prompt, **GREEDY)
        assert got.usage.cached_tokens == 898 and model.stats()["n_clustered_token"] >= 768
        assert len(got.token_ids) == len(want.token_ids)


def test_rows_of_others_stay_here(tiny: pyruntime.Model, tmp_path: Path) -> None:
    """Pages that were full before are written with zeros behind the last token; the same text is the same file."""
    tiny.clear_cache()
    tiny.generate(text(5, 2000), **GREEDY)
    tiny.clear_cache()
    tiny.save(tmp_path / "a.kv", text(6, 70))
    head = tiny.config
    rows = np.frombuffer((tmp_path / "a.kv").read_bytes()[-tiny.stats()["page_bytes"] * 2 :], dtype=np.uint16)
    rows = rows.reshape(head.n_layer, 2, 2, head.h_kv, 64, head.d_head)
    assert not rows[:, :, 1, :, 6:].any() and rows[:, :, 1, :, :6].any() and rows[:, :, 0].any(axis=(3, 4)).all()
    tiny.clear_cache()


def test_replaces_and_leaves_nothing_behind(tiny: pyruntime.Model, tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    path.write_text("older")
    assert tiny.save(path, "a text of some length") == len(tiny.tokenize("a text of some length"))
    assert tiny.load(path) == tiny.tokenize("a text of some length")
    for wrong in (tmp_path / "no" / "a.kv", tmp_path):
        with pytest.raises(InvalidArgumentError, match="cannot be written"):
            tiny.save(wrong, "a text of some length")
    with pytest.raises(InvalidArgumentError, match="single token"):
        tiny.save(tmp_path / "b.kv", [5])
    assert [p.name for p in tmp_path.iterdir()] == ["a.kv"]
    if Path("/dev/full").exists():
        (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(InvalidArgumentError, match=r"cannot be read \(No such file"):
        tiny.load(tmp_path / "b.kv")


# ---------------------------------------------------------------- files that are refused


@pytest.fixture(scope="module")
def good(tiny: pyruntime.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.kv"
    tiny.save(path, text(7, 200))
    return path


def refused(model: pyruntime.Model, path: Path, message: str) -> None:
    before = model.stats()["n_page_free"], model.stats()["n_sequence"]
    with pytest.raises(InvalidArgumentError, match=message) as error:
        model.load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert (model.stats()["n_page_free"], model.stats()["n_sequence"]) == before


def test_wrong_files(tiny: pyruntime.Model, folder: Path, good: Path, tmp_path: Path) -> None:
    raw, path = good.read_bytes(), tmp_path / "a.kv"
    n_header = struct.unpack_from("<I", raw, 12)[0]
    header = json.loads(raw[24 : 24 + n_header])

    def changed(**fields: Any) -> bytes:
        new = json.dumps({**header, **fields}).encode()
        return raw[:12] + struct.pack("<I", len(new)) + raw[16:24] + new + raw[24 + n_header :]

    body = 24 + n_header + 4 * 200
    for data, message in (
        (b"", "is not a KV file"),
        (b'{"model": "x", "messages": []}' * 3, "is not a KV file"),
        (raw[:8] + struct.pack("<I", 2) + raw[12:], "has version 2 of the format, this package reads version 1"),
        (raw[:-1], f"has {len(raw) - 1} bytes, {len(raw)} were written: it is cut short"),
        (raw + b"x", f"has {len(raw) + 1} bytes, {len(raw)} were written: it has grown"),
        (raw[:body], "cut short"),
        (changed(fingerprint="0" * 64), "was made with other weights of the same name; this is tiny"),
        (changed(fingerprint="0" * 64, model="other"), "was made with another model, 'other'; this is tiny"),
        (changed(dtype="f16"), "was made with dtype f16, this model runs in bf16: open it with dtype='f16'"),
        (changed(n_token=199), "has grown"),
        (changed(n_token=0), "its header cannot be read"),
        (changed(extra=1), "its header cannot be read"),
        (raw[: 24 + n_header] + struct.pack("<i", 96) + raw[28 + n_header :], "not those of a vocabulary of 96"),
        (raw[: 24 + n_header] + struct.pack("<i", -1) + raw[28 + n_header :], "not those of a vocabulary of 96"),
        (raw[:body] + b"X" + raw[body + 1 :], "this is not an exported sequence"),
        (raw[: body + 8] + struct.pack("<i", 9) + raw[body + 12 :], "version 9 of the layout"),
        (raw[: body + 12] + struct.pack("<i", 0) + raw[body + 16 :], "dtype is 0, the model has 2"),
        (raw[: body + 16] + struct.pack("<i", 3) + raw[body + 20 :], "n_layer is 3, the model has 2"),
        (raw[: body + 32] + struct.pack("<q", 130) + raw[body + 40 :], "not those of its 200 tokens"),
        (raw[: body + 32] + struct.pack("<q", 2**40) + raw[body + 40 :], "expected 1..8192"),
        (raw[: body + 56] + struct.pack("<i", 2**31 - 1) + raw[body + 60 :], "segments from page 0 on do not fit"),
    ):
        path.write_bytes(data)
        refused(tiny, path, message)
    refused(tiny, tmp_path, "cannot be read")
    with pyruntime.Model(folder, threads=1, dtype="f32") as other:
        refused(other, good, "was made with dtype bf16, this model runs in f32")
    with pyruntime.Model(folder, threads=1, max_context=128) as other:
        refused(other, good, "has 200 tokens, max_context is 128")
    with pyruntime.Model(folder, threads=1, prefix_cache=128) as other:
        refused(other, good, "give a larger prefix_cache")
    other_folder = write_tiny_model(tmp_path / "tiny", max_position_embeddings=4096, rope_theta=20000.0)
    with pyruntime.Model(other_folder, threads=1) as other:
        refused(other, good, "other weights of the same name")


def test_weights_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    """One changed number in the first row of one matrix is another model; the same numbers in another dtype of file are the same."""
    from pyruntime.checkpoint import open_checkpoint

    def fingerprint(where: Path) -> str:
        with open_checkpoint(where) as checkpoint:
            return kv_file.fingerprint(checkpoint)

    same = write_tiny_model(tmp_path / "same", dtype="f32", max_position_embeddings=2048)
    assert fingerprint(same) == fingerprint(folder)
    with open_checkpoint(folder) as checkpoint:
        tensor = checkpoint.tensors["layers.1.down.weight"]
        path, at = tensor.path, tensor.offset  # type: ignore[union-attr]
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    data = bytearray((changed / path.name).read_bytes())
    data[at + 2] ^= 1
    (changed / path.name).write_bytes(data)
    assert fingerprint(changed) != fingerprint(folder)


def test_a_dynamic_rope_depends_on_the_context(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    folder = write_tiny_model(tmp_path / "tiny", max_position_embeddings=512, rope_scaling=scaling)
    with pyruntime.Model(folder, threads=1, max_context=1024) as model:
        model.save(tmp_path / "a.kv", text(1, 100))
    with pyruntime.Model(folder, threads=1, max_context=2048) as model:
        refused(model, tmp_path / "a.kv", "rotated for a context of 1024 tokens, this session's for 2048")


def test_too_few_pages(tiny: pyruntime.Model, good: Path) -> None:
    session = Session(tiny._weights, max_context=1024, n_page=2, threads=1)
    with good.open("rb") as file:
        n_header = struct.unpack_from("<I", file.read(24), 12)[0]
        file.seek(24 + n_header + 800)
        with pytest.raises(OutOfPagesError, match="needs 4 KV pages"):
            session.import_sequence(file.readinto)  # type: ignore[attr-defined]
    assert session.stats()["n_sequence"] == 0 and session.stats()["n_page_free"] == 2
    session.close()


def test_callbacks_that_fail(tiny: pyruntime.Model) -> None:
    session = Session(tiny._weights, max_context=1024, n_page=8, threads=1)
    seq = session.create_sequence()
    with pytest.raises(InvalidArgumentError, match="is empty"):
        session.export_sequence(seq, lambda piece: None)
    session.step([Entry(seq, text(1, 130))])
    pieces: list[bytes] = []
    session.export_sequence(seq, lambda piece: pieces.append(bytes(piece)))
    whole = b"".join(pieces)
    assert len(whole) == 88 + 3 * session.stats()["page_bytes"]

    def full(piece: memoryview) -> None:
        if len(piece) > 88:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        session.export_sequence(seq, full)
    for end in (0, 87, 88, 1000, len(whole) - 1):
        left = whole[:end]

        def read(to: memoryview) -> None:
            nonlocal left
            if len(left) < len(to):
                raise KeyboardInterrupt
            to[:], left = left[: len(to)], left[len(to) :]

        with pytest.raises(KeyboardInterrupt):
            session.import_sequence(read)
        assert session.stats()["n_page_free"] == 5 and session.length(seq) == 130
    with pytest.raises(AbortedError):  # in C's words
        pyruntime._lib.check(pyruntime._lib.lib().prt_sequence_export(session.handle, seq, pyruntime._abi.prt_write_fn(lambda *_: 7), None))
    session.close()


def test_hostile_bytes_do_not_crash() -> None:
    """In a process of its own, so that a crash is a result."""
    fuzz = Path(__file__).parent / "fuzz" / "fuzz_kv.py"
    done = subprocess.run([sys.executable, fuzz, "--seconds", "6"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    assert len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        accepted, refusals = map(int, re.findall(r"(\d+) accepted, +(\d+) refused", line)[0])
        assert accepted > 2 and refusals > 2, line
