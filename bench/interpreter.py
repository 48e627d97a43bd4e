"""Triton's interpreter, made to work with the NumPy at hand."""

from __future__ import annotations

import numpy as np


def mend() -> None:
    """From NumPy 2.4 on an array of one element is no int, which older interpreters need for a loop bound."""
    try:
        int(np.ones(1, dtype=np.int32))
        return
    except TypeError:
        pass
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
