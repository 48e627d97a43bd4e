"""A few launches of every Triton kernel, checked, for compute-sanitizer to watch: every route, dtype and layout, ragged sizes.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Without PyTorch's cache every tensor is an allocation of its own, so that a write past its end is one past an allocation.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from fastlocal import ops, reference
from fastlocal.bench import operators
from fastlocal.errors import BackendError
from fastlocal.ops import pool_linear_cross_entropy_value_and_grad as operator
from fastlocal.reference import pool_linear_cross_entropy_value_and_grad as specification

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Rows, channels, side, classes, dtype, channels_last, target. 70 x 1000 weights go through cuBLAS, 1300 classes in chunks.
CASES = [
    (1, 3, 5, 2, torch.float32, False, "index"),
    (31, 17, 7, 10, torch.float32, True, "ignored"),
    (63, 127, 1, 100, torch.float16, False, "probabilities"),
    (5, 65, 33, 10, torch.float32, False, "index"),
    (3, 70, 7, 1000, torch.float32, True, "index"),
    (33, 16, 9, 127, torch.bfloat16, True, "index"),
    (5, 7, 3, 1300, torch.float32, False, "ignored"),
    (5, 7, 1, 1300, torch.float32, False, "probabilities"),
    (31, 17, 7, 10, torch.float32, False, "weighted"),
    (3, 7, 3, 1300, torch.float16, True, "weighted"),
]


def inputs(
    rows: int, channels: int, side: int, classes: int, dtype: torch.dtype, last: bool, kind: str
) -> list[Tensor]:
    x = torch.randn(rows, channels, side, side).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.rand(rows, classes).softmax(1) if kind == "probabilities" else torch.randint(classes, (rows,))
    if kind == "ignored":
        target[::2] = -100
    return [x, (torch.randn(classes, channels) / channels**0.5).to(dtype), torch.randn(classes).to(dtype), target]


LOSSES = [
    (name, dtype, last)
    for name in ("goodness_loss", "reconstruction_loss")
    for dtype, last in ((torch.float32, False), (torch.float16, True))
]

# Operator, dtype of the parameters and of the gradients, with all that it can do. Views lie off the 16 bytes.
UPDATES = [
    ("ema_update_", torch.float32, torch.float16, False),
    ("ema_update_", torch.float32, torch.float32, True),
    ("fused_sgd_", torch.float32, torch.float32, False),
    ("fused_sgd_", torch.float32, torch.bfloat16, True),
    ("fused_adamw_", torch.float32, torch.float32, False),
    ("fused_adamw_", torch.float32, torch.bfloat16, True),
]


def update(name: str, dtype: torch.dtype, other: torch.dtype, full: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What an operator on lists writes, on the device, and the same by its specification in float64."""
    sizes = [1, 3, 31, 2047, 2048, 2049, 5000]
    whole = [torch.rand(sum(sizes) + 1) for _ in range(5)]

    def lists(to: torch.dtype, grads: torch.dtype, device: str) -> list[list[Tensor]]:
        made = [w.to(device, grads if i == 1 else to, copy=True) for i, w in enumerate(whole)]
        return [list(w[1:].split(sizes)) if full else [t.clone() for t in w[1:].split(sizes)] for w in made]

    out = []
    for module, to, grads, device, extra in (
        (ops, dtype, other, DEVICE, {"impl": "triton"}),
        (reference, torch.float64, torch.float64, "cpu", {}),
    ):
        p, g, m, v, a = lists(to, grads, device)
        run = getattr(module, name)
        if name == "ema_update_":
            run(p, g, 0.9, **extra)
            out.append(p)
            continue
        options = {"lr": 0.1, **extra}
        if full:
            found = torch.zeros((), device=device)
            options |= {"averages": a, "ema_decay": 0.9, "max_norm": 1.0, "found_inf": found, "check": True}
        if name == "fused_sgd_":
            run(p, g, m, momentum=0.9, **options)
        else:
            run(p, g, m, v, [torch.zeros((), device=device) for _ in p], **options)
        out.append([*p, *m, *v, *a])
    return out[0], out[1]


# Cases of the benchmark's registry at ragged sizes: one launch and two, masks, both layouts. A new kernel joins here.
OTHERS = operators.existing(
    operators.Norm("bn_act", 5, 3, 7, residual=True),
    operators.Norm("bn_act", 33, 3, 33, residual=True),
    operators.Norm("bn_act", 5, 33, 7, residual=True, dtype=torch.float16, channels_last=True),
    operators.Norm("bn_act", 33, 5, 33, dtype=torch.bfloat16, channels_last=True),
    operators.Norm("bn_act", 5, 3, 7, residual=True, training=False),
    operators.Norm("bn_act", 5, 33, 7, channels_last=True, training=False),
    operators.Norm("bn_act_pool", 5, 3, 7, residual=True),
    operators.Norm("bn_act_pool", 33, 3, 33, residual=True),
    operators.Norm("bn_act_pool", 5, 33, 7, residual=True, dtype=torch.float16, channels_last=True),
    operators.Norm("bn_act_pool", 33, 5, 33, dtype=torch.bfloat16, channels_last=True),
    operators.NormConv(5, 3, 7),
    operators.NormConv(33, 3, 33, channels_last=True),
    operators.Pairs("supervised_contrastive_loss", 63, 31),
    operators.Pairs("similarity_matching_loss", 63, 31),
    operators.Pairs("similarity_matching_loss", 31, 7, 5, dtype=torch.float16),
    operators.Pairs("similarity_matching_loss", 3, 40, 33),
    operators.Loss("goodness_loss", 31, 63),
    operators.Loss("class_goodness_cross_entropy", 31, 70, 3),
    operators.Loss("norm_linear_cross_entropy", 31, 63),
    operators.Loss("reconstruction_loss", 31, 3, 7),
)


def compared(case: operators.Case) -> float | None:
    """How far an operator is from eager PyTorch in the same dtype, as a part of the norm; None if it has no kernel."""
    torch.manual_seed(0)
    inputs = case.inputs(DEVICE)
    if case.explain(inputs, "triton") is None:
        return None
    eager = next(iter(case.rivals(lambda fn, mode=None: fn).values())).make()
    return operators.disagreement(case.ours("triton")(*operators.copied(inputs)), eager(*operators.copied(inputs)))


def losses(name: str, dtype: torch.dtype, last: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a loss on one tensor, on the device, and of its specification in float64."""
    x, image = torch.randn(5, 3, 37, 11).to(dtype), torch.rand(5, 3, 37, 11)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)  # the image's elements lie in another order
    args = (x, image) if name == "reconstruction_loss" else (x, torch.arange(5) % 2 == 0)
    truth = getattr(reference, f"{name}_value_and_grad")(*(t.double() if t.is_floating_point() else t for t in args))
    return list(getattr(ops, f"{name}_value_and_grad")(*(t.to(DEVICE) for t in args), impl="triton")), list(truth)


def main() -> int:
    """Returns 1 where a result is wrong. Prints how many launches were right."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.triton_kernels.interpreter import mend

        mend()
    done = wrong = 0
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    heads = [case for case in CASES if case[0] < 1000 or not interpreted]  # it takes one program after the other
    for case in heads:
        torch.manual_seed(0)
        args = inputs(*case)
        each = torch.rand(case[3]) if case[6] == "weighted" else None
        wide = (t.double() if t.is_floating_point() else t for t in args)
        truth = specification(*wide, class_weight=None if each is None else each.double())
        try:
            each = None if each is None else each.to(DEVICE)
            got = operator(*(t.to(DEVICE) for t in args), class_weight=each, impl="triton")
        except BackendError as error:
            print(f"{case}: not run: {error}")
            continue
        done += 1
        bound = 1e-4 if case[4] == torch.float32 else 2e-2
        for name, g, t in zip(("loss", "correct", "grad_x", "grad_weight", "grad_bias"), got, truth, strict=True):
            g = g.double().cpu()
            if name != "correct" and not (g - t).norm() <= bound * t.norm():
                wrong += 1
                print(f"{case}: {name} is off by {(g - t).norm():.3g} of {t.norm():.3g}")
    for case in UPDATES:
        torch.manual_seed(0)
        try:
            got, truth = update(*case)
        except BackendError as error:
            print(f"{case}: not run: {error}")
            continue
        done += 1
        bound = 1e-5 if case[2] == torch.float32 else 2e-2
        for i, (g, t) in enumerate(zip(got, truth, strict=True)):
            g = g.double().cpu()
            if not (g - t).norm() <= bound * t.norm():
                wrong += 1
                print(f"{case}: tensor {i} is off by {(g - t).norm():.3g} of {t.norm():.3g}")
    for loss in LOSSES:
        torch.manual_seed(0)
        try:
            got, truth = losses(*loss)
        except BackendError as error:
            print(f"{loss}: not run: {error}")
            continue
        done += 1
        for i, (g, t) in enumerate(zip(got, truth, strict=True)):
            if not (g.double().cpu() - t).norm() <= (1e-4 if loss[1] == torch.float32 else 2e-2) * t.norm():
                wrong += 1
                print(f"{loss}: result {i} is off")
    torch.backends.cudnn.allow_tf32 = (
        False  # PyTorch's convolutions would be less exact than what they are compared with
    )
    total = len(heads) + len(UPDATES)
    for other in OTHERS:
        off = compared(other)
        if off is None:
            continue
        done, total = done + 1, total + 1
        if not off <= (1e-4 if other.dtype == torch.float32 else 6e-2):
            wrong += 1
            print(f"{other.name}: off by {off:.3g}")
    print(f"{done} of {total} calls on {DEVICE}, {wrong} wrong results")
    return int(wrong > 0 or done == 0)


if __name__ == "__main__":
    sys.exit(main())
