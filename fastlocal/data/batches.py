"""`Batches`: normalised batches of an image set in memory, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fastlocal.data._random import generator, permutation, upload
from fastlocal.data.images import Images
from fastlocal.data.source import Source, check_start
from fastlocal.errors import ArgumentError


class Batches(Source):
    """Iterates over one part of an image set: (float32 [B, C, H, W], normalised; int64 [B]), on the set's device.

    Every sample appears once an epoch. A last batch of one sample joins the one before it, because BatchNorm can do
    nothing with one. Iterating goes on to the next epoch each time; ``epoch(e)`` gives the batches of epoch e. The order
    is a function of (seed, epoch), a batch's crops, flips and cutouts one of (seed, epoch, index of the batch): an epoch
    can start anywhere, at no cost. The set stays uint8 where it is, and on a CUDA device the host waits for nothing.

    Args:
        images: the set.
        train: its training part, in random order; else its test part, in order.
        batch_size: samples a batch, at least 1.
        seed: with the number of the epoch it decides order, crops and flips.
        crop: pixels of border from which a random window of the old size is cut; 0 is off.
        border: ``"reflect"`` the image there, or leave it ``"black"`` (pixels of 0 before normalisation).
        flip: mirror every second image at random.
        cutout: side of a square of mean colour (0 after normalisation) around a random pixel of each image, cut off at
            the image's border (DeVries and Taylor, arXiv 1708.04552); 0 is off.

    Raises:
        ArgumentError: a size below its minimum, a crop as large as the image, or a cutout larger than twice the image.
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
        cutout: int = 0,
        border: Literal["reflect", "black"] = "reflect",
    ):
        smallest = min(images.shape[1:])
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(f"batch_size: got {batch_size!r}; give an integer from 1")
        if isinstance(crop, bool) or not isinstance(crop, int) or not 0 <= crop < smallest:
            raise ArgumentError(f"crop: got {crop!r}; give 0 (off) up to {smallest - 1}, less than the image's size")
        if isinstance(cutout, bool) or not isinstance(cutout, int) or not 0 <= cutout <= 2 * max(images.shape[1:]):
            raise ArgumentError(
                f"cutout: got {cutout!r}; give 0 (off) up to {2 * max(images.shape[1:])}, the side of the square in pixels"
            )
        self.x, self.y = (images.x_train, images.y_train) if train else (images.x_test, images.y_test)
        self.train, self.batch_size, self.seed = train, batch_size, seed
        if border not in ("reflect", "black"):
            raise ArgumentError(f"border: got {border!r}; valid are 'reflect', 'black'")
        self.crop, self.flip, self.cutout, self.border = crop, flip, cutout, border
        self.images = images
        # (x / 255 - mean) / std as one multiplication and one addition
        self._scale = (1 / (255 * images.std)).view(1, -1, 1, 1)
        self._shift = (-images.mean / images.std).view(1, -1, 1, 1)
        self._sizes = batch_sizes(len(self.y), batch_size)
        self._next = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        number = self._next
        self._next += 1
        return self.epoch(number)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch ``number`` from index ``start`` on, the same at every call."""
        check_start(start, len(self))
        return self._epoch(number, start)

    def batch(self, number: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of epoch ``number``, bitwise the one that ``epoch(number)`` gives.

        It draws the epoch's whole order, which for millions of samples takes milliseconds; ``epoch`` draws it once.
        """
        if not 0 <= index < len(self):
            raise ArgumentError(f"index: got {index!r}; give 0 up to {len(self) - 1}, a batch of the epoch")
        return next(self._epoch(number, index))

    def describe(self) -> dict[str, Any]:
        """What decides the batches, as plain values."""
        return {
            "kind": "Batches",
            "data": self.images.name,
            "part": "train" if self.train else "test",
            "samples": len(self.y),
            "shape": list(self.images.shape),
            "classes": self.images.num_classes,
            "batch_size": self.batch_size,
            "batches": len(self),
            "seed": self.seed,
            "crop": self.crop,
            "border": self.border,
            "flip": self.flip,
            "cutout": self.cutout,
        }

    def _epoch(self, number: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order: Tensor | None = None
        if self.train:
            order = upload(permutation(self.seed, number, len(self.y)), self.x.device)
        for index in range(start, len(self)):
            at = index * self.batch_size
            span = slice(at, at + self._sizes[index])
            rows = span if order is None else order[span]
            yield self._augmented(rows, self._sizes[index], number, index), self.y[rows]

    def _augmented(self, rows: slice | Tensor, size: int, number: int, index: int) -> Tensor:
        if not (self.crop or self.flip or self.cutout):
            return self._normalised(self.x[rows])
        height, width = self.images.shape[1:]
        # One draw and one copy a batch, of which each augmentation reads its own rows: none changes another's numbers.
        draws = upload(torch.rand(5, size, 1, generator=generator(self.seed, number, index)), self.x.device)
        if not self.crop:
            x = self.x[rows]
            if self.flip:
                x = torch.where((draws[2] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
        else:
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=self.x.device)
            i = _window(draws[0], height, self.crop)
            j = _window(draws[1], width, self.crop)
            if self.flip:
                j = torch.where(draws[2] < 0.5, j.flip(1), j)
            at = _reflected(i, height)[:, :, None], _reflected(j, width)[:, None, :]
            x = self.x[rows.view(-1, 1, 1), :, *at].permute(0, 3, 1, 2)
            if self.border == "black":
                within = _within(i, height)[:, :, None] & _within(j, width)[:, None, :]
                x = x.masked_fill(~within.unsqueeze(1), 0)
        x = self._normalised(x)
        if self.cutout:
            inside = _span(draws[3], height, self.cutout)[:, :, None] & _span(draws[4], width, self.cutout)[:, None, :]
            x.masked_fill_(inside.unsqueeze(1), 0.0)
        return x

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        return x.mul_(self._scale).add_(self._shift)


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Sizes of the batches of ``count`` samples: a last one of a single sample joins the one before it."""
    whole, rest = divmod(count, batch_size)
    sizes = [batch_size] * whole + [rest] * (rest > 0)
    if batch_size > 1 and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [sizes[-2] + 1]
    return sizes


def _window(draw: Tensor, size: int, border: int) -> Tensor:
    """[B, size] source positions of a random window, from -border to size + border - 1; ``draw`` [B, 1] in [0, 1)."""
    return (draw * (2 * border + 1)).long() + torch.arange(-border, size - border, device=draw.device)


def _reflected(at: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - at.abs()).abs()


def _within(at: Tensor, size: int) -> Tensor:
    return (at >= 0) & (at < size)


def _span(draw: Tensor, size: int, length: int) -> Tensor:
    """[B, size], True on ``length`` pixels around a random one."""
    first = (draw * size).long() - length // 2
    at = torch.arange(size, device=draw.device)
    return (at >= first) & (at < first + length)
