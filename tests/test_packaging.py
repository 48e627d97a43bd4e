"""What is installed, in each of the three ways to have it: a wheel, an editable install, the root of the repository."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("fastlocal", "triton_kernels", "bench", "csrc")
MAPPED = {"triton_kernels": "fastlocal/triton_kernels", "bench": "fastlocal/bench"}

# An editable install in the environment that runs the tests would answer first.
FORGET = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""
# Prints where the packages come from. fastlocal.triton_kernels is looked up and not run: it may import triton.
WHERE = """
import importlib.util, fastlocal, fastlocal.bench
kernels = importlib.util.find_spec("fastlocal.triton_kernels")
print(fastlocal.__file__, fastlocal.bench.__file__, kernels.origin, sep="\\n")
"""


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("FASTLOCAL_BUILD_EXT", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the repository."""
    tree = tmp_path_factory.mktemp("tree")
    junk = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in FILES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=junk)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out), ".")
    run = python(*command, cwd=tree, FASTLOCAL_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_every_module_at_its_mapped_name(tree: Path, wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fastlocal"}
    expected = set()
    for folder in ("fastlocal", "triton_kernels", "bench"):
        for path in (tree / folder).rglob("*"):
            if path.suffix in (".py", ".pyi", ".json", ".jsonl") or path.name == "py.typed":
                expected.add(str(Path(MAPPED.get(folder, folder)) / path.relative_to(tree / folder)))
    assert {"fastlocal/bench/__init__.py", "fastlocal/triton_kernels/__init__.py", "fastlocal/py.typed"} <= expected
    assert "fastlocal/_native.pyi" in expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_metadata(wheel: Path) -> None:
    from fastlocal import __version__

    assert wheel.name == f"fastlocal-{__version__}-py3-none-any.whl"  # pure Python: the extension was declined
    archive, info = zipfile.ZipFile(wheel), f"fastlocal-{__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    for line in ("Requires-Python: >=3.11", "License-Expression: Apache-2.0", "Requires-Dist: torch>=2.6"):
        assert f"\n{line}\n" in metadata
    assert "fastlocal = fastlocal.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()


def test_imports_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{WHERE}"
    run = python("-I", "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert all(Path(line).is_relative_to(tmp_path / "site" / "fastlocal") for line in run.stdout.split())


def test_imports_from_an_editable_install(tree: Path, tmp_path: Path) -> None:
    code = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    run = python("-c", code, str(tmp_path), cwd=tree, FASTLOCAL_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    site = str(tmp_path / "site")  # first in the path, because the finder's module has the same name in both installs
    code = f"{FORGET}import site; sys.path.insert(0, {site!r}); site.addsitedir({site!r})\n{WHERE}"
    run = python("-I", "-c", code, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    expected = [tree / name / "__init__.py" for name in ("fastlocal", "bench", "triton_kernels")]
    assert [Path(line).resolve() for line in run.stdout.split()] == [path.resolve() for path in expected]


def test_imports_from_the_root_of_the_repository(tree: Path) -> None:
    run = python("-c", FORGET + WHERE, cwd=tree)
    assert run.returncode == 0, run.stderr
    expected = [tree / name / "__init__.py" for name in ("fastlocal", "bench", "triton_kernels")]
    assert [Path(line).resolve() for line in run.stdout.split()] == [path.resolve() for path in expected]


def test_setup_is_short_and_imports_no_torch(tree: Path) -> None:
    source = (ROOT / "setup.py").read_text()
    assert len(source.splitlines()) < 100
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert "setuptools" in imported and not imported & {"torch", "fastlocal", "numpy"}
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
    run = python("-c", code, cwd=tree, FASTLOCAL_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == re.search(r'"(.+)"', (ROOT / "fastlocal/_version.py").read_text()).group(1)


@pytest.mark.parametrize(
    ("environment", "succeeds", "message"),
    [
        ({"FASTLOCAL_BUILD_EXT": "auto", "PATH": "", "CXX": ""}, True, "left out: no C++ compiler was found"),
        ({"FASTLOCAL_BUILD_EXT": "1", "PATH": "", "CXX": ""}, False, "FASTLOCAL_BUILD_EXT=1, but no C++ compiler"),
        ({"FASTLOCAL_BUILD_EXT": "auto", "CC": "false", "CXX": "false"}, True, "did not compile (see above)"),
        ({"FASTLOCAL_BUILD_EXT": "1", "CC": "false", "CXX": "false"}, False, "false"),
        ({"FASTLOCAL_BUILD_EXT": "yes"}, False, "FASTLOCAL_BUILD_EXT='yes' is not one of 0, 1, auto"),
    ],
)
def test_build_switch(tree: Path, tmp_path: Path, environment: dict, succeeds: bool, message: str) -> None:
    command = ("setup.py", "build", "--build-base", str(tmp_path))
    run = python(*command, cwd=tree, **environment)
    assert (run.returncode == 0) is succeeds, run.stderr
    assert message in run.stderr
    assert not [*tmp_path.rglob("_native*.so"), *(tree / "fastlocal").glob("_native*.so")]
    assert bool(list(tmp_path.rglob("fastlocal/_version.py"))) or not succeeds  # pure Python, complete


def test_import_needs_no_optional_package_and_starts_no_cuda() -> None:
    code = """
import sys
optional = ("triton", "torchvision", "lightning", "transformers", "accelerate", "matplotlib", "sklearn", "tqdm")
import torch
before = set(sys.modules)  # torch takes tqdm if it is there
import fastlocal
assert not set(optional) & (set(sys.modules) - before), set(optional) & (set(sys.modules) - before)
for name in optional:
    sys.modules[name] = None  # importing it fails from here on
for name in fastlocal.__all__:
    getattr(fastlocal, name)
assert not torch.cuda.is_initialized()
"""
    run = python("-c", code, cwd=ROOT)
    assert run.returncode == 0, run.stderr
