"""Shared by the tests of operators: inputs, the plain PyTorch rival, and the rule for numerical error."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.reference.pool_linear_cross_entropy import pooled_dims, positions

TARGETS = ("index", "ignored", "smoothed", "probabilities")
WEIGHTED = ("weighted", "weighted probabilities")  # the same with class weights, one of them zero
ALL = TARGETS + WEIGHTED


def assert_within_error_rule(got: Tensor, same_dtype: Tensor, truth: Tensor, what: str, terms: float = 0.0) -> None:
    """The error against float64 is at most twice that of PyTorch in the same dtype, plus a floor.

    The floor is one rounding of the result, and one float32 (float64) rounding of the largest term that is summed:
    where terms cancel, PyTorch may be exact by luck.
    """
    assert got.shape == truth.shape, f"{what}: {got.shape} instead of {truth.shape}"
    if truth.numel() == 0:
        return
    error = (got.double() - truth).abs().max().item()
    rival = (same_dtype.double() - truth).abs().max().item()
    wide = torch.promote_types(got.dtype, torch.float32)
    floor = torch.finfo(got.dtype).eps * truth.abs().max().item() + torch.finfo(wide).eps * terms
    assert error <= 2 * rival + floor, f"{what}: error {error:.3g}, PyTorch's {rival:.3g}, floor {floor:.3g}"


def make(
    rows: int,
    channels: int,
    spatial: tuple[int, ...],
    classes: int,
    *,
    kind: str = "index",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: bool = True,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor], dict[str, Any]]:
    """Features [N, C, *spatial], weight, bias and target, and the options for them."""
    x = torch.randn(rows, channels, *spatial).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight = (torch.randn(classes, channels) / channels**0.5).to(dtype)
    target = torch.randint(classes, (rows,))
    options: dict[str, Any] = {}
    if kind == "ignored":
        options["ignore_index"] = classes - 1  # a class that exists, so that a guess can equal it
        target[::2] = classes - 1
        target[1:2] = 0  # one row counts, unless it is the only one
    elif kind != "index":
        options["label_smoothing"] = 0.1
    if kind in ("smoothed", "weighted"):
        target[1::3] = -100
    if kind in WEIGHTED:
        options["class_weight"] = (0.25 + torch.rand(classes)).to(dtype)
        if classes > 2:
            options["class_weight"][1] = 0
            target[target == 1] = 2  # or the weights of the rows might sum to nothing
    if kind.endswith("probabilities"):
        # Rows that need not sum to one: F.cross_entropy does not ask for it.
        target = ((0.5 + torch.rand(rows, 1)) * torch.rand(rows, classes).softmax(1)).to(dtype)
    return (x, weight, torch.randn(classes).to(dtype) if bias else None, target), options


def rival(args, *, pool: str = "mean", **options) -> list[Tensor]:
    """What a user writes: mean, F.linear, F.cross_entropy, autograd, all in the dtype of the input.

    Returns loss, correct, and the gradients of x, weight and (if there is one) bias.
    """
    x, weight, bias, target = args
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    x, weight, bias = (*leaves, None)[:3]
    dims = pooled_dims(x, pool)
    features = x[:, 0] if pool == "cls" else x.mean(dims) if dims else x
    logits = F.linear(features, weight, bias)
    each = options.pop("class_weight", None)
    loss = F.cross_entropy(logits, target, None if each is None else each.to(logits.dtype), **options)
    if target.is_floating_point():
        correct = (logits.argmax(1) == target.argmax(1)).sum()
    else:
        correct = ((logits.argmax(1) == target) & (target != options.get("ignore_index", -100))).sum()
    return [loss.detach(), correct, *torch.autograd.grad(loss, leaves)]


def to_double(args):
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in args)


def check(op, args, what: str = "", *, pool: str = "mean", **options) -> None:
    """`op` returns (loss, correct, grad_x, grad_weight, grad_bias) of these arguments within the error rule."""
    got = [t for t in op(*args, pool=pool, **options) if t is not None]
    same, truth = rival(args, pool=pool, **options), rival(to_double(args), pool=pool, **options)
    x, weight, bias, target = to_double(args)
    dims = pooled_dims(x, pool)
    features = x[:, 0] if pool == "cls" else x.mean(dims) if dims else x
    largest = F.linear(features, weight, bias).abs().max().item() if len(x) else 0.0
    if target.is_floating_point():
        share = 1 / max(1, len(x))
    else:
        counts = target != options.get("ignore_index", -100)
        each = options.get("class_weight", weight.new_ones(len(weight))).double()
        share = each.max().item() / max(1e-9, (each[target.where(counts, 0)] * counts).sum().item())
    share /= positions(x, pool)
    # A rounded logit moves its probability by as much.
    sizes = (
        largest,
        0.0,
        weight.abs().max().item() * share * min(1 + largest, 10),
        features.abs().max().item() if len(x) else 0.0,
        1.0,
    )
    names = ("loss", "correct", "grad_x", "grad_weight", "grad_bias")
    for name, size, g, s, t in zip(names, sizes, got, same, truth):
        if name == "correct":
            assert g.dtype == torch.int64 and g.shape == ()
            if args[0].dtype in (torch.float32, torch.float64):  # a rounded logit may change which class is largest
                assert g.item() == t.item(), f"{what}: {g.item()} correct instead of {t.item()}"
        elif t.isnan().any():
            assert torch.equal(g.isnan(), t.isnan()), f"{what} {name}: {g} instead of nan"
        else:
            assert_within_error_rule(g, s, t, f"{what} {name}", size)
    assert got[2].dtype == args[0].dtype and got[3].dtype == args[1].dtype
