"""Shared by the tests of heads that end in a cross-entropy: targets of every kind, and the rule over all results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import assert_within_error_rule


def make_target(
    rows: int, classes: int, kind: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Any]]:
    """A target of one of `tests.ops.cases.TARGETS`, and the options that go with it."""
    target = torch.randint(classes, (rows,))
    options: dict[str, Any] = {}
    if kind == "ignored":
        options["ignore_index"] = classes - 1  # a class that exists, so that a guess can equal it
        target[::2] = classes - 1
        target[1:2] = 0  # one row counts, unless it is the only one
    elif kind in ("smoothed", "probabilities"):
        options["label_smoothing"] = 0.1
    if kind == "smoothed":
        target[1::3] = -100
    if kind == "probabilities":
        # Rows that need not sum to one: F.cross_entropy does not ask for it.
        target = ((0.5 + torch.rand(rows, 1)) * torch.rand(rows, classes).softmax(1)).to(dtype)
    return target, options


def correct_rows(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    if target.is_floating_point():
        return (logits.argmax(1) == target.argmax(1)).sum()
    return ((logits.argmax(1) == target) & (target != ignore_index)).sum()


def loss_of(logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100) -> Tensor:
    if target.is_floating_point():
        return F.cross_entropy(logits, target.to(logits.dtype), label_smoothing=label_smoothing)
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing, ignore_index=ignore_index)


def share(target: Tensor, ignore_index: int = -100) -> float:
    """Of a row in the mean."""
    counted = len(target) if target.is_floating_point() else int((target != ignore_index).sum())
    return 1 / max(1, counted)


def compare(got: Any, same: Any, truth: Any, terms: Any, what: str, exact: bool) -> None:
    """(loss, correct, gradients ...) within the error rule; nan where it should be; correct equal where `exact`."""
    assert len(got) == len(same) == len(truth) == len(terms)
    assert got[1].dtype == torch.int64 and got[1].shape == ()
    if exact:
        assert got[1].item() == truth[1].item(), f"{what}: {got[1].item()} correct instead of {truth[1].item()}"
    for i, (g, s, t, size) in enumerate(zip(got, same, truth, terms)):
        if i == 1:
            continue
        if t.isnan().any():
            assert torch.equal(g.isnan(), t.isnan()), f"{what} {i}: {g} instead of nan"
        else:
            assert_within_error_rule(g, s, t, f"{what} {('loss', '', 'grad_x', 'grad_weight', 'grad_bias')[i]}", size)
