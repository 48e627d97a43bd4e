"""Shared by the tests of operators on lists of tensors: lists of many sizes, PyTorch's own update, and the error rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import assert_within_error_rule

SHAPES: list[tuple[int, ...]] = [
    (1,),
    (3,),
    (31,),
    (63,),
    (127,),
    (1000,),
    (),
    (0,),
    (2, 0, 3),
    (16, 3, 3, 3),
    (65537,),
]
MANY = [(7 + i % 41,) for i in range(45)] + [(2048,), (4096,), (2049,)]


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(shape) * scale).to(dtype) for shape in shapes]


def clones(tensors: Any) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same_bits(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b)
    )


def bits(t: Tensor) -> Tensor:
    """For equality where there are nans."""
    return t.contiguous().reshape(-1).view(torch.uint8)


def check_lists(got: Any, same_dtype: Any, truth: Any, what: str, terms: Any = None) -> None:
    """The error rule for each tensor. `terms` are what it is summed from: the floor is a rounding of the largest element."""
    for i, (g, s, t) in enumerate(zip(got, same_dtype, truth, strict=True)):
        largest = max((float(x.abs().max()) for x in terms[i] if x.numel()), default=0.0) if terms else 0.0
        if g.dtype == torch.float64:  # the truth is no better: a few roundings of anything that is summed
            largest = 8 * max(largest, float(t.abs().max()) if t.numel() else 0.0)
        assert_within_error_rule(g, s, t, f"{what}[{i}] {list(g.shape)}", largest)


class Update:
    """All tensors of one update, and the update as PyTorch does it, in any dtype."""

    def __init__(
        self,
        rule: str,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        *,
        grad_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        average_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
        momentum: bool = True,
    ):
        self.rule = rule
        state_dtype = state_dtype or dtype
        self.params = draw(shapes, dtype)
        self.grads = draw(shapes, grad_dtype or dtype, 0.5)
        self.state: list[list[Tensor]] = []
        if rule == "adamw":
            squares = [t.square() for t in draw(shapes, state_dtype, 0.4)]
            steps = [torch.tensor(float(i % 5)) for i in range(len(shapes))]
            self.state = [draw(shapes, state_dtype, 0.1), squares, steps]
        elif momentum:
            self.state = [draw(shapes, state_dtype)]
        self.averages = draw(shapes, average_dtype) if average_dtype else []
        self.copies = [torch.full_like(p, float("nan"), dtype=copy_dtype) for p in self.params] if copy_dtype else []

    def to(self, device: str) -> Update:
        """The same on a device, in place."""
        for name in ("params", "grads", "averages", "copies"):
            setattr(self, name, [t.to(device) for t in getattr(self, name)])
        self.state = [[t.to(device) for t in row] for row in self.state]
        return self

    @property
    def written(self) -> list[Tensor]:
        return [*self.params, *[t for row in self.state for t in row], *self.averages, *self.copies]

    def arguments(self) -> tuple[tuple[list[Tensor], ...], dict[str, list[Tensor]]]:
        """Fresh copies, for the operator."""
        lists = tuple(clones(x) for x in (self.params, self.grads, *self.state))
        return lists, {"averages": clones(self.averages), "copies": clones(self.copies)}

    def run(self, operator: Any, **options: Any) -> tuple[list[Tensor], Any]:
        """What the operator writes, in the order of `written`, and what it returns."""
        lists, more = self.arguments()
        result = operator(*lists, **more, **options)
        assert same_bits(lists[1], self.grads), "the gradients have changed"
        rows = [lists[0], *lists[2:], more["averages"], more["copies"]]
        return [t for row in rows for t in row], result

    def by_torch(self, dtype: torch.dtype | None, **options: Any) -> tuple[list[Tensor], Tensor | None]:
        """The same by torch.optim, clip_grad_norm_ and lerp, tensor after tensor; dtype None: that of each parameter."""
        options = dict(options)
        max_norm, grad_scale = options.pop("max_norm", None), options.pop("grad_scale", None)
        decay, first = options.pop("ema_decay", None), options.pop("first", False)
        for name in ("found_inf", "check"):
            options.pop(name, None)

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype or t.dtype, copy=True)

        params = [torch.nn.Parameter(cast(p)) for p in self.params]
        for p, g in zip(params, self.grads):
            p.grad = g.to(p.dtype, copy=True)
            if grad_scale is not None:
                p.grad /= grad_scale.to(p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm) if max_norm is not None else None
        options = {k: float(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        kind = torch.optim.AdamW if self.rule == "adamw" else torch.optim.SGD
        optimizer = kind(params, foreach=False, **options)
        for i, p in enumerate(params):
            if self.rule == "adamw":
                m, v, step = (row[i] for row in self.state)
                optimizer.state[p] = {
                    "step": step.clone(),
                    "exp_avg": cast(m).to(p.dtype),
                    "exp_avg_sq": cast(v).to(p.dtype),
                }
            elif self.state and not first:
                optimizer.state[p] = {"momentum_buffer": cast(self.state[0][i]).to(p.dtype)}
        optimizer.step()
        keys = ("exp_avg", "exp_avg_sq", "step") if self.rule == "adamw" else ("momentum_buffer",)
        state = [[optimizer.state[p][key] for p in params] for key in keys] if self.state else []
        out = [p.detach() for p in params]
        averages = [cast(a) for a in self.averages]
        for a, p in zip(averages, out):
            # In the dtype of the arithmetic an average sees what a parameter is stored as.
            a.copy_(
                a.to(torch.promote_types(a.dtype, p.dtype)).lerp(
                    p.to(torch.promote_types(a.dtype, p.dtype)), 1 - float(decay)
                )
            )
        copies = [p.to(dtype or c.dtype) for p, c in zip(out, self.copies)]
        return [*out, *[t for row in state for t in row], *averages, *copies], norm

    def check(self, operator: Any, what: str = "", **options: Any) -> None:
        """The error rule for everything that is written, and for the norm."""
        got, norm = self.run(operator, **options)
        same, same_norm = self.by_torch(None, **options)
        truth, true_norm = self.by_torch(torch.float64, **options)
        assert [g.dtype for g in got] == [t.dtype for t in self.written]
        columns = list(zip(self.params, self.grads, *self.state))
        terms = columns * (len(got) // len(columns))
        check_lists(got, same, truth, f"{self.rule} {what}", terms)
        assert (norm is None) == (true_norm is None)
        if norm is not None:
            assert norm.dtype == torch.float32 and norm.shape == ()
            assert_within_error_rule(norm, same_norm, true_norm, f"{self.rule} {what} norm")  # type: ignore[arg-type]
