"""`fastlocal.explain`: which backend or schedule serves something, and why the others do not."""

from __future__ import annotations

from typing import Any

from fastlocal import ops


def explain(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Of an `Engine` or `LocalModel`: its schedule, graph mode and cuts, as text. Of an operator: the `fastlocal.ops.Choice` for
    these arguments, with the backends that were rejected and the reasons.

    Args:
        x: an object with ``explain()``, an operator of `fastlocal.ops`, or its name.
    """
    own = getattr(x, "explain", None)
    if callable(own):
        return own()
    return ops.explain(x if isinstance(x, str) else x.__name__, *args, **kwargs)
