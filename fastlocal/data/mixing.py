"""`Mixing`: mixup, CutMix and label smoothing of a batch, on its device."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastlocal.data._random import key
from fastlocal.errors import ArgumentError


@dataclass(frozen=True)
class Mixing:
    """Mixes every sample of a batch with its partner, and labels likewise.

    One lambda a batch, drawn from Beta(a, a); the partner of sample i is sample B - 1 - i, as in timm's batch mode (the
    order of a batch is random already, and nothing needs to be copied to the device). Everything random is a function
    of (seed, epoch, index), drawn on the host: the device is never waited for.

    Args:
        mixup: a of mixup, ``x = lambda x_i + (1 - lambda) x_j`` (Zhang et al., ICLR 2018, arXiv 1710.09412); 0 is off.
        cutmix: a of CutMix: a box of the partner's pixels, around a random pixel and cut off at the border, with sides
            sqrt(1 - lambda) of the image's; lambda is then what is left of the image's area (Yun et al., ICCV 2019,
            arXiv 1905.04899); 0 is off. With both on, each batch takes either with probability 1/2.
        prob: probability that a batch is mixed at all.
        smoothing: label smoothing s, ``(1 - s) p + s / C`` as in ``torch.nn.functional.cross_entropy``; every batch.
        seed: of the random numbers.

    Raises:
        ArgumentError: a number out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, high in (("mixup", None), ("cutmix", None), ("prob", 1), ("smoothing", 1)):
            value = getattr(self, name)
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if not good or (high is not None and value > high):
                raise ArgumentError(f"{name}: got {value!r}; give a number from 0" + (f" to {high}" if high else ""))

    def __call__(self, x: Tensor, y: Tensor, num_classes: int, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """The mixed batch; the given one stays as it is.

        Args:
            x: floating point [B, ...]; for CutMix [B, C, H, W].
            y: class indices, int64 [B], or probabilities [B, C].
            num_classes: C.
            epoch, index: which batch of which epoch this is.

        Returns:
            x of the same shape and dtype, and probabilities [B, C] (float32; float64 where x is).

        Raises:
            ArgumentError: a shape or dtype that does not fit, or (on the CPU) a label outside 0 to C - 1.
        """
        self._check(x, y, num_classes)
        target = self._probabilities(y, num_classes, torch.float64 if x.dtype == torch.float64 else torch.float32)
        draw = random.Random(key(self.seed, epoch, index))
        # All are drawn whatever is on, so that one setting does not change the numbers of another.
        mixed, cut = draw.random() < self.prob, draw.random() < 0.5
        down, across = draw.random(), draw.random()
        if not mixed or not (self.mixup or self.cutmix):
            return x, target
        if self.cutmix and (cut or not self.mixup):
            lam = draw.betavariate(self.cutmix, self.cutmix)
            height, width = x.shape[2:]
            top, bottom = _span(down, height, math.sqrt(1 - lam))
            left, right = _span(across, width, math.sqrt(1 - lam))
            x, partner = x.clone(), x
            x[:, :, top:bottom, left:right] = partner.flip(0)[:, :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            lam = draw.betavariate(self.mixup, self.mixup)
            x = x.mul(lam).add_(x.flip(0), alpha=1 - lam)
        return x, target.mul(lam).add_(target.flip(0), alpha=1 - lam)

    def describe(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return asdict(self)

    def _probabilities(self, y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
        rest = self.smoothing / classes
        if y.is_floating_point():
            return y.to(dtype).mul(1 - self.smoothing).add_(rest)
        target = torch.full((len(y), classes), rest, dtype=dtype, device=y.device)
        return target.scatter_(1, y.long().unsqueeze(1), 1 - self.smoothing + rest)

    def _check(self, x: Tensor, y: Tensor, classes: int) -> None:
        if not x.is_floating_point():
            raise ArgumentError(f"x: is {x.dtype}; give normalised floating-point inputs (token ids cannot be mixed)")
        if self.cutmix and x.dim() != 4:
            raise ArgumentError(f"x: CutMix cuts images [B, C, H, W], got shape {list(x.shape)}; use mixup alone")
        wanted = [len(x), classes] if y.is_floating_point() else [len(x)]
        if list(y.shape) != wanted:
            raise ArgumentError(
                f"y: got {y.dtype} of shape {list(y.shape)} for {len(x)} inputs and {classes} classes; give one class index a "
                "sample, [B], or probabilities [B, C]"
            )
        if (
            not y.is_floating_point()
            and y.device.type == "cpu"
            and len(y)
            and not 0 <= int(y.min()) <= int(y.max()) < classes
        ):
            raise ArgumentError(
                f"y: labels go from {int(y.min())} to {int(y.max())}, but num_classes is {classes}; give 0 to {classes - 1}"
            )


def _span(draw: float, size: int, share: float) -> tuple[int, int]:
    """First and last + 1 of ``share * size`` pixels around a random one, cut off at the border."""
    center, half = int(draw * size), int(size * share) // 2
    return max(center - half, 0), min(center + half, size)
