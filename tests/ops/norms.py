"""Shared by the tests of bn_act and bn_act_conv: inputs, the modules' own results, and the error rule for every result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal import reference
from tests.ops.cases import assert_within_error_rule

KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
LAST = {2: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def dims(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def norm_for(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = KINDS[len(shape)](shape[1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.to(dtype)


def spread(x: Tensor, norm: nn.Module) -> Tensor:
    """The largest factor from a rounding of x to the normalised value."""
    deviation = x.double().std(dims(x), correction=0).clamp_min(1e-30)
    return (x.double().abs().amax() / deviation * norm.weight.double()).amax()


@dataclass
class Case:
    """Arguments of bn_act and the gradient that comes in."""

    x: Tensor
    norm: nn.Module
    residual: Tensor | None
    second: nn.Module | None
    dy: Tensor
    act: str
    slope: float

    def to(self, *args: Any) -> Case:
        def moved(t: Any) -> Any:
            return t if t is None else copy.deepcopy(t).to(*args) if isinstance(t, nn.Module) else t.to(*args)

        parts = {name: moved(getattr(self, name)) for name in ("x", "norm", "residual", "second", "dy")}
        return replace(self, **parts)

    def call(self, op: Callable[..., Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
        return op(x, self.norm, residual, act=self.act, slope=self.slope, residual_norm=self.second)

    def run(self, op: Callable[..., Tensor], needs: tuple[bool, ...] = (True,) * 6) -> dict[str, Tensor]:
        """Results by name, from copies of the norms; gradients only of what `needs` says."""
        own = replace(self, norm=copy.deepcopy(self.norm), second=copy.deepcopy(self.second))
        x = self.x.detach().clone()
        residual = None if self.residual is None else self.residual.detach().clone()
        leaves: dict[str, Any] = dict(x=x, residual=residual, weight=own.norm.weight, bias=own.norm.bias)
        leaves |= dict(weight2=getattr(own.second, "weight", None), bias2=getattr(own.second, "bias", None))
        for leaf, need in zip(leaves.values(), needs):
            if leaf is not None:
                leaf.requires_grad_(need)
        y = own.call(op, x, residual)
        if y.requires_grad:
            y.backward(self.dy)
        found = {f"d{name}": t.grad for name, t in leaves.items() if t is not None and t.grad is not None}
        found["y"] = y.detach()
        for mark, norm in (("", own.norm), ("2", own.second)):
            if norm is not None:
                found |= {f"{name}{mark}": getattr(norm, name) for name in ("running_mean", "running_var")}
                assert norm.num_batches_tracked.item() == 1
        return found

    def check(self, op: Callable[..., Tensor], what: str = "") -> dict[str, Tensor]:
        """`op` gives what the modules give, within the error rule; its results."""
        what = f"{what} {tuple(self.x.shape)} {self.x.dtype} {self.act} {self.residual is not None} {self.second}"
        case = self.steep_apart()
        truth, same, got = case.to(torch.float64).run(reference.bn_act), case.run(reference.bn_act), case.run(op)
        assert got["y"].dtype == got["dx"].dtype == self.x.dtype
        assert got.keys() == truth.keys()
        terms = case.terms()
        for name, value in got.items():
            assert value.shape == truth[name].shape
            assert value.dtype == same[name].dtype, name
            assert_within_error_rule(value, same[name], truth[name], f"{what}: {name}", terms.get(name, 0.0))
        return got

    def steep_apart(self) -> Case:
        """No gradient comes in where the sign of what is activated is a matter of rounding."""
        if self.act == "none":
            return self
        with torch.no_grad():
            wide = self.to(torch.float64)
            z = replace(wide, act="none").call(reference.bn_act, wide.x, wide.residual)
            steep = spread(self.x, self.norm)
            if self.second is not None and self.residual is not None:
                steep = steep + spread(self.residual, self.second)
            near = 2 * torch.finfo(torch.float32).eps * steep + 4 * torch.finfo(self.x.dtype).eps * z.abs().amax()
            dy = torch.where(z.abs() < near, torch.zeros_like(self.dy), self.dy)
        return replace(self, dy=torch.empty_like(self.x).copy_(dy))

    def terms(self) -> dict[str, float]:
        """The largest terms of the sums."""
        rows, size = self.x.numel() // self.x.shape[1], self.dy.abs().max().item()
        largest = rows**0.5 * size
        found = {"dbias": largest, "dbias2": largest}
        for mark, to, x, norm in (("", "dx", self.x, self.norm), ("2", "dresidual", self.residual, self.second)):
            if norm is None or x is None:
                continue
            rstd = (x.double().var(dims(x), correction=0) + norm.eps).rsqrt()
            scale = (rstd * norm.weight.double()).amax().item()
            found["y"] = found.get("y", 0.0) + scale * x.abs().max().item()
            found[to] = scale * size * rows**0.5
            found[f"dweight{mark}"] = largest * (rstd * x.double().abs().amax(dims(x))).amax().item()
            found[f"running_mean{mark}"] = norm.momentum * x.abs().max().item()
            found[f"running_var{mark}"] = norm.momentum * (x.double() - x.double().mean()).square().max().item()
        return found


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    last: bool = False,
    residual: str | None = None,
    act: str = "relu",
    slope: float = 0.2,
    mean: float = 0.0,
    std: float = 1.0,
    norm_dtype: torch.dtype = torch.float32,
) -> Case:
    """residual: None, "plain" or "norm"."""

    def map_of(mean: float = 0.0, std: float = 1.0) -> Tensor:
        made = (torch.randn(shape) * std + mean).to(dtype)
        return made.contiguous(memory_format=LAST[len(shape)]) if last else made

    added = None if residual is None else map_of()
    second = norm_for(shape, norm_dtype) if residual == "norm" else None
    return Case(map_of(mean, std), norm_for(shape, norm_dtype), added, second, map_of(), act, slope)


# --- with a convolution -----------------------------------------------------------------------------------------------


def run_conv(
    op: Callable[..., Tensor], x: Tensor, norm: nn.Module, conv: nn.Module, dy: Tensor, **options: Any
) -> dict[str, Tensor]:
    norm, conv, x = copy.deepcopy(norm), copy.deepcopy(conv), x.detach().clone().requires_grad_()
    y = op(x, norm, conv, **options)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "running_mean": norm.running_mean, "running_var": norm.running_var}
    assert norm.num_batches_tracked.item() == 1
    found |= {f"norm {name}": p.grad for name, p in norm.named_parameters()}
    return found | {f"conv {name}": p.grad for name, p in conv.named_parameters()}  # type: ignore[return-value]


def check_conv(
    op: Callable[..., Tensor], x: Tensor, norm: nn.Module, conv: nn.Module, what: str = "", **options: Any
) -> None:
    """`op` gives what the modules give, within the error rule."""
    with torch.no_grad():
        for _ in range(50):  # no value where the sign of what is activated is a matter of rounding
            z = copy.deepcopy(norm).double()(x.double())
            near = z.abs() < 4 * torch.finfo(torch.float32).eps * (spread(x, norm) + z.abs().amax())
            if not near.any():
                break
            x = torch.where(near, x + 0.01 * x.std(), x)
    dy = torch.randn_like(conv(x))
    wide = x.double(), copy.deepcopy(norm).double(), copy.deepcopy(conv).double(), dy.double()
    truth = run_conv(reference.bn_act_conv, *wide, **options)
    same, got = (run_conv(f, x, norm, conv, dy, **options) for f in (reference.bn_act_conv, op))
    assert got.keys() == truth.keys()
    rows, size = x.numel() // x.shape[1], 8 * dy.abs().max().item()
    reach = (spread(x, norm) * size * rows**0.5).item()
    for name, value in got.items():
        assert value.dtype == same[name].dtype and value.shape == same[name].shape, name
        terms = reach if name in ("dx", "norm weight", "norm bias") else size * rows**0.5 if "conv" in name else 8.0
        assert_within_error_rule(value, same[name], truth[name], f"{what} {options}: {name}", terms)
