"""Where the package keeps what a C or C++ program is built with: header, library, CMake and pkg-config files."""

from __future__ import annotations

from pathlib import Path

from .errors import InternalError


def get_include() -> str:
    """The folder with pyruntime.h, for the compiler's -I."""
    return _folder("include", "pyruntime.h")


def get_library() -> str:
    """The full path of the shared library that this package itself uses, to link against or to open at run time."""
    from ._lib import library_path

    return str(library_path())


def get_cmake_dir() -> str:
    """The folder with pyruntimeConfig.cmake: `cmake -Dpyruntime_DIR=...` makes find_package(pyruntime) find this package."""
    return _folder("cmake", "pyruntimeConfig.cmake")


def get_pkgconfig_dir() -> str:
    """The folder with pyruntime.pc, for PKG_CONFIG_PATH."""
    return _folder("pkgconfig", "pyruntime.pc")


def _folder(name: str, file: str) -> str:
    """They are installed beside the library, which in an editable install is not where this file is."""
    folder = Path(get_library()).parent / name
    if not (folder / file).is_file():
        raise InternalError(f"{file} is not in {folder}: the package is not complete; run `pip install .` in the source folder")
    return str(folder)
