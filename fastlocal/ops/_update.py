"""What SGD and AdamW share: checks, the gradients' norm and finiteness in ATen, what follows an update, the optimizer's face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._lists import Traits, check_number, check_partners

_ATEN_DEVICES = ("cpu", "cuda", "xpu", "mps")  # where PyTorch has fused optimizers


def check_update(
    lists: Mapping[str, Sequence[Tensor]],
    *,
    lr: float | Tensor,
    averages: Sequence[Tensor],
    ema_decay: float | Tensor | None,
    copies: Sequence[Tensor],
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
    impl: str | None,
    steps: Sequence[Tensor],
    rounding: str,
    seed: int,
) -> None:
    """Raises ArgumentError for what no backend can serve. `lists` has params first."""
    every = {**lists, **({"averages": averages} if averages else {}), **({"copies": copies} if copies else {})}
    check_partners("params", every)
    for name, tensors in every.items():
        for i, t in enumerate(tensors):
            if not t.is_floating_point() or t.layout != torch.strided:
                raise ArgumentError(f"{name}[{i}] is {t.dtype}, {t.layout}; give a dense floating-point tensor")
    params = lists["params"]
    device = params[0].device if params else None
    check_number("lr", lr, None if isinstance(lr, Tensor) and lr.device.type == "cpu" and impl != "triton" else device)
    if averages and ema_decay is None:
        raise ArgumentError("averages are given without ema_decay; give the weight of the past, such as 0.999")
    if ema_decay is not None:
        check_number("ema_decay", ema_decay, device)
    if max_norm is not None and not max_norm > 0:
        raise ArgumentError(f"max_norm={max_norm}; give a positive number or None")
    if check and found_inf is None:
        raise ArgumentError(
            "check=True has nowhere to write its answer; give found_inf, a float32 tensor of one element"
        )
    for name, given in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if given is not None and (given.numel() != 1 or given.dtype != torch.float32):
            raise ArgumentError(f"{name} is {given.dtype} {list(given.shape)}; give a float32 tensor of one element")
        if given is not None and device is not None and given.device != device:
            raise ArgumentError(f"{name} is on {given.device} and params[0] on {device}; move it there")
    if impl is not None:
        _dispatch.check_backend(impl, "impl")
    check_rounding(rounding, seed, params)
    if rounding == "stochastic" and copies:
        raise ArgumentError("copies are given: params are masters then; rounding='stochastic' does without them")
    for i, step in enumerate(steps):
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != device:
            raise ArgumentError(
                f"steps[{i}] is {step.dtype} {list(step.shape)} on {step.device}; give a float32 tensor of one element on "
                f"{device}"
            )


def check_rounding(rounding: str, seed: int, params: Iterable[Tensor]) -> None:
    """Raises ArgumentError unless these parameters can be rounded so."""
    if rounding not in ("nearest", "stochastic"):
        raise ArgumentError(f"rounding={rounding!r}; give 'nearest' or 'stochastic'")
    if not 0 <= seed < 2**63:
        raise ArgumentError(f"seed={seed} is outside [0, 2**63)")
    for i, p in enumerate(params if rounding == "stochastic" else ()):
        if p.dtype != torch.bfloat16:
            raise ArgumentError(
                f"params[{i}] is {p.dtype}; rounding='stochastic' takes bfloat16, update the others with rounding='nearest'"
            )


def widened(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """The lists in float32, for an update that is rounded afterwards."""
    return [[t.to(torch.float32, copy=True) for t in row] for row in lists]


def reject_aten(device: str, has: Traits, *, stochastic: bool = False) -> str | None:
    """Why PyTorch's fused optimizers cannot serve lists of these traits. `stochastic`: they get float32 copies."""
    if device not in _ATEN_DEVICES:
        return f"PyTorch has no fused optimizers on {device}"
    if not stochastic and any(len(set(column)) > 1 for column in has.columns):
        return "PyTorch's fused optimizers take a parameter, its gradient and its state in one dtype"
    if not has.same_memory:
        return "tensors that belong together have other strides, or gaps in memory"
    return None


def split(value: float | Tensor | None) -> tuple[Tensor | None, float]:
    """A number or a tensor as the two arguments of a schema."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value or 0.0))


def total_norm(grads: list[Tensor]) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ computes it."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What clip_grad_norm_ multiplies by."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def add_found(found_inf: Tensor, grads: Sequence[Tensor]) -> None:
    """found_inf becomes 1, if it is 0, where a gradient is not finite."""
    filled = [g for g in grads if g.numel()]
    if filled:
        largest = torch.stack([t.float() for t in torch._foreach_norm(filled, float("inf"))])
        bad = (~largest.isfinite().all()).to(found_inf.dtype).reshape(found_inf.shape)
        found_inf.copy_(torch.maximum(found_inf, bad))


def aten_gradients(
    grads: list[Tensor],
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Gradients unscaled and clipped (new tensors then), their norm, and the flag (0 or 1, float32) that says to skip."""
    if check and found_inf is not None:
        add_found(found_inf, grads)
    norm = None
    if grad_scale is not None:
        grads = _like(torch._foreach_div(grads, grad_scale.reshape(())), grads)
    if max_norm is not None:
        norm = total_norm(grads)
        grads = _like(torch._foreach_mul(grads, clip_factor(norm, max_norm)), grads)
    return grads, norm, None if found_inf is None else (found_inf != 0).float().reshape(())


def _like(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(o.dtype) for t, o in zip(tensors, others)]  # one element with another is promoted


def by_dtype(*lists: Sequence[Tensor]) -> Iterable[list[list[Tensor]]]:
    """The lists in parts, the tensors of each part of one dtype; lists without tensors stay so."""
    parts: dict[torch.dtype, list[list[Tensor]]] = {}
    for i, t in enumerate(lists[0]):
        part = parts.setdefault(t.dtype, [[] for _ in lists])
        for into, tensors in zip(part, lists):
            if tensors:
                into.append(tensors[i])
    return parts.values()


class Fused:
    """What `FusedSGD` and `FusedAdamW` add to the classes of torch.optim."""

    param_groups: list[dict[str, Any]]
    state: Any
    _EXTRAS = (
        "max_norm", "check", "master", "impl", "rounding", "seed", "norm", "_averages", "_ema_decay",
        "_step_supports_amp_scaling",
    )  # fmt: skip

    def _set(
        self, max_norm: float | None, check: bool, master: bool, impl: str | None, rounding: str, seed: int
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ArgumentError(f"max_norm={max_norm}; give a positive number or None")
        if impl is not None:
            _dispatch.check_backend(impl, "impl")
        check_rounding(rounding, seed, [p for g in self.param_groups for p in g["params"]])
        if rounding == "stochastic" and master:
            raise ArgumentError("master=True with rounding='stochastic'; a master is what that rounding does without")
        if seed >= 2**32:
            raise ArgumentError(f"seed={seed} is outside [0, 2**32)")
        self.max_norm, self.check, self.master, self.impl = max_norm, check, master, impl
        self.rounding, self.seed = rounding, seed
        self.norm: Tensor | None = None
        self._averages: dict[Tensor, Tensor] = {}
        self._ema_decay: float | Tensor | None = None

    def link(self, pairs: Iterable[tuple[Tensor, Tensor]], decay: float | Tensor) -> None:
        """From now on `step` also updates averages of parameters, in the same launch.

        Args:
            pairs: (parameter, average); the average has the parameter's shape and device. It replaces earlier links.
            decay: weight of the past; a tensor of one element may change between steps, and replays of a graph.
        """
        self._averages = dict(pairs)
        self._ema_decay = decay

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._EXTRAS}}  # type: ignore[misc, dict-item]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of this class or of its parent in torch.optim returned.

        Raises:
            ArgumentError: it belongs to AMSGrad.
        """
        if any(g.get("amsgrad") for g in state_dict["param_groups"]):
            raise ArgumentError("state_dict: amsgrad is on; there is no fused form of it here, use torch.optim.AdamW")
        # How a step is computed is this optimizer's choice; "fused" keeps the steps on the device.
        form = {"fused": True, "foreach": None, "differentiable": False}
        groups = [{**g, **{k: v for k, v in form.items() if k in g}} for g in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})  # type: ignore[misc]
        if not self.master:
            return
        own = [p for g in self.param_groups for p in g["params"]]
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        for p, i in zip(own, saved, strict=True):
            if self._has_master(p):  # torch.optim casts state to the dtype of the parameter
                for key, value in state_dict["state"].get(i, {}).items():
                    if isinstance(value, Tensor) and key != "step":
                        self.state[p][key] = value.to(p.device, torch.float32, copy=True)

    def _has_master(self, p: Tensor) -> bool:
        return self.master and p.dtype in (torch.bfloat16, torch.float16)

    def _is_first(self, group: dict[str, Any], p: Tensor) -> bool:
        return False

    def _wide(self, p: Tensor) -> Tensor:
        """The tensor that is trained: the parameter, or its float32 master."""
        if not self._has_master(p):
            return p
        state = self.state[p]
        if "master" not in state:
            state["master"] = p.detach().to(torch.float32, memory_format=torch.preserve_format)
        return state["master"]

    @torch.no_grad()
    def _update(self, closure: Callable[[], Any] | None, run: Callable[..., Tensor | None]) -> Any:
        """Calls run(group, params, first, options) for the parameters of a group that belong in one call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        calls = []
        for group in self.param_groups:
            parts: dict[tuple[bool, bool, bool, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    key = (self._has_master(p), p in self._averages, self._is_first(group, p), p.device)
                    parts.setdefault(key, []).append(p)
            calls += [(group, key, params) for key, params in parts.items()]
        numbers: dict[Tensor, int] = {}
        if self.rounding == "stochastic":
            numbers = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        self.norm = None
        if not calls:
            return loss
        device = calls[0][1][3]
        max_norm, check = self.max_norm, self.check
        if (check or max_norm is not None) and any(key[3] != device for _, key, _ in calls):
            raise ArgumentError("max_norm and check take parameters on one device; make an optimizer for each device")
        if check and found_inf is None:
            found_inf = torch.zeros((), device=device)
        if len(calls) > 1 and (
            check or max_norm is not None
        ):  # what belongs to all parts must be known before the first
            grads = [p.grad for _, _, params in calls for p in params if p.grad is not None]
            if check and found_inf is not None:
                add_found(found_inf, grads)
                check = False
            if max_norm is not None:
                norms = torch.stack([n.float() for n in torch._foreach_norm(grads)])
                self.norm = torch.linalg.vector_norm(norms)
                if grad_scale is not None:
                    self.norm = self.norm / grad_scale
                factor = clip_factor(self.norm, max_norm)
                grad_scale = factor.reciprocal() if grad_scale is None else grad_scale / factor
                max_norm = None
        for group, (has_master, averaged, first, where), params in calls:
            options = {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "maximize": group["maximize"],
                "averages": [self._averages[p] for p in params] if averaged else (),
                "ema_decay": self._ema_decay if averaged else None,
                "copies": params if has_master else (),
                "max_norm": max_norm,
                "grad_scale": _moved(grad_scale, where),
                "found_inf": _moved(found_inf, where),
                "check": check,
                "rounding": self.rounding,
                "seed": self.seed + (numbers.get(params[0], 0) << 32),  # each call counts its tensors from 0
                "impl": self.impl,
            }
            norm = run(group, params, first, options)
            self.norm = self.norm if norm is None else norm
        return loss


def _moved(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device, torch.float32)
