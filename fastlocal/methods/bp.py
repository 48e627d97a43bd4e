"""Back-propagation: the whole net is one block, trained by the task loss alone. The baseline of every comparison."""

from __future__ import annotations

from typing import ClassVar

from fastlocal.methods.base import Method, register


@register
class BP(Method):
    """One block, no heads, no boundary. Whatever number of blocks is asked for, one is cut."""

    name: ClassVar[str] = "bp"
    summary: ClassVar[str] = "end-to-end back-propagation, one block"
    paper: ClassVar[str] = (
        "Rumelhart, Hinton, Williams: Learning representations by back-propagating errors, Nature 1986"
    )
    repository: ClassVar[str] = ""
    isolated = False

    def prepare(self, blocks: int, units: int) -> int:
        return 1
