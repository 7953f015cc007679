"""KV files: what a model has read of a text, on disk, so that it need not be read again.

In order: the preamble (magic, version, bytes of the header and of the body), a JSON header that names the model, the token ids (int32), and
the body, which the library writes and checks (prt_sequence_export in pyruntime.h). All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ._abi import PAGE_TOKENS
from .batch import pages_for
from .checkpoint import Checkpoint
from .errors import InvalidArgumentError, PyruntimeError, UnsupportedModelError
from .session import Entry, core_config

if TYPE_CHECKING:
    from .engine import Engine

MAGIC = b"PRTKV\r\n\x1a"
VERSION = 1
_PREAMBLE = struct.Struct("<8sIIQ")
_MAX_HEADER = 65536
_MAX_TOKENS = 1 << 24  # the longest context that the library takes


@dataclass(frozen=True, slots=True)
class Origin:
    """Which model a file's rows come from. name: for people.  fingerprint: of its configuration and weights.  dtype: of the rows."""

    name: str
    fingerprint: str
    dtype: str


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of what the forward pass depends on: the configuration, and name, shape, first and last row of every tensor as float32.

    Any training changes all matrices, so two rows of each tell models apart without reading gigabytes; the same weights in another file
    format have the same fingerprint.
    """
    config, plain = core_config(checkpoint.config, "f32"), core_config(checkpoint.config, "f32")
    type(plain).__init__(plain)  # the defaults: a field that a later version adds and a model does not use changes nothing
    digest = hashlib.sha256()
    for name, *_ in config._fields_:
        if name not in ("struct_size", "dtype", "max_position") and (value := getattr(config, name)) != getattr(plain, name):
            digest.update(f"{name}={value!r};".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name}{list(tensor.shape)};".encode())
        for row in {0, tensor.shape[0] - 1} if len(tensor.shape) > 1 else {0}:
            rows = tensor.read(row, row + 1) if len(tensor.shape) > 1 else tensor.read(0, tensor.shape[0])
            digest.update(np.ascontiguousarray(rows, dtype="<f4").tobytes())
    return digest.hexdigest()


def save(engine: Engine, path: Path, ids: Sequence[int], origin: Origin) -> int:
    """Writes the KV of the first tokens of `ids`, and returns how many: all, or all but one. What is not kept is read first.

    The file appears under its name when it is complete. Raises InvalidArgumentError where it cannot be written.
    """
    with engine.borrow(0) as session:
        seq, n = engine.fork_kept(ids)
        try:
            if len(ids) - n > 1:  # a single token would be read as a generated one, and whoever goes on reads that much anyway
                engine.make_room(pages_for(len(ids)) - n // PAGE_TOKENS)
                session.step([Entry(seq, ids[n:])])
                n = len(ids)
            if n == 0:
                raise InvalidArgumentError("there is nothing to save: the text has a single token")
            header = json.dumps({"model": origin.name, "fingerprint": origin.fingerprint, "dtype": origin.dtype, "n_token": n}).encode()
            part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
            try:
                with part.open("xb") as file:
                    file.write(_PREAMBLE.pack(MAGIC, VERSION, len(header), 0) + header + np.asarray(ids[:n], dtype="<i4").tobytes())
                    begin = file.tell()
                    session.export_sequence(seq, file.write)
                    n_byte = file.tell() - begin
                    file.seek(0)
                    file.write(_PREAMBLE.pack(MAGIC, VERSION, len(header), n_byte))
                part.replace(path)
            except OSError as error:
                raise InvalidArgumentError(f"{path}: cannot be written ({error.strerror or error})") from None
            finally:
                part.unlink(missing_ok=True)
        finally:
            session.free_sequence(seq)
    return n


def load(engine: Engine, path: Path, origin: Origin, *, n_vocab: int, max_context: int) -> list[int]:
    """Puts the KV of a file beside what is kept for later prompts, and returns the ids of its tokens.

    Raises InvalidArgumentError, with the path and the reason, for a file of another model, dtype or version, and for one that is not as it
    was written.
    """
    try:
        with path.open("rb") as file:
            ids = _read_head(file, path, origin, n_vocab=n_vocab, max_context=max_context)
            kept = engine.batch.prefixes.max_pages
            if pages_for(len(ids)) > kept:
                raise InvalidArgumentError(
                    f"{path}: has {len(ids)} tokens, the prefix cache of this model keeps {kept * PAGE_TOKENS}: give a larger prefix_cache"
                )

            def read(to: memoryview) -> None:
                if file.readinto(to) != len(to):
                    raise InvalidArgumentError(f"{path}: is damaged: it ends before the last row")

            with engine.borrow(pages_for(len(ids))) as session:
                try:
                    seq = session.import_sequence(read)
                except (InvalidArgumentError, UnsupportedModelError) as error:
                    why = str(error).removeprefix(f"{path}: ").removeprefix("import: ")
                    raise InvalidArgumentError(f"{path}: {why}") from None
                if session.length(seq) != len(ids) or file.read(1):
                    session.free_sequence(seq)
                    raise InvalidArgumentError(f"{path}: is damaged: its rows are not those of its {len(ids)} tokens")
                engine.keep(seq, ids)
    except OSError as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error.strerror or error})") from None
    return ids


def _read_head(file: IO[bytes], path: Path, origin: Origin, *, n_vocab: int, max_context: int) -> list[int]:
    """Checks all that comes before the body, and that the body has its length; returns the ids."""

    def refuse(why: str) -> PyruntimeError:
        return InvalidArgumentError(f"{path}: {why}")

    start = file.read(_PREAMBLE.size)
    if len(start) < _PREAMBLE.size or not start.startswith(MAGIC):
        raise refuse("is not a KV file, as Model.save writes them")
    _, version, n_header, n_body = _PREAMBLE.unpack(start)
    if version != VERSION:
        raise refuse(f"has version {version} of the format, this package reads version {VERSION}")
    if n_header > _MAX_HEADER:
        raise refuse(f"is damaged: it states a header of {n_header} bytes")
    header = _parse(file.read(n_header))
    if header is None:
        raise refuse("is damaged: its header cannot be read")
    n_token = header["n_token"]
    expected, found = _PREAMBLE.size + n_header + 4 * n_token + n_body, os.fstat(file.fileno()).st_size
    if found != expected:
        raise refuse(f"has {found} bytes, {expected} were written: it {'is cut short' if found < expected else 'has grown'}")
    if header["fingerprint"] != origin.fingerprint:
        other = "other weights of the same name" if header["model"] == origin.name else f"another model, {header['model']!r:.80}"
        raise refuse(f"was made with {other}; this is {origin.name}")
    if header["dtype"] != origin.dtype:
        raise refuse(f"was made with dtype {header['dtype']}, this model runs in {origin.dtype}: open it with dtype={header['dtype']!r}")
    if n_token > max_context:
        raise refuse(f"has {n_token} tokens, max_context is {max_context}")
    ids: list[int] = np.frombuffer(file.read(4 * n_token), dtype="<i4").tolist()
    if not all(0 <= token < n_vocab for token in ids):
        raise refuse(f"is damaged: its tokens are not those of a vocabulary of {n_vocab}")
    return ids


def _parse(text: bytes) -> dict[str, Any] | None:
    """The header, if it is one."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"model": str, "fingerprint": str, "dtype": str, "n_token": int}
    if not isinstance(header, dict) or header.keys() != kinds.keys():
        return None
    if not all(type(header[name]) is kind for name, kind in kinds.items()) or header["dtype"] not in ("f32", "f16", "bf16"):
        return None
    return header if 0 < header["n_token"] <= _MAX_TOKENS else None
