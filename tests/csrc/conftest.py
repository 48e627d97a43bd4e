from __future__ import annotations

import os
import shutil

import pytest

from fastlocal.engine import _native


@pytest.fixture(scope="session", autouse=True)
def extension() -> None:
    """Skips where the extension cannot be built or was declined; where it should be there, its absence is a failure."""
    if _native.available():
        return
    if os.environ.get("FASTLOCAL_BUILD_EXT") == "0":
        pytest.skip("FASTLOCAL_BUILD_EXT=0: the native extension was declined")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip(_native.why_not())
    pytest.fail(_native.why_not())
