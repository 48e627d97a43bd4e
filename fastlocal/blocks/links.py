"""Links: rules by which one module's weights feed another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastlocal.blocks.block import Slot


@dataclass
class CopyLink:
    """A read-only copy of another block's weight, refreshed before it is read (``tied="link"``).

    The owner trains the weight; the copy takes no gradient. Refreshing at the start of the next forward is the same as
    refreshing after the update, because weights are read in forward only, and it needs no word from the optimizer.
    """

    owner: Slot
    copy: Slot

    @torch.no_grad()
    def refresh(self) -> None:
        self.copy.value.copy_(self.owner.value)
