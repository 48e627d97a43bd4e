"""fastlocal.engine._native, whether the extension is there or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from fastlocal.engine import _native
from fastlocal.errors import BackendError


@pytest.fixture
def fresh() -> Iterator[None]:
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


def test_available_means_no_reason() -> None:
    assert _native.available() and _native.why_not() == ""


def test_absent_extension_says_how_to_build_it(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlocal._native", None)  # the import system's own way to say "not there"
    assert not _native.available()
    with pytest.raises(
        BackendError, match=r"scheduler needs .* was not built .*FASTLOCAL_BUILD_EXT=1 pip install"
    ) as e:
        _native.pipeline([1.0], [])
    assert isinstance(e.value, RuntimeError)


def test_no_compiler_is_mentioned(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastlocal._native", None)
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler was found" in _native.why_not()


def test_load_errors_are_shown(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _Zabc")

    monkeypatch.setattr(_native.importlib, "import_module", broken)
    assert not _native.available()
    assert "built but does not load: undefined symbol: _Zabc" in _native.why_not()
