"""Packages and the optional native extension; everything else is in pyproject.toml. Imports no torch.

FASTLOCAL_BUILD_EXT=0     never build the extension
FASTLOCAL_BUILD_EXT=1     build it, and fail if that is not possible
FASTLOCAL_BUILD_EXT=auto  build it where there is a compiler, else install pure Python (the default)
"""

import os
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("0", "1", "auto")


def say(message: str) -> None:
    print(f"fastlocal: {message}", file=sys.stderr, flush=True)


def packages() -> list[str]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        roots = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    return [p for name, path in roots.items() for p in (name, *(f"{name}.{sub}" for sub in find_packages(ROOT / path)))]


def compiler() -> str | None:
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, named[:1] or ("c++", "g++", "clang++", "cl"))), None)


def extensions(mode: str) -> list:
    if mode == "0":
        say("FASTLOCAL_BUILD_EXT=0, so the native extension is left out")
        return []
    try:
        if compiler() is None:
            raise RuntimeError("no C++ compiler was found (install g++ or clang++, or name one in CXX)")
        try:
            from pybind11.setup_helpers import Pybind11Extension
        except ImportError as error:
            raise RuntimeError("pybind11 is not installed (pip install pybind11)") from error
    except RuntimeError as error:
        if mode == "1":
            raise SystemExit(f"fastlocal: FASTLOCAL_BUILD_EXT=1, but {error}") from error
        say(f"the native extension is left out: {error}; fastlocal works without it")
        return []
    return [
        Pybind11Extension(
            "fastlocal._native",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h")),
            cxx_std=17,
            extra_compile_args=["/O2"] if sys.platform == "win32" else ["-O3", "-Wall", "-Wextra"],
            libraries=["dl"] if sys.platform == "linux" else [],
            optional=mode == "auto",
        )
    ]


class BuildExt(build_ext):
    """Says plainly what a failed compilation means; `optional` decides whether it is fatal."""

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception:
            if ext.optional:
                say("the native extension did not compile (see above) and is left out; fastlocal works without it")
            raise


mode = os.environ.get("FASTLOCAL_BUILD_EXT", "auto").strip().lower() or "auto"
if mode not in MODES:
    raise SystemExit(f"fastlocal: FASTLOCAL_BUILD_EXT={mode!r} is not one of {', '.join(MODES)}")
setup(packages=packages(), ext_modules=extensions(mode), cmdclass={"build_ext": BuildExt})
