"""`Batches`: normalised batches of an image set in memory, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlocal.data.images import Images
from fastlocal.errors import ArgumentError


class Batches:
    """Iterates over one part of an image set: (float32 [B, C, H, W], normalised; int64 [B]), on the set's device.

    Every sample appears once an epoch. A last batch of one sample joins the one before it, because BatchNorm can do
    nothing with one. Iterating goes on to the next epoch each time; ``epoch(e)`` gives the batches of epoch e.

    Args:
        images: the set.
        train: its training part, in random order; else its test part, in order.
        batch_size: samples a batch, at least 1.
        seed: with the number of the epoch it decides order, crops and flips.
        crop: pixels of reflected border from which a random window of the old size is cut; 0 is off.
        flip: mirror every second image at random.

    Raises:
        ArgumentError: a size below its minimum, or a crop as large as the image.
    """

    def __init__(
        self,
        images: Images,
        *,
        train: bool = True,
        batch_size: int = 128,
        seed: int = 0,
        crop: int = 0,
        flip: bool = False,
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size: got {batch_size!r}; give an integer from 1")
        if not 0 <= crop < min(images.shape[1:]):
            raise ArgumentError(
                f"crop: got {crop!r}; give 0 (off) up to {min(images.shape[1:]) - 1}, less than the image's size"
            )
        self.x, self.y = (images.x_train, images.y_train) if train else (images.x_test, images.y_test)
        self.train, self.batch_size, self.seed, self.crop, self.flip = train, batch_size, seed, crop, flip
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = (1 / (255 * images.std)).view(1, -1, 1, 1)
        self._shift = (-images.mean / images.std).view(1, -1, 1, 1)
        self._next = 0

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = self._next
        self._next += 1
        return self.epoch(number)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number``, the same at every call."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        order: Tensor | None = None
        if self.train:
            order = torch.randperm(len(self.y), generator=generator).to(self.y.device)
        at = 0
        for size in self._sizes():
            rows = slice(at, at + size) if order is None else order[at : at + size]
            at += size
            x = self.x[rows].to(torch.float32).mul_(self._scale).add_(self._shift)
            if self.crop:
                x = self._cropped(x, generator)
            if self.flip:
                mirrored = (torch.rand(size, generator=generator) < 0.5).to(x.device)
                x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
            yield x, self.y[rows]

    def _cropped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = x.shape
        corners = torch.randint(2 * self.crop + 1, (2, count, 1), generator=generator).to(x.device)
        rows = corners[0] + torch.arange(height, device=x.device)
        columns = corners[1] + torch.arange(width, device=x.device)
        padded = F.pad(x, (self.crop,) * 4, mode="reflect")
        image = torch.arange(count, device=x.device).view(-1, 1, 1)
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def _sizes(self) -> list[int]:
        whole, rest = divmod(len(self.y), self.batch_size)
        sizes = [self.batch_size] * whole + [rest] * (rest > 0)
        if self.batch_size > 1 and len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes
