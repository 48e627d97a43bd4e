"""`Images`: a labelled image set in memory; `load`: one by name or path."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlocal.data import files
from fastlocal.data._random import generator
from fastlocal.errors import ArgumentError, did_you_mean

KEYS = ("x_train", "y_train", "x_test", "y_test")
LIMIT = 2 * 2**30  # bytes of pixels that are read into memory unasked
CHANNELS = (1, 3)


@dataclass(frozen=True)
class Images:
    """A training and a test set of images.

    Attributes:
        x_train, x_test: uint8 [N, C, H, W].
        y_train, y_test: int64 [N], 0 to num_classes - 1.
        num_classes: number of classes.
        mean, std: float32 [C], of the training pixels divided by 255; a constant channel has std 1.
        name: such as "digits" or "cifar10", or the file's name without its ending.
        class_names: one per class, or None where the files name none.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    name: str
    class_names: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Images:
        """The same set on another device: small sets belong where the model is."""
        moved = {key: getattr(self, key).to(device) for key in (*KEYS, "mean", "std")}
        return replace(self, **moved)

    def subset(self, n: int | float, seed: int | None = None) -> Images:
        """The same set with fewer training images; test part, mean and std stay those of the whole set.

        Args:
            n: images of each class (an int from 1; a class that has fewer keeps all), or the fraction of each class (a
                float above 0, up to 1; at least one image stays).
            seed: None takes the first of each class, in the set's order; an int draws them. The order stays the set's.

        Raises:
            ArgumentError: ``n`` out of range.
        """
        whole = isinstance(n, int) and not isinstance(n, bool)
        if not (n >= 1 if whole else isinstance(n, float) and 0 < n <= 1):
            raise ArgumentError(
                f"n: got {n!r}; give images per class (an integer from 1) or a fraction (0.0 < n <= 1.0)"
            )
        labels = self.y_train.cpu()
        keep = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(self.num_classes):
            members = (labels == label).nonzero().flatten()
            if seed is not None:
                members = members[torch.randperm(len(members), generator=generator(seed, label))]
            keep[members[: int(n) if whole else max(1, round(n * len(members)))]] = True
        rows = keep.nonzero().flatten().to(self.y_train.device)
        return replace(self, x_train=self.x_train[rows], y_train=self.y_train[rows])

    def __repr__(self) -> str:
        channels, height, width = self.shape
        return (
            f"Images({self.name}: {len(self.x_train)} training and {len(self.x_test)} test images of "
            f"{channels}x{height}x{width}, {self.num_classes} classes)"
        )


def load(
    data: str | Path,
    root: str | Path | None = None,
    *,
    seed: int = 0,
    size: int | None = None,
    limit: int = LIMIT,
) -> Images:
    """An image set by name or path. Nothing is downloaded.

    - ``load("digits")``: the 1,797 handwritten digits that scikit-learn brings, real scans of 8x8 pixels and 17 grey
      levels, as they are (no resizing: a CIFAR ResNet halves 8x8 maps twice and still learns them). A fifth of each
      class is the test set.
    - ``load("cifar10", root)``, also "cifar100", "svhn", "stl10", "mnist" and "fashion_mnist": the files that their
      makers publish, in ``root`` or where they unpack below it, or ``root/NAME.npz``.
    - ``load("PATH.npz")``: arrays x_train, y_train, x_test, y_test. Images are uint8, [N, H, W], [N, H, W, C] or
      [N, C, H, W] with 1 or 3 channels; labels are integers [N] from 0 to C - 1, each present in y_train.
    - ``load("FOLDER")``: one of the sets above, where its files tell which (MNIST's and Fashion-MNIST's do not: such a
      set is named after the folder); or pictures in ``train/CLASS/`` and ``val/CLASS/`` (else ``test/CLASS/``), see
      `FolderImages` for those that do not fit in memory.

    Args:
        data: name or path.
        root: folder of a named set.
        seed: of the digits' split.
        size: pictures in folders are resized so that their shorter side has ``size`` pixels, and the middle
            ``size`` x ``size`` are taken. None: they must be of one size.
        limit: bytes that pictures in folders may take as pixels.

    Raises:
        ArgumentError: no such set or file, a missing package, a missing key, a wrong shape, dtype or label, a file that is
            not in its published format.
    """
    name = str(data)
    if root is not None:
        if name not in files.SETS:
            near = did_you_mean(name, files.SETS)
            raise ArgumentError(f"data: with root= a set is loaded by name, and {name!r} is none. {near}")
        path = Path(root)
        archive = path if path.suffix == ".npz" else path / f"{name}.npz"
        if archive.is_file() and files.locate(name, path) is None:
            return _known(_arrays(_read(archive), archive), name)
        return _known(files.read(name, path), name)
    if name == "digits":
        return _digits(seed)
    path = Path(data)
    if path.suffix == ".npz":
        return _images(*_arrays(_read(path), path), path.stem)
    if path.is_dir():
        found = files.recognise(path)
        if found is not None:
            images = _known(files.read(found, path), found)
            if found == "mnist" and files.locate("fashion_mnist", path) is not None:
                return replace(images, name=path.resolve().name, class_names=None)  # the same files: who knows?
            return images
        from fastlocal.data.folder import load_folder

        return load_folder(path, size=size, limit=limit)
    if name in files.SETS:
        raise ArgumentError(
            f"root: {name!r} needs the folder of its files; load({name!r}, root=...). {files.sought(name)}"
        )
    near = did_you_mean(name, ["digits", *files.SETS])
    raise ArgumentError(f"data: got {name!r}, which is no set that is known, no .npz file and no folder. {near}")


def images_of(
    arrays: tuple[Tensor, ...], name: str, classes: int, class_names: tuple[str, ...] | None = None
) -> Images:
    """`Images` of (x_train, y_train, x_test, y_test) whose classes are known. Raises ArgumentError for labels beyond."""
    for key, labels in (("training", arrays[1]), ("test", arrays[3])):
        if len(labels) == 0:
            raise ArgumentError(f"data: the {key} part of {name} is empty; give at least one image")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise ArgumentError(
                f"data: labels of the {key} part of {name} go from {low} to {high}; its {classes} classes are 0 to {classes - 1}"
            )
    x_train, y_train, x_test, y_test = arrays
    return _images(x_train, y_train, x_test, y_test, name, classes, class_names)


def _known(arrays: tuple[Any, Any, Any, Any], name: str) -> Images:
    tensors = tuple(x if isinstance(x, Tensor) else torch.from_numpy(x) for x in arrays)
    return images_of(tensors, name, files.SETS[name].classes, files.SETS[name].class_names)


def _digits(seed: int) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ArgumentError(
            "data: 'digits' comes with scikit-learn, which is not installed; pip install 'fastlocal[demo]', or give the "
            "path of a .npz file"
        ) from error
    found = load_digits()
    # 17 grey levels, 0 to 16, spread over uint8
    images = torch.from_numpy(np.rint(found.images * (255 / 16)).astype(np.uint8))[:, None].contiguous()
    labels = torch.from_numpy(found.target.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        test[members[torch.randperm(len(members), generator=generator)[: round(len(members) / 5)]]] = True
    return _images(images[~test], labels[~test], images[test], labels[test], "digits")


def _images(
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    name: str,
    classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Images:
    count = x_train.numel() / x_train.shape[1]
    levels = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in x_train.unbind(1)]).double()
    grey = torch.arange(256, dtype=torch.float64) / 255
    mean = (levels @ grey) / count
    std = ((levels @ grey.square()) / count - mean.square()).clamp(min=0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    classes = int(y_train.max()) + 1 if classes is None else classes
    return Images(x_train, y_train, x_test, y_test, classes, mean.float(), std.float(), name, class_names)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        raise ArgumentError(f"data: there is no file {str(path)!r}; give the path of a .npz file, or 'digits'")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive]
            if missing:
                raise ArgumentError(
                    f"data: {path} has no {', '.join(missing)} (it has {', '.join(archive.files) or 'nothing'}); save it with "
                    "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
                )
            return {key: archive[key] for key in KEYS}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"data: cannot read {path} ({error}); it must be a whole file of plain arrays, as numpy.savez writes it"
        ) from error


def _arrays(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_train, x_test = (_pixels(key, arrays[key]) for key in ("x_train", "x_test"))
    y_train, y_test = (_labels(key, arrays[key]) for key in ("y_train", "y_test"))
    for x_key, x, y_key, y in (("x_train", x_train, "y_train", y_train), ("x_test", x_test, "y_test", y_test)):
        if len(x) != len(y):
            raise ArgumentError(
                f"data: {x_key} holds {len(x)} images but {y_key} {len(y)} labels; give one label an image"
            )
        if len(x) == 0:
            raise ArgumentError(f"data: {x_key} is empty; give at least one image")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ArgumentError(
            f"data: images of x_train are {_size(x_train)}, of x_test {_size(x_test)} (channels x height x width); "
            "make them equal"
        )
    classes = int(y_train.max()) + 1
    if int(y_train.min()) < 0 or int(y_test.min()) < 0:
        raise ArgumentError("data: there are negative labels; number the classes from 0")
    absent = sorted(set(range(min(classes, len(y_train) + 1))) - set(y_train.tolist()))
    if absent:
        shown = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ArgumentError(
            f"data: labels go up to {classes - 1} but y_train has no sample of class {shown}; number the classes 0 to C - 1"
        )
    if int(y_test.max()) >= classes:
        raise ArgumentError(
            f"data: y_test has label {int(y_test.max())}, y_train only 0 to {classes - 1}; train on every class that is tested"
        )
    return x_train, y_train, x_test, y_test


def _pixels(key: str, array: np.ndarray[Any, Any]) -> Tensor:
    """uint8 [N, C, H, W], contiguous."""
    if array.dtype != np.uint8:
        raise ArgumentError(
            f"data: {key} is {array.dtype}; give uint8 pixels, 0 to 255 (normalisation is done in the batch)"
        )
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        first, last = array.shape[1] in CHANNELS, array.shape[3] in CHANNELS
        if first == last:
            why = "either could be the channels" if first else "neither could be the channels"
            raise ArgumentError(
                f"data: {key} has shape {list(array.shape)}, where {why}; give [N, H, W, C] or [N, C, H, W] with C = 1 or 3"
            )
        if last:
            array = array.transpose(0, 3, 1, 2)
    else:
        raise ArgumentError(f"data: {key} has shape {list(array.shape)}; give [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if 0 in array.shape[1:]:
        raise ArgumentError(f"data: {key} has shape {list(array.shape)}, so its images have no pixels")
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(key: str, array: np.ndarray[Any, Any]) -> Tensor:
    if array.ndim != 1:
        raise ArgumentError(f"data: {key} has shape {list(array.shape)}; give one integer an image, [N]")
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"data: {key} is {array.dtype}; give integers, the classes from 0")
    return torch.from_numpy(array.astype(np.int64))


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape[1:]))
