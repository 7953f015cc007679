"""The safetensors reader against the `safetensors` package: whatever we accept it accepts, with the same contents."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from pyruntime.errors import ModelFileError, UnsupportedModelError
from pyruntime.safetensors import DTYPE_BITS, FileTensor, read_folder, read_header


def file_bytes(header: dict[str, Any] | str, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode() + b" " * pad
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(tmp_path: Path, raw: bytes, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def test_values_equal_the_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    f32 = rng.standard_normal((5, 7)).astype(np.float32)
    f16 = rng.standard_normal((3, 4)).astype(np.float16)
    raw = save({"a": f32, "b": f16, "i": np.arange(2), "none": np.zeros((0, 3), np.float32)}, {"format": "pt"})
    tensors = read_header(write(tmp_path, raw))
    assert set(tensors) == {"a", "b", "i", "none"}
    np.testing.assert_array_equal(tensors["a"].read(), f32)
    np.testing.assert_array_equal(tensors["a"].read(2, 4), f32[2:4])
    np.testing.assert_array_equal(tensors["b"].read(1, 3), f16[1:3].astype(np.float32))
    assert tensors["none"].read().shape == (0, 3)
    for t in tensors.values():
        assert raw[t.offset : t.offset + t.nbytes] == dict(safetensors.deserialize(raw))[t.name]["data"]
    with pytest.raises(UnsupportedModelError, match=r"tensor 'i' has dtype I64"):
        tensors["i"].read()


def test_bf16_is_the_upper_half_of_f32(tmp_path: Path) -> None:
    f32 = np.array([[1.0, -2.5], [3.0, 0.15625]], np.float32)
    half = (f32.view(np.uint32) >> 16).astype(np.uint16)
    path = write(tmp_path, file_bytes({"a": entry("BF16", [2, 2], 0, 8)}, half.tobytes()))
    np.testing.assert_array_equal(read_header(path)["a"].read(), f32)


A = entry("F32", [2], 0, 8)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "seven bytes": (b"\0" * 7, "has 7 bytes"),
    "header past the end": (struct.pack("<Q", 9) + b"{}", "states a header of 9 bytes, expected at most 2"),
    "header of 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", "18,446,744,073,709,551,615"),
    "no brace": (file_bytes(' {"a":1}'), "starts with"),
    "not JSON": (file_bytes("{nope}"), "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 5) + b'{"\xff":', "not UTF-8"),
    "no header": (struct.pack("<Q", 0), "starts with"),
    "duplicate tensor": (file_bytes('{"a":1,"a":1}'), "'a' occurs twice"),
    "duplicate inner key": (
        file_bytes('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "'dtype' occurs twice",
    ),
    "depth bomb": (file_bytes('{"a":' + "[" * 200_000), "nested too deeply"),
    "NaN": (file_bytes('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"\0" * 8), "the number NaN"),
    "1e999": (file_bytes('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', b"\0" * 8), "too large"),
    "metadata number": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__"),
    "entry number": (file_bytes({"a": 3}), "expected dtype, shape and data_offsets"),
    "entry extra": (file_bytes({"a": {**A, "x": 1}}, b"\0" * 8), "expected dtype, shape"),
    "unknown dtype": (file_bytes({"a": {**A, "dtype": "F33"}}, b"\0" * 8), "dtype is 'F33'"),
    "dtype list": (file_bytes({"a": {**A, "dtype": ["F32"]}}, b"\0" * 8), "dtype is"),
    "negative shape": (file_bytes({"a": {**A, "shape": [-2]}}, b"\0" * 8), "the shape is"),
    "bool shape": (file_bytes({"a": {**A, "shape": [2, True]}}, b"\0" * 8), "the shape is"),
    "float shape": (file_bytes({"a": {**A, "shape": [2.0]}}, b"\0" * 8), "the shape is"),
    "overflowing shape": (file_bytes({"a": {**A, "shape": [2**62, 2**62, 2**62]}}, b"\0" * 8), "needs"),
    "wrapping shape": (file_bytes({"a": {**A, "shape": [2**33 + 1, 2**31]}}, b"\0" * 8), "needs"),
    "offsets backwards": (file_bytes({"a": {**A, "data_offsets": [8, 0]}}, b"\0" * 8), "data_offsets is"),
    "offsets three": (file_bytes({"a": {**A, "data_offsets": [0, 8, 8]}}, b"\0" * 8), "data_offsets is"),
    "byte length": (file_bytes({"a": entry("F32", [3], 0, 8)}, b"\0" * 8), "hold 8 bytes, but F32 of shape"),
    "hole at 0": (file_bytes({"a": entry("F32", [2], 4, 12)}, b"\0" * 12), "leaves a hole"),
    "hole": (file_bytes({"a": A, "b": entry("F32", [1], 12, 16)}, b"\0" * 16), "leaves a hole"),
    "overlap": (file_bytes({"a": A, "b": entry("F32", [2], 4, 12)}, b"\0" * 12), "overlaps"),
    "same bytes": (file_bytes({"a": A, "b": A}, b"\0" * 8), "overlaps"),
    "trailing byte": (file_bytes({"a": A}, b"\0" * 9), "the file has"),
    "truncated": (file_bytes({"a": A}, b"\0" * 7), "the file has"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_path_and_the_reason(name: str, tmp_path: Path) -> None:
    raw, message = BAD[name]
    path = write(tmp_path, raw)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


def oracle(raw: bytes) -> dict[str, Any] | None:
    try:
        return dict(safetensors.deserialize(raw))
    except safetensors.SafetensorError:
        return None


def test_every_file_that_we_accept_is_accepted_by_the_package(tmp_path: Path) -> None:
    rng = random.Random(1)
    accepted = 0
    for _ in range(1500):
        tensors: dict[str, Any] = {}
        at = 0
        for i in range(rng.randrange(4)):
            dtype = rng.choice(["F32", "F16", "BF16", "U8", "F64", "BOOL"])
            shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
            n = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
            at += rng.choice([0, 0, 0, 0, 0, 0, 1, -1]) if i else 0
            tensors[f"t{i}"] = entry(dtype, shape, at, at + n + rng.choice([0] * 12 + [1]))
            at += n
        names = list(tensors)
        rng.shuffle(names)
        raw = file_bytes({n: tensors[n] for n in names}, bytes(max(at + rng.choice([0] * 8 + [1, -1]), 0)), rng.randrange(9))
        theirs = oracle(raw)
        try:
            ours: dict[str, FileTensor] | None = read_header(write(tmp_path, raw))
        except ModelFileError:
            ours = None
        assert (ours is None) == (theirs is None), raw[:400]
        if ours is not None and theirs is not None:
            accepted += 1
            got = {n: (t.dtype, list(t.shape), raw[t.offset : t.offset + t.nbytes]) for n, t in ours.items()}
            assert got == {n: (t["dtype"], list(t["shape"]), bytes(t["data"])) for n, t in theirs.items()}
    assert 300 < accepted < 1400


def test_a_pipe_is_refused_and_not_read(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_header(tmp_path / "model.safetensors")


def test_a_file_that_shrinks_after_the_check_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, file_bytes({"a": A}, b"\0" * 8))
    tensor = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFileError, match="ends 3 bytes before"):
        tensor.read()


def sharded(folder: Path, weight_map: Any = None) -> None:
    write(folder, file_bytes({"a": A}, b"\0" * 8), "model-00001-of-00002.safetensors")
    write(folder, file_bytes({"b": A}, b"\0" * 8), "model-00002-of-00002.safetensors")
    if weight_map is None:
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 16}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_joined(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert {n: t.path.name for n, t in read_folder(tmp_path).items()} == {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"
    }  # fmt: skip


def test_the_symlinks_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs)
    for i, path in enumerate(sorted(blobs.iterdir())):
        (snapshot / path.name).symlink_to(f"../../blobs/{path.rename(blobs / f'hash{i}').name}")
    assert set(read_folder(snapshot)) == {"a", "b"}


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", ".hidden.safetensors",
     "a\\b.safetensors", "a\0.safetensors", "x.safetensors\n", "\ud800.safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_only_plain_shard_names_are_opened(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tmp_path, file_bytes({"a": A}, b"\0" * 8), "x.safetensors")
    sharded(folder, {"a": shard})
    with pytest.raises(ModelFileError, match="expected the plain name"):
        read_folder(folder)


def test_what_an_index_says_must_be_true(tmp_path: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    sharded(tmp_path, {"a": one, "b": one})
    with pytest.raises(ModelFileError, match=r"tensor 'b' is said to be in model-00001.*no shard has it"):
        read_folder(tmp_path)
    sharded(tmp_path, {"a": one, "b": two, "c": two})
    with pytest.raises(ModelFileError, match=r"tensor 'c' is said to be in model-00002.*no shard has it"):
        read_folder(tmp_path)
    sharded(tmp_path, {"a": two, "b": one})
    with pytest.raises(ModelFileError, match=r"tensor 'a' is said to be in .*00002.*but it is in .*00001"):
        read_folder(tmp_path)
    sharded(tmp_path)
    write(tmp_path, file_bytes({"a": A}, b"\0" * 8), two)
    with pytest.raises(ModelFileError, match="tensor 'a' is in two shards"):
        read_folder(tmp_path)
    (tmp_path / two).unlink()
    with pytest.raises(ModelFileError, match=r"shard model-00002-of-00002\.safetensors is missing"):
        read_folder(tmp_path)
    for value in ({}, [], None, "x"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": value}))
        with pytest.raises(ModelFileError, match="'weight_map' is"):
            read_folder(tmp_path)
