"""`from_huggingface`: image classification sets of Hugging Face's ``datasets`` that fit in memory, as `Images`."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlocal.data import _pictures
from fastlocal.data.folder import check_bytes
from fastlocal.data.images import LIMIT, Images, images_of
from fastlocal.errors import ArgumentError

TEST_PARTS = ("test", "validation", "val", "valid")


def from_huggingface(
    data: Mapping[str, Any],
    *,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = None,
    size: int | None = None,
    limit: int = LIMIT,
) -> Images:
    """`Images` of a ``DatasetDict`` (or a dict of data sets) whose rows hold a picture and a class index.

    Larger sets, and those of anything else, go through a loader: ``as_source(DataLoader(ds.with_format("torch"), ...))``.

    Args:
        data: parts by name; ``ds.train_test_split(0.1)`` makes two of one. A part has a length and rows that are dicts.
        image: column of the pictures: Pillow images, or uint8 arrays [H, W], [H, W, C] or [C, H, W]. None: the only
            column of feature type Image.
        label: column of the class indices. None: the only column of feature type ClassLabel.
        train, test: names of the parts; None is the first of "test", "validation", "val" and "valid" that is there.
        size: the shorter side is resized to this, and the middle square taken; None: all pictures must be of one size.
        limit: bytes that the pixels may take.

    Raises:
        ArgumentError: no such part or column, a streaming data set, pictures of unequal size, labels out of range.
    """
    if not isinstance(data, Mapping):
        raise ArgumentError(
            f"data: got {type(data).__name__}; give a DatasetDict with a training and a test part "
            "(dataset.train_test_split(0.1) makes one)"
        )
    if test is None:
        test = next((name for name in TEST_PARTS if name in data), None)
    parts = []
    for argument, name in (("train", train), ("test", test)):
        if name is None or name not in data:
            raise ArgumentError(
                f"{argument}: got {name!r}; the parts are {', '.join(map(repr, data))}; name one of them"
            )
        parts.append(data[name])
    for part in parts:
        if not isinstance(part, Sized) or not hasattr(part, "__getitem__"):
            raise ArgumentError(
                f"data: {type(part).__name__} does not know its length, as streaming data sets; use a DataLoader and as_source"
            )
    features = getattr(parts[0], "features", None) or {}
    image = image or _only(features, "Image", "image")
    label = label or _only(features, "ClassLabel", "label")
    arrays: list[Tensor] = []
    channels = 1
    count = sum(map(len, parts))
    found = [_read(part, image, label, size, count, limit) for part in parts]
    shapes = {x.shape[1:] for pictures, _ in found for x in pictures}
    if len(shapes) > 1:
        shown = " and ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:2])
        raise ArgumentError(
            f"size: there are pictures of {shown} pixels; give size=, the side of the square to cut from each"
        )
    channels = max((len(x) for pictures, _ in found for x in pictures), default=1)
    for pictures, labels in found:
        if not pictures:
            raise ArgumentError("data: a part is empty; give at least one picture")
        # a grey picture among coloured ones is one whose channels are equal
        arrays.append(torch.from_numpy(np.stack([np.broadcast_to(x, (channels, *x.shape[1:])) for x in pictures])))
        arrays.append(torch.tensor(labels))
    names = getattr(features.get(label), "names", None)
    classes = max(int(arrays[1].max()), int(arrays[3].max())) + 1 if names is None else len(names)
    return images_of(tuple(arrays), _name(parts[0]), classes, None if names is None else tuple(names))


def _read(
    part: Any, image: str, label: str, size: int | None, count: int, limit: int
) -> tuple[list[NDArray[np.uint8]], list[int]]:
    if callable(getattr(part, "with_format", None)):
        part = part.with_format(None)  # pictures as they are, whatever form the user gets them in
    pictures: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for i in range(len(part)):
        row = part[i]
        for column in (image, label):
            if column not in row:
                raise ArgumentError(
                    f"image, label: row {i} has no {column!r}; its columns are {', '.join(map(repr, row))}"
                )
        pictures.append(_pixels(row[image], size, image))
        if i == 0:
            check_bytes(count, pictures[0].shape[1:], len(pictures[0]), limit)
        value = row[label]
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ArgumentError(f"label: row {i} has {value!r} in {label!r}; give a column of class indices")
        labels.append(int(value))
    return pictures, labels


def _pixels(picture: Any, size: int | None, column: str) -> NDArray[np.uint8]:
    """uint8 [C, H, W] with 1 or 3 channels."""
    if not hasattr(picture, "convert"):
        array = np.asarray(picture)
        grey = array.ndim == 2
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.transpose(1, 2, 0)
        if not (grey or (array.ndim == 3 and array.shape[2] in (1, 3))) or array.dtype not in (np.uint8, np.int64):
            raise ArgumentError(
                f"image: {column!r} holds {type(picture).__name__} of {array.dtype}, shape {list(array.shape)}; give pictures, or uint8 "
                "arrays [H, W], [H, W, C] or [C, H, W] with 1 or 3 channels"
            )
        if array.dtype == np.int64 and (array.min() < 0 or array.max() > 255):  # lists of integers
            raise ArgumentError(f"image: {column!r} holds numbers beyond 0 to 255; give uint8 pixels")
        array = array.astype(np.uint8)
        if size is None:
            return array[None] if grey else np.ascontiguousarray(array.transpose(2, 0, 1))
        picture = _pictures.pillow().fromarray(array if grey else array[:, :, 0] if array.shape[2] == 1 else array)
    picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    return _pictures.pixels(picture if size is None else _pictures.centered(picture, size))


def _only(features: Mapping[str, Any], kind: str, argument: str) -> str:
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(found) != 1:
        columns = ", ".join(map(repr, features)) or "unknown"
        which = f"the columns {', '.join(map(repr, found))} are" if found else "no column is"
        raise ArgumentError(f"{argument}: {which} of type {kind}; name the one to use (columns: {columns})")
    return found[0]


def _name(part: Any) -> str:
    name = getattr(getattr(part, "info", None), "dataset_name", None)
    return name if isinstance(name, str) and name else "huggingface"
