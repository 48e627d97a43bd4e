"""A step of AdamW on lists of tensors as one operator, `torch.ops.fastlocal.fused_adamw_`, in place, and `FusedAdamW` on top.

On a GPU one launch over all tensors: decoupled weight decay, both moments, averages of the new parameters (EMA links),
low-precision copies of them, and the count of steps; two launches where the gradients' norm or whether they are finite
must be known first. PyTorch's fused AdamW elsewhere. Reads nothing back to the host on a GPU. Deterministic on every
backend. Specification: fastlocal/reference/fused_adamw.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._lists import traits
from fastlocal.ops._update import Fused, aten_gradients, by_dtype, check_update, reject_aten, split, widened
from fastlocal.ops.fused_sgd import Signature, aten_follow, aten_round, reject_triton
from fastlocal.reference.fused_adamw import fused_adamw_ as specification

NAME = "fused_adamw_"

_library = torch.library.Library("fastlocal", "FRAGMENT")
_library.define(
    f"{NAME}(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] averages, Tensor(f!)[] copies, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize, Tensor? ema_decay_tensor, float ema_decay, float? max_norm, Tensor? grad_scale, "
    "Tensor(g!)? found_inf, bool check, int? seed, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default


def fused_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
    averages: Sequence[Tensor] = (),
    ema_decay: float | Tensor | None = None,
    copies: Sequence[Tensor] = (),
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    impl: str | None = None,
) -> Tensor | None:
    """The update of torch.optim.AdamW for every parameter, in place, without autograd. Gradients are not changed.

    Args:
        params: any shapes, floating point. For half-precision weights give their float32 masters here, and the weights
            themselves as `copies`.
        grads: one for each parameter, of its shape; the dtype may be another.
        exp_avgs, exp_avg_sqs: one for each parameter, zero at first.
        steps: one for each parameter, float32, one element, on its device, zero at first: steps done before. Each is a
            tensor of its own. They grow by 1, unless the step is skipped.
        lr: a number, or a tensor of one element on the device, which a captured graph reads anew at each replay.
        betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        averages, ema_decay, copies, max_norm, grad_scale, found_inf, check, impl: as in `fastlocal.ops.fused_sgd_`.
        rounding, seed: likewise; "stochastic" rounds both moments so too, where they are bfloat16.

    Returns:
        The norm before clipping, [], float32, or None without max_norm.

    Raises:
        ArgumentError: lists, shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
        RuntimeError: a CUDA graph is being captured, and tensors of these sizes were never updated before.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps = (list(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps))
    averages, copies = list(averages), list(copies)
    for name, beta in zip(("betas[0]", "betas[1]"), betas):
        if not 0 <= beta < 1:
            raise ArgumentError(f"{name}={beta} is outside [0, 1)")
    check_update(
        {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        lr=lr,
        averages=averages,
        ema_decay=ema_decay,
        copies=copies,
        max_norm=max_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        check=check,
        impl=impl,
        steps=steps,
        rounding=rounding,
        seed=seed,
    )
    if len(steps) != len(params):
        raise ArgumentError(f"steps has {len(steps)} tensors and params {len(params)}; give one for each")
    if not params:
        return None if max_norm is None else torch.zeros(())
    with torch.no_grad():
        norm = _operator(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            averages,
            copies,
            *split(lr),
            *betas,
            eps,
            weight_decay,
            maximize,
            *split(ema_decay),
            max_norm,
            grad_scale,
            found_inf,
            check,
            seed if rounding == "stochastic" else None,
            impl or "auto",
        )
    return None if max_norm is None else norm


def _signature(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor] = (),
    *,
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    rounding: str = "nearest",
    **_: Any,
) -> Signature:
    device, triton = _dispatch.platform(params[0].device) if params else ("cpu", "there is no tensor")
    updated = traits(params, grads, exp_avgs, exp_avg_sqs)
    both = traits(params, grads, exp_avgs, exp_avg_sqs, averages, copies) if averages or copies else updated
    return Signature(device, triton, updated, both, rounding == "stochastic")


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", reject_triton),
        _dispatch.Candidate("aten", lambda s: reject_aten(s.device, s.updated, stochastic=s.stochastic)),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.fused_adamw_ launches where Triton serves it."""
    call = dict(zip([argument.name for argument in _operator._schema.arguments], args)) | kwargs
    return 1 + (call["max_norm"] is not None or call["check"])


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    copies: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_decay_tensor: Tensor | None,
    ema_decay: float,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
    seed: int | None,
    impl: str,
) -> Tensor:
    rounding = "nearest" if seed is None else "stochastic"
    signature = _signature(params, grads, exp_avgs, exp_avg_sqs, averages=averages, copies=copies, rounding=rounding)
    chosen = _dispatch.choose(NAME, signature, impl)
    rate = lr if lr_tensor is None else lr_tensor
    decay = ema_decay if ema_decay_tensor is None else ema_decay_tensor
    if chosen == "triton":
        from fastlocal.triton_kernels import fused_adamw as kernels  # Triton is optional

        rate = rate.to(params[0].device) if isinstance(rate, Tensor) else rate
        norm = kernels.launch(
            params, grads, exp_avgs, exp_avg_sqs, steps, averages, copies, rate, beta1, beta2, eps, weight_decay, maximize,
            decay, max_norm, grad_scale, found_inf, check, seed,
        )  # fmt: skip
    elif chosen == "aten":
        rows = params, grads, exp_avgs, exp_avg_sqs
        p32, g32, m32, v32 = rows if seed is None else widened(*rows)
        g32, norm, skip = aten_gradients(g32, max_norm, grad_scale, found_inf, check)
        if skip is None or params[0].device.type != "cpu" or not bool(skip):  # reading is free on a CPU only
            torch._foreach_add_(steps, 1)
            for p, g, m, v, s in by_dtype(p32, g32, m32, v32, steps):
                torch._fused_adamw_(
                    p, g, m, v, [], s, lr=rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                    amsgrad=False, maximize=maximize, found_inf=skip,
                )  # fmt: skip
            if seed is not None:
                aten_round(params, [exp_avgs, exp_avg_sqs], p32, [m32, v32], averages, decay, skip, steps, seed)
            else:
                if skip is not None:
                    torch._foreach_sub_(steps, [skip] * len(steps))
                aten_follow(params, averages, copies, decay, skip)
    else:
        norm = specification(
            params, grads, exp_avgs, exp_avg_sqs, steps, lr=rate, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
            maximize=maximize, averages=averages, ema_decay=decay, copies=copies, max_norm=max_norm, grad_scale=grad_scale,
            found_inf=found_inf, check=check, rounding=rounding, seed=seed or 0,
        )  # fmt: skip
    if chosen != "reference":  # neither a kernel nor PyTorch's fused update tells autograd
        written = [*params, *exp_avgs, *exp_avg_sqs, *steps, *averages, *copies]
        increment_version([*written, found_inf] if check and found_inf is not None else written)
    return params[0].new_empty(0) if norm is None else norm.to(torch.float32)


def _fake(params: list[Tensor], *args: Any) -> Tensor:
    max_norm = args[15]
    return params[0].new_empty(0) if max_norm is None else params[0].new_empty((), dtype=torch.float32)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


class FusedAdamW(Fused, torch.optim.AdamW):
    """torch.optim.AdamW through `fused_adamw_`; the two load each other's state_dict. AMSGrad is left to torch.optim.

    It follows torch.amp.GradScaler's protocol (the attributes ``grad_scale`` and ``found_inf`` during a step), and never
    waits for a GPU. Parameters without a gradient are left alone.

    Args:
        params, lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; lr may be a tensor on the device, which a
            captured graph reads at each replay. The steps are tensors on the device too.
        max_norm, check, master, rounding, seed, impl: as in `FusedSGD`.

    Attributes:
        norm: of the gradients at the last step with max_norm, before clipping, [] on the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        check: bool = False,
        master: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        impl: str | None = None,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize, fused=True)
        self._set(max_norm, check, master, impl, rounding, seed)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient. Returns what closure returns."""
        return self._update(closure, self._run)

    def _run(self, group: dict[str, Any], params: list[Tensor], first: bool, options: dict[str, Any]) -> Tensor | None:
        wide = [self._wide(p) for p in params]
        for p, w in zip(params, wide):
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(w, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(w, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        return fused_adamw_(
            wide,
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [s["step"] for s in states],
            betas=group["betas"],
            eps=group["eps"],
            **options,
        )
