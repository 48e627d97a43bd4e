"""A step of SGD on lists of tensors as one operator, `torch.ops.fastlocal.fused_sgd_`, in place, and `FusedSGD` on top.

On a GPU one launch over all tensors: weight decay, momentum, averages of the new parameters (EMA links) and low-precision
copies of them; two launches where the gradients' norm or whether they are finite must be known first. PyTorch's fused SGD
elsewhere. Reads nothing back to the host on a GPU. Deterministic on every backend.
Specification: fastlocal/reference/fused_sgd.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastlocal.errors import ArgumentError
from fastlocal.ops import _dispatch
from fastlocal.ops._lists import Traits, reject_kernel, traits
from fastlocal.ops._update import Fused, aten_gradients, by_dtype, check_update, reject_aten, split, widened
from fastlocal.reference.fused_sgd import assign, draw_bits, follow
from fastlocal.reference.fused_sgd import fused_sgd_ as specification

NAME = "fused_sgd_"

_library = torch.library.Library("fastlocal", "FRAGMENT")
_library.define(
    f"{NAME}(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, "
    "Tensor(d!)[] copies, Tensor? lr_tensor, float lr, float weight_decay, float momentum, float dampening, "
    "bool nesterov, bool maximize, bool first, Tensor? ema_decay_tensor, float ema_decay, float? max_norm, "
    "Tensor? grad_scale, Tensor(e!)? found_inf, bool check, Tensor(f!)[] steps, int? seed, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = getattr(torch.ops.fastlocal, NAME).default


def fused_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    averages: Sequence[Tensor] = (),
    ema_decay: float | Tensor | None = None,
    copies: Sequence[Tensor] = (),
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    check: bool = False,
    steps: Sequence[Tensor] = (),
    rounding: str = "nearest",
    seed: int = 0,
    impl: str | None = None,
) -> Tensor | None:
    """The update of torch.optim.SGD for every parameter, in place, without autograd. Gradients are not changed.

    Args:
        params: any shapes, floating point. For half-precision weights give their float32 masters here, and the weights
            themselves as `copies`.
        grads: one for each parameter, of its shape; the dtype may be another.
        momentum_buffers: one for each parameter where momentum is not 0, else none. Start them at zero, or with
            first=True, which ignores what they hold.
        lr: a number, or a tensor of one element on the device, which a captured graph reads anew at each replay.
        weight_decay, momentum, dampening, nesterov, maximize: as in torch.optim.SGD.
        averages: none, or one for each parameter: ``average = ema_decay * average + (1 - ema_decay) * new parameter``.
        ema_decay: a number or a tensor of one element, see `fastlocal.ops.ema_update_`.
        copies: none, or one for each parameter: receives the new parameter in its own dtype.
        max_norm: gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``, as clip_grad_norm_ does, with the norm of
            all of them together after unscaling.
        grad_scale: float32, one element: gradients are divided by it first.
        found_inf: float32, one element: where it is not 0, nothing is written. The host does not read it on a GPU.
        check: look whether all gradients are finite; if not, found_inf becomes 1 and nothing is written.
        steps: with stochastic rounding one for each parameter, float32, one element, on its device: steps done before. Each
            is a tensor of its own. They grow by 1, unless the step is skipped.
        rounding: "stochastic" is for bfloat16 parameters without masters. It rounds them, momentum and averages, where these
            are bfloat16 too, up or down at random so that the mean is the value in float32: changes below half a unit in
            the last place add up, which they do not under "nearest".
        seed: of stochastic rounding, 0 <= seed < 2**63. With it, a tensor's place in the lists, its step and an element's
            place in memory determine the bits, on every backend and device: a replayed graph draws anew, and a run that is
            resumed with its steps draws what it would have drawn (see fastlocal/reference/rounding.py).
        impl: a backend for this call; None takes that of `fastlocal.backend`.

    Returns:
        The norm before clipping, [], float32 (float64 for float64 gradients on some backends), or None without max_norm.

    Raises:
        ArgumentError: lists, shapes, dtypes or options that do not fit.
        BackendError: `impl` cannot serve the call.
        RuntimeError: a CUDA graph is being captured, and tensors of these sizes were never updated before.
    """
    params, grads, momentum_buffers = list(params), list(grads), list(momentum_buffers)
    averages, copies, steps = list(averages), list(copies), list(steps)
    lists = {"params": params, "grads": grads}
    if momentum:
        lists["momentum_buffers"] = momentum_buffers
    elif momentum_buffers:
        raise ArgumentError("momentum_buffers are given, but momentum=0; leave them out")
    if nesterov and (not momentum or dampening):
        raise ArgumentError(
            f"nesterov=True with momentum={momentum}, dampening={dampening}; it takes momentum without dampening"
        )
    check_update(
        lists,
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
    if len(steps) != (len(params) if rounding == "stochastic" else 0):
        raise ArgumentError(
            f"steps has {len(steps)} tensors, with {len(params)} parameters and rounding={rounding!r}; give one for each "
            "with 'stochastic', none with 'nearest'"
        )
    if not params:
        return None if max_norm is None else torch.zeros(())
    with torch.no_grad():
        norm = _operator(
            params,
            grads,
            momentum_buffers,
            averages,
            copies,
            *split(lr),
            weight_decay,
            momentum,
            dampening,
            nesterov,
            maximize,
            first,
            *split(ema_decay),
            max_norm,
            grad_scale,
            found_inf,
            check,
            steps,
            seed if rounding == "stochastic" else None,
            impl or "auto",
        )
    return None if max_norm is None else norm


class Signature(NamedTuple):
    """All that the choice of a backend depends on: the traits of what is updated, and with what else is written."""

    device: str
    triton: str | None
    updated: Traits
    traits: Traits
    stochastic: bool = False


def _signature(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    rounding: str = "nearest",
    **_: Any,
) -> Signature:
    device, triton = _dispatch.platform(params[0].device) if params else ("cpu", "there is no tensor")
    updated = traits(params, grads, momentum_buffers)
    both = traits(params, grads, momentum_buffers, averages, copies) if averages or copies else updated
    return Signature(device, triton, updated, both, rounding == "stochastic")


def reject_triton(s: Signature) -> str | None:
    """Why the kernel cannot serve."""
    return reject_kernel(s.device, s.triton, s.traits, copies=False, stochastic=s.stochastic)


def _reject_aten(s: Signature) -> str | None:
    half = s.updated.dtypes & {torch.bfloat16, torch.float16}
    if s.device == "cpu" and half and not s.stochastic and not _updates_half():
        return "half precision, which this PyTorch's fused SGD does not update on a CPU (pytorch issue 191763)"
    return reject_aten(s.device, s.updated, stochastic=s.stochastic)


@functools.cache
def _updates_half() -> bool:
    """PyTorch 2.13 and before leave whole vectors of half-precision parameters as they are."""
    p = [torch.ones(64, dtype=torch.bfloat16)]
    torch._fused_sgd_(
        p, [torch.ones_like(p[0])], [torch.zeros_like(p[0])], weight_decay=0.0, momentum=0.5, lr=1.0, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip
    return not bool(p[0].any())


_dispatch.register(
    NAME,
    _signature,
    [
        _dispatch.Candidate("triton", lambda s: reject_triton(s)),
        _dispatch.Candidate("aten", _reject_aten),
        _dispatch.Candidate("reference", lambda s: None),
    ],
)


def triton_launches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that one call of torch.ops.fastlocal.fused_sgd_ launches where Triton serves it."""
    call = dict(zip([argument.name for argument in _operator._schema.arguments], args)) | kwargs
    return 1 + (call["max_norm"] is not None or call["check"])


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    copies: list[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    ema_decay_tensor: Tensor | None,
    ema_decay: float,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    check: bool,
    steps: list[Tensor],
    seed: int | None,
    impl: str,
) -> Tensor:
    rounding = "nearest" if seed is None else "stochastic"
    signature = _signature(params, grads, momentum_buffers, averages=averages, copies=copies, rounding=rounding)
    chosen = _dispatch.choose(NAME, signature, impl)
    rate = lr if lr_tensor is None else lr_tensor
    decay = ema_decay if ema_decay_tensor is None else ema_decay_tensor
    if chosen == "triton":
        from fastlocal.triton_kernels import fused_sgd as kernels  # Triton is optional

        rate = rate.to(params[0].device) if isinstance(rate, Tensor) else rate
        norm = kernels.launch(
            params, grads, momentum_buffers, averages, copies, rate, weight_decay, momentum, dampening, nesterov, maximize,
            first, decay, max_norm, grad_scale, found_inf, check, steps, seed,
        )  # fmt: skip
    elif chosen == "aten":
        p32, g32, b32 = (params, grads, momentum_buffers) if seed is None else widened(params, grads, momentum_buffers)
        g32, norm, skip = aten_gradients(g32, max_norm, grad_scale, found_inf, check)
        if skip is None or params[0].device.type != "cpu" or not bool(skip):  # reading is free on a CPU only
            for p, g, b in by_dtype(p32, g32, b32):
                torch._fused_sgd_(
                    p, g, b, weight_decay=weight_decay, momentum=momentum, lr=rate, dampening=dampening, nesterov=nesterov,
                    maximize=maximize, is_first_step=first, found_inf=skip,
                )  # fmt: skip
            if seed is None:
                aten_follow(params, averages, copies, decay, skip)
            else:
                torch._foreach_add_(steps, 1)
                aten_round(params, [momentum_buffers], p32, [b32], averages, decay, skip, steps, seed)
    else:
        norm = specification(
            params, grads, momentum_buffers, lr=rate, weight_decay=weight_decay, momentum=momentum, dampening=dampening,
            nesterov=nesterov, maximize=maximize, first=first, averages=averages, ema_decay=decay, copies=copies,
            max_norm=max_norm, grad_scale=grad_scale, found_inf=found_inf, check=check,
            steps=steps, rounding=rounding, seed=seed or 0,
        )  # fmt: skip
    if chosen != "reference":  # neither a kernel nor PyTorch's fused update tells autograd
        written = [*params, *momentum_buffers, *averages, *copies, *steps]
        increment_version([*written, found_inf] if check and found_inf is not None else written)
    return params[0].new_empty(0) if norm is None else norm.to(torch.float32)


def aten_follow(
    params: list[Tensor],
    averages: list[Tensor],
    copies: list[Tensor],
    decay: float | Tensor,
    skip: Tensor | None,
) -> None:
    """Averages and copies after PyTorch's own update."""
    if skip is not None and params[0].device.type != "cpu":
        follow(params, averages, copies, decay, skip != 0)  # one by one: foreach has nothing that can leave one alone
        return
    if averages:
        from fastlocal.ops.ema_update import _aten

        _aten(averages, params, decay)
    if copies:
        torch._foreach_copy_(copies, params)


def aten_round(
    params: list[Tensor],
    states: list[list[Tensor]],
    new_params: list[Tensor],
    new_states: list[list[Tensor]],
    averages: list[Tensor],
    decay: float | Tensor,
    skip: Tensor | None,
    steps: list[Tensor],
    seed: int,
) -> None:
    """Writes what was computed in float32, and the averages, rounded at random. `steps` count this one: no more if skip."""
    draws = draw_bits(params, steps, seed)
    if skip is not None:
        torch._foreach_sub_(steps, [skip] * len(steps))
        skip = skip != 0
    for rows, news, which in zip([params, *states], [new_params, *new_states], range(3)):
        for t, new, bits in zip(rows, news, draws):
            assign(t, new, skip, bits[which])
    follow(params, averages, [], decay, skip, draws)


def _fake(params: list[Tensor], *args: Any) -> Tensor:
    max_norm = args[14]
    return params[0].new_empty(0) if max_norm is None else params[0].new_empty((), dtype=torch.float32)


_library.impl(NAME, _run, "CompositeExplicitAutograd")  # every device: _dispatch looks at where the tensors are
torch.library.register_fake(f"fastlocal::{NAME}", _fake, lib=_library)


class FusedSGD(Fused, torch.optim.SGD):
    """torch.optim.SGD through `fused_sgd_`; the two load each other's state_dict.

    It follows torch.amp.GradScaler's protocol (the attributes ``grad_scale`` and ``found_inf`` during a step), and never
    waits for a GPU, except in a first step with dampening and ``found_inf``. Parameters without a gradient are left alone.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD; lr may be a tensor on the
            device, which a captured graph reads at each replay.
        max_norm: clips by the norm of all gradients that this optimizer sees (those of a block); ``norm`` then is it.
        check: skips the step, on the device, where a gradient is not finite.
        master: trains float32 copies of bfloat16 and float16 parameters, in the state under "master"; the parameters are
            rounded from them. Who writes a parameter by hand deletes its master.
        rounding, seed: "stochastic" trains bfloat16 parameters without masters, see `fused_sgd_`; the steps are in the state
            under "step", the seed (0 <= seed < 2**32) is not. Optimizers that shall draw apart take different seeds.
        impl: a backend for every step; None takes that of `fastlocal.backend`.

    Attributes:
        norm: of the gradients at the last step with max_norm, before clipping, [] on the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
        check: bool = False,
        master: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
        impl: str | None = None,
    ):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, fused=True)
        self._set(max_norm, check, master, impl, rounding, seed)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient. Returns what closure returns."""
        return self._update(closure, self._run)

    def _is_first(self, group: dict[str, Any], p: Tensor) -> bool:
        # Without dampening a momentum of zero is as good as none.
        return bool(group["momentum"] and group["dampening"]) and self.state[p].get("momentum_buffer") is None

    def _run(self, group: dict[str, Any], params: list[Tensor], first: bool, options: dict[str, Any]) -> Tensor | None:
        wide = [self._wide(p) for p in params]
        buffers = []
        if group["momentum"]:
            for p, w in zip(params, wide):
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(w, memory_format=torch.preserve_format)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
        steps = []
        if self.rounding == "stochastic":
            for p in params:
                if "step" not in self.state[p]:
                    self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            steps = [self.state[p]["step"] for p in params]
        norm = fused_sgd_(
            wide,
            [p.grad for p in params],  # type: ignore[misc]
            buffers,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            first=first,
            steps=steps,
            **options,
        )
        if first and options["found_inf"] is not None and bool(options["found_inf"]):  # nothing has begun
            for p in params:
                del self.state[p]["momentum_buffer"]
        return norm
