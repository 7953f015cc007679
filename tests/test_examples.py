"""The example programs: built as a user would, against what the package installs (header, library, CMake and pkg-config files), and run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny_model

import pyruntime

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PACKAGE = Path(pyruntime.get_library()).parent
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
LANGUAGES = {"embed.c": ("cc", "-std=c99"), "embed.cpp": ("c++", "-std=c++17")}


def run(*command: str | Path, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=300, check=False, env=os.environ | env)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def tokens_of(output: str) -> list[int]:
    [line] = re.findall(r"^tokens: (.*)$", output, re.MULTILINE)
    return [int(token) for token in line.split()]


def cmake_build(package: Path, folder: Path) -> Path:
    """The example folder built against the package that `package`/cmake describes."""
    flags = [f"-DCMAKE_{language}_FLAGS={' '.join(STRICT)}" for language in ("C", "CXX")]
    run(tool("cmake"), "-S", EXAMPLES, "-B", folder, f"-Dpyruntime_DIR={package / 'cmake'}", "-DCMAKE_BUILD_TYPE=Release", *flags)
    run(tool("cmake"), "--build", folder)
    return folder


@pytest.fixture(scope="module")
def embed_cffi() -> list[int]:
    """The tokens of embed_cffi.py, which needs no compiler. The other examples make the same model and must write the same ones."""
    pytest.importorskip("cffi")
    output = run(sys.executable, EXAMPLES / "embed_cffi.py").stdout
    check_output(output)
    return tokens_of(output)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cmake_build(PACKAGE, tmp_path_factory.mktemp("examples"))


def check_output(output: str) -> None:
    """What embed.c and embed_cffi.py print."""
    assert "both forks agree: yes" in output
    assert re.search(r"a deliberate error: PRT_INVALID_ARGUMENT: batch: token 1000000 .* vocabulary of 300", output)
    assert "pages: 3 of 8 in use, 1 copied on write" in output
    tokens = tokens_of(output)
    assert len(tokens) == 24
    assert len(set(tokens)) > 3, "a model that repeats one token would hide mistakes"


# ---------------------------------------------------------------- what is installed


def test_names_of_the_package() -> None:
    include, cmake, pkgconfig = pyruntime.get_include(), pyruntime.get_cmake_dir(), pyruntime.get_pkgconfig_dir()
    assert (Path(include) / "pyruntime.h").read_bytes() == (ROOT / "core" / "pyruntime.h").read_bytes()
    assert [Path(folder).parent for folder in (include, cmake, pkgconfig)] == [PACKAGE] * 3
    assert {"pyruntimeConfig.cmake", "pyruntimeConfigVersion.cmake", "pyruntimeTargets.cmake"} <= {p.name for p in Path(cmake).iterdir()}
    assert [p.name for p in Path(pkgconfig).iterdir()] == ["pyruntime.pc"]


def test_an_incomplete_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / Path(pyruntime.get_library()).name).touch()
    monkeypatch.setattr(pyruntime, "__path__", [str(tmp_path)])
    assert pyruntime.get_library().startswith(str(tmp_path))
    with pytest.raises(pyruntime.InternalError, match=r"pyruntime\.h is not in .*include"):
        pyruntime.get_include()


def test_nothing_installed_names_the_machine_it_was_built_on() -> None:
    for file in [*(PACKAGE / "cmake").iterdir(), *(PACKAGE / "pkgconfig").iterdir()]:
        absolute = re.findall(r'(?<=["= ])/[\w.-]+/[\w./-]+', file.read_text())
        assert not [path for path in absolute if Path(path).exists()], file


# ---------------------------------------------------------------- C and C++


@pytest.mark.parametrize("program", ["embed_c", "embed_cpp"])
def test_cmake(built: Path, embed_cffi: list[int], program: str) -> None:
    output = run(built / program).stdout
    assert tokens_of(output) == embed_cffi
    if program == "embed_c":
        check_output(output)


def test_cmake_with_a_package_that_was_moved(tmp_path: Path, embed_cffi: list[int]) -> None:
    """And renamed: no path in it may be absolute, or know what the folder is called."""
    moved = tmp_path / "a folder" / "vendored"
    for name in ("cmake", "include"):
        shutil.copytree(PACKAGE / name, moved / name)
    shutil.copy(pyruntime.get_library(), moved)
    folder = cmake_build(moved, tmp_path / "build")
    assert tokens_of(run(folder / "embed_cpp").stdout) == embed_cffi
    shutil.rmtree(moved)
    done = subprocess.run([folder / "embed_cpp"], capture_output=True, text=True, check=False)
    assert "libpyruntime" in done.stderr, "it ran with another library than the moved one"


@pytest.mark.parametrize(("wanted", "found"), [("", True), ("0.1", True), ("0.0.9", False), ("0.2", False), ("1", False)])
def test_cmake_version(tmp_path: Path, wanted: str, found: bool) -> None:
    """Before 1.0 every minor version is its own; see docs/abi.md."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(version LANGUAGES NONE)\n"
        f"find_package(pyruntime {wanted})\nmessage(STATUS found=${{pyruntime_FOUND}})\n"
    )
    output = run(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build", f"-Dpyruntime_DIR={pyruntime.get_cmake_dir()}").stdout
    assert f"found={int(found)}" in output


@pytest.mark.parametrize("source", LANGUAGES)
def test_pkg_config(tmp_path: Path, embed_cffi: list[int], source: str) -> None:
    def pkg_config(*arguments: str) -> list[str]:
        return shlex.split(run(tool("pkg-config"), *arguments, "pyruntime", PKG_CONFIG_PATH=pyruntime.get_pkgconfig_dir()).stdout)

    name, standard = LANGUAGES[source]
    assert pkg_config("--modversion") == [pyruntime.__version__]
    [libdir] = pkg_config("--variable=libdir")
    # A system library needs no rpath, so pkg-config does not give one; the package's folder is not where the loader looks.
    link = [*pkg_config("--libs"), f"-Wl,-rpath,{libdir}"]
    run(tool(name), standard, *STRICT, *pkg_config("--cflags"), EXAMPLES / source, "-o", tmp_path / "embed", *link)
    assert tokens_of(run(tmp_path / "embed").stdout) == embed_cffi


def test_add_subdirectory(tmp_path: Path) -> None:
    """The target has the same name. Configured only: building is what the package itself was made by."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.26)\nproject(outer LANGUAGES C CXX)\n"
        f'set(PYRUNTIME_CUDA OFF)\nadd_subdirectory("{ROOT}" pyruntime)\n'
        f'add_executable(embed "{EXAMPLES / "embed.c"}")\ntarget_link_libraries(embed PRIVATE pyruntime::pyruntime)\n'
    )
    version = tuple(map(int, re.findall(r"\d+", run(tool("cmake"), "--version").stdout)[:2]))
    if version < (3, 26):
        pytest.skip("the sources need CMake 3.26")
    run(tool("cmake"), "-S", tmp_path, "-B", tmp_path / "build")


# ---------------------------------------------------------------- embed.cpp with a model from files


def test_embed_cpp_with_raw_tensors(built: Path, tmp_path: Path) -> None:
    """Any model of the package, written as raw tensors, continues in C++ as it does in Python."""
    folder, raw, prompt = write_tiny_model(tmp_path / "model"), tmp_path / "raw", [5, 17, 3, 60, 41]
    run(sys.executable, EXAMPLES / "raw_tensors.py", folder, raw)
    with pyruntime.Model(folder, threads=1) as model:
        wanted = model.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).token_ids
    ids = list(map(str, prompt))
    assert tokens_of(run(built / "embed_cpp", raw, "12", *ids).stdout) == list(wanted)

    assert "PRT_INVALID_ARGUMENT: batch: token 1000000" in run(built / "embed_cpp", raw, "12", "1000000", code=1).stderr
    (raw / "norm.weight.bin").unlink()
    assert re.search(r"PRT_IO_ERROR: .*norm\.weight\.bin", run(built / "embed_cpp", raw, "12", *ids, code=1).stderr)
    (raw / "config.bin").write_bytes(b"\x08\0\0\0")
    assert "is not a prt_model_config" in run(built / "embed_cpp", raw, "12", *ids, code=1).stderr
    assert "usage" in run(built / "embed_cpp", raw, code=2).stderr
