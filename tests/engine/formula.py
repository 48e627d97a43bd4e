"""What a step should hold, as a formula over the measured cost of its blocks: independent of `fastlocal.plan`."""

import math

from fastlocal.engine.model import LocalModel
from fastlocal.engine.output import KEEP_SCORES


def predicted_peak(model: LocalModel, rows: int) -> int:
    """Bytes of a step: parameters, one optimizer moment, the largest block's gradients, saved tensors and workspace.

    Workspace is the block's input and output, once more the larger of the two for the gradients on their way back, and the
    class scores, which a loss holds besides what autograd saved.
    """
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    size = next(model.parameters()).element_size()
    scores = size * math.prod(model.blocks[-1].cost.boundary)
    kept = rows * scores * len(model.blocks) if rows * scores <= size * KEEP_SCORES else 0  # for counting hits
    worst = before = 0
    for block in model.blocks:
        grads = sum(p.numel() * p.element_size() for p in block.parameters())
        after = size * math.prod(block.cost.boundary)
        workspace = before + after + max(before, after, scores) + scores
        worst = max(worst, grads + rows * (block.cost.saved_bytes + workspace))
        before = after
    return 2 * params + worst + kept
