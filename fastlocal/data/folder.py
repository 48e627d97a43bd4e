"""Pictures in folders, ``ROOT/train/CLASS/*.jpg``: a data set that decodes lazily, and its batches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlocal.data import _pictures
from fastlocal.data._random import key, permutation
from fastlocal.data.batches import batch_sizes
from fastlocal.data.images import Images, images_of
from fastlocal.data.source import Source, check_start
from fastlocal.errors import ArgumentError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FolderImages(Dataset):
    """Pictures of one part of a folder, decoded by Pillow when they are asked for: (uint8 [C, size, size], label).

    Classes are the sorted names of the folders in ``root/train`` (``root/PART`` without one), as in torchvision's
    ImageFolder; a picture is any file below, whatever the depth, whose ending is one of Pillow's common formats.
    ``self[i]`` is picture i of epoch 0, ``self[e, i]`` of epoch e: with ``train`` a random resized crop, mirrored half of
    the time, that (seed, e, i) alone decide; without, the middle.

    Args:
        root: the folder.
        part: "train", "val" or "test": the folder in it.
        size: side of the square pictures that come out.
        train: augment; None does so for the part "train".
        resize: length of the shorter side before the middle is cut; None is ``size * 256 / 224``, rounded.
        scale: least and largest share of the picture that a random crop takes.
        flip: mirror half of the training pictures.
        channels: 3, or 1 for grey.
        seed: of the augmentation.

    Raises:
        ArgumentError: no such folder, a class without pictures, a class that ``root/train`` has not, a bad argument;
            when a picture is read: one that cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        part: str = "train",
        size: int = 224,
        train: bool | None = None,
        resize: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        channels: int = 3,
        seed: int = 0,
    ):
        _pictures.pillow()
        if channels not in (1, 3):
            raise ArgumentError(f"channels: got {channels!r}; give 3 (colour) or 1 (grey)")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"size: got {size!r}; give the side of the pictures in pixels, an integer from 1")
        self.resize = round(size * 256 / 224) if resize is None else resize
        if self.resize < size:
            raise ArgumentError(f"resize: got {resize!r}; give at least size={size}, what is cut from the middle")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ArgumentError(f"scale: got {scale!r}; give two shares of the picture, 0 < least <= largest <= 1")
        self.root, self.part, self.size = Path(root), part, size
        self.train = part == "train" if train is None else train
        self.scale, self.flip, self.channels, self.seed = scale, flip, channels, seed
        self.class_names, self.paths, self.labels = find_pictures(self.root, part)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = which if isinstance(which, tuple) else (0, which)
        image = _pictures.opened(self.paths[i], "RGB" if self.channels == 3 else "L")
        if self.train:
            draw = random.Random(key(self.seed, epoch, i))
            image = _pictures.random_resized(image, self.size, self.scale, draw)
            pixels = torch.from_numpy(_pictures.pixels(image))
            if self.flip and draw.random() < 0.5:
                pixels = pixels.flip(2)
        else:
            pixels = torch.from_numpy(_pictures.pixels(_pictures.centered(image, self.size, self.resize)))
        return pixels, self.labels[i]

    def batches(self, **options: Any) -> FolderBatches:
        """`FolderBatches` of this data set; see there for the options."""
        return FolderBatches(self, **options)

    def __repr__(self) -> str:
        return (
            f"FolderImages({self.root / self.part}: {len(self)} pictures of {self.num_classes} classes, as "
            f"{self.channels}x{self.size}x{self.size})"
        )


class FolderBatches(Source):
    """Batches of `FolderImages`: (float32 [B, C, size, size], normalised; int64 [B]), on ``device``.

    Order and augmentation are a function of (seed, epoch, picture), so an epoch starts anywhere without decoding what
    lies before. Pictures travel as uint8 and are normalised on the device. A last batch of one joins the one before it.

    Args:
        data: the pictures.
        batch_size: pictures a batch.
        workers: processes that decode; 0 decodes in this one.
        device: where batches go.
        shuffle: random order; None where ``data`` augments.
        seed: of the order (the augmentation's is the data set's).
        mean, std: per channel, of pixels in [0, 1]; None is ImageNet's, for 3 channels.
        worker_options: further arguments of ``torch.utils.data.DataLoader``, such as ``prefetch_factor``.

    Raises:
        ArgumentError: a number out of range, or a mean or std of another number of channels.
    """

    def __init__(
        self,
        data: FolderImages,
        *,
        batch_size: int = 128,
        workers: int = 0,
        device: torch.device | str = "cpu",
        shuffle: bool | None = None,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **worker_options: Any,
    ):
        for name, value, low in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ArgumentError(f"{name}: got {value!r}; give an integer from {low}")
        if data.channels == 3:
            mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        if mean is None or std is None or len(mean) != data.channels or len(std) != data.channels or min(std) <= 0:
            raise ArgumentError(f"mean, std: got {mean!r} and {std!r}; give {data.channels} numbers each, std above 0")
        self.data, self.batch_size, self.workers, self.seed = data, batch_size, workers, seed
        self.device = torch.device(device)
        self.shuffle = data.train if shuffle is None else shuffle
        self.mean, self.std = tuple(mean), tuple(std)
        spread = torch.tensor(self.std).view(1, -1, 1, 1)
        self._scale = (1 / (255 * spread)).to(self.device)
        self._shift = (-torch.tensor(self.mean).view(1, -1, 1, 1) / spread).to(self.device)
        self._sizes = batch_sizes(len(data), batch_size)
        self._options = worker_options

    def __len__(self) -> int:
        return len(self._sizes)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        check_start(start, len(self))
        return self._epoch(number, start)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "FolderBatches",
            "data": str(self.data.root / self.data.part),
            "samples": len(self.data),
            "shape": [self.data.channels, self.data.size, self.data.size],
            "classes": self.data.num_classes,
            "batch_size": self.batch_size,
            "batches": len(self),
            "augmented": self.data.train,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "data_seed": self.data.seed,
            "workers": self.workers,
        }

    def _epoch(self, number: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.data)
        order = permutation(self.seed, number, count).tolist() if self.shuffle else range(count)
        keys = [
            [(number, i) for i in order[index * self.batch_size : index * self.batch_size + self._sizes[index]]]
            for index in range(start, len(self))
        ]
        loader = DataLoader(
            self.data,
            batch_sampler=keys,  # type: ignore[arg-type]  # any iterable of lists of keys
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(key(self.seed, number)),  # else it would draw from the global one
            **self._options,
        )
        for x, y in loader:
            x = x.to(self.device, non_blocking=True).to(torch.float32)
            yield x.mul_(self._scale).add_(self._shift), y.to(self.device, non_blocking=True)


def find_pictures(root: Path, part: str) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, paths and labels of the pictures in ``root/part``, in torchvision's order."""
    folder = root / part
    classes = _classes(root / "train") if (root / "train").is_dir() else _classes(folder)
    found = _classes(folder)
    strange = sorted(set(found) - set(classes))
    if strange:
        raise ArgumentError(
            f"root: {folder} has the class {strange[0]!r}, which {root / 'train'} has not; make them equal"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if name not in found:
            continue
        of_class = [
            Path(at) / file
            for at, _, names in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(names)
            if file.lower().endswith(_pictures.ENDINGS)
        ]
        if not of_class:
            raise ArgumentError(
                f"root: {folder / name} has no picture ({', '.join(_pictures.ENDINGS)}); fill or remove the folder"
            )
        paths += of_class
        labels += [label] * len(of_class)
    return classes, paths, labels


def load_folder(root: Path, *, size: int | None, limit: int) -> Images:
    """The pictures of ``root/train`` and ``root/val`` (else ``root/test``) as `Images`; see `fastlocal.data.load`."""
    held = next((part for part in ("val", "test") if (root / part).is_dir()), None)
    if not (root / "train").is_dir() or held is None:
        raise ArgumentError(
            f"data: {str(root)!r} holds no set that is known, and not train/CLASS/ with val/CLASS/ or test/CLASS/ either; give "
            "the folder that holds them, or a .npz file"
        )
    pillow = _pictures.pillow()
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ArgumentError(f"size: got {size!r}; give the side of the pictures in pixels, an integer from 1")
    parts = {part: find_pictures(root, part) for part in ("train", held)}
    paths = [path for _, found, _ in parts.values() for path in found]
    shape, colour = (size, size), False
    for path in paths:  # headers only: nothing is decoded before it is known to fit
        try:
            with pillow.open(path) as image:
                width, height = image.size
                colour |= image.mode not in ("1", "L")
        except (OSError, SyntaxError, ValueError) as error:
            raise ArgumentError(f"data: cannot decode {path} ({error}); replace or remove the file") from error
        if size is None:
            if shape == (None, None):
                shape = (height, width)
            if shape != (height, width):
                raise ArgumentError(
                    f"size: {path} has {height}x{width} pixels, {paths[0]} has {shape[0]}x{shape[1]}; give size=, the side of the "
                    "square that is cut from each after resizing"
                )
        check_bytes(len(paths), shape, 3 if colour else 1, limit)
    arrays: list[Tensor] = []
    for _, found, labels in parts.values():
        x = torch.empty(len(found), 3 if colour else 1, *shape, dtype=torch.uint8)  # type: ignore[arg-type]
        for i, path in enumerate(found):
            picture = _pictures.opened(path, "RGB" if colour else "L")
            x[i] = torch.from_numpy(_pictures.pixels(picture if size is None else _pictures.centered(picture, size)))
        arrays += [x, torch.tensor(labels)]
    names = parts["train"][0]
    return images_of(tuple(arrays), root.resolve().name, len(names), names)


def check_bytes(count: int, shape: Any, channels: int, limit: int) -> None:
    """Raises ArgumentError where ``count`` pictures of [channels, *shape] bytes are more than ``limit``."""
    wanted = count * channels * shape[0] * shape[1]
    if wanted > limit:
        raise ArgumentError(
            f"limit: {count} pictures of {channels}x{shape[0]}x{shape[1]} take {wanted} bytes, more than limit={limit}; read them "
            "batch by batch with FolderImages (or a DataLoader and as_source), give a smaller size= or a larger limit="
        )


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise ArgumentError(f"root: there is no folder {folder}; pictures of class C belong in {folder / 'C'}")
    names = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not names:
        raise ArgumentError(f"root: {folder} holds no folder; pictures of class C belong in {folder / 'C'}")
    return names
