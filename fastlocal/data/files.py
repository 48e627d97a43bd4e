"""Image sets in the files that their makers publish: CIFAR, SVHN, STL-10, MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastlocal.data import _pickles
from fastlocal.errors import ArgumentError

Pixels = NDArray[np.uint8]  # [N, C, H, W]
Labels = NDArray[np.int64]  # [N]
Part = tuple[Pixels, Labels]
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Form:
    """One published form of a set: where its folder is, its files, and how a part is read from paths of such files.

    ``folders`` are tried below the given root; "" is the root itself. A file may be written as alternatives, "a|b".
    """

    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[list[Path]], Part]


@dataclass(frozen=True)
class Known:
    """A set: its classes, the home page to get it from, and its forms, the preferred one first."""

    class_names: tuple[str, ...]
    home: str
    forms: tuple[Form, ...]

    @property
    def classes(self) -> int:
        return len(self.class_names)


def read(name: str, root: Path) -> tuple[Pixels, Labels, Pixels, Labels]:
    """x_train, y_train, x_test, y_test of a set in ``SETS`` whose files lie in ``root`` or where they unpack below it.

    Raises:
        ArgumentError: files are missing, cut short, or not in their published format.
    """
    found = locate(name, root)
    if found is None:
        raise ArgumentError(f"root: the files of {name!r} are not all in {str(root)!r}. {sought(name)}")
    form, folder = found
    train = form.read([_file(folder, one) for one in form.train])  # type: ignore[misc]
    test = form.read([_file(folder, one) for one in form.test])  # type: ignore[misc]
    for (x, y), part in ((train, "training"), (test, "test")):
        if len(x) != len(y):
            raise ArgumentError(
                f"root: the {part} part of {name!r} in {folder} has {len(x)} images but {len(y)} labels; get its files again"
            )
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ArgumentError(
            f"root: training images of {name!r} in {folder} have shape {list(train[0].shape[1:])}, test images "
            f"{list(test[0].shape[1:])}; the two parts must be of one set"
        )
    return (*train, *test)


def locate(name: str, root: Path) -> tuple[Form, Path] | None:
    """The form in which a set is complete below ``root``, and its folder."""
    for form in SETS[name].forms:
        for folder in form.folders:
            at = root / folder
            if all(_file(at, one) for one in (*form.train, *form.test)):
                return form, at
    return None


def recognise(root: Path) -> str | None:
    """The name of the set whose files are below ``root``, or None. MNIST's and Fashion-MNIST's are told by folder only.

    Raises ArgumentError where there are several.
    """
    found = [name for name in SETS if locate(name, root) is not None]
    if {"mnist", "fashion_mnist"} <= set(found):
        # the very same files: take the folder's word, else "mnist" stands for both
        same = [locate(name, root)[1] for name in ("mnist", "fashion_mnist")]  # type: ignore[index]
        if same[0] == same[1]:
            found.remove("fashion_mnist")
    if len(found) > 1:
        names = ", ".join(map(repr, found))
        raise ArgumentError(f"data: {str(root)!r} holds the files of {names}; say which, load({found[0]!r}, root=...)")
    return found[0] if found else None


def sought(name: str) -> str:
    """A sentence that names the files of a set and where to get them."""
    forms = []
    for form in SETS[name].forms:
        listed = ", ".join(one.split("|")[0] for one in (*form.train, *form.test))
        folders = " or ".join(f"{folder}/" if folder else "the root itself" for folder in form.folders)
        forms.append(f"{listed} (in {folders})")
    return f"Looked for {'; or '.join(forms)}; or {name}.npz. They come from {SETS[name].home}."


# --- CIFAR -----------------------------------------------------------------------------------------------------------


def _cifar_binary(label_bytes: int) -> Callable[[list[Path]], Part]:
    """Records of ``label_bytes`` labels (the last one counts) and 3072 pixels: red, green, blue, row by row."""

    def parse(paths: list[Path]) -> Part:
        parts = []
        for path in paths:
            raw = np.frombuffer(_bytes(path), np.uint8)
            record = label_bytes + 3072
            if len(raw) == 0 or len(raw) % record:
                raise _broken(path, f"{len(raw)} bytes are no whole number of records of {record} bytes")
            parts.append(raw.reshape(-1, record))
        if len({len(part) for part in parts}) > 1:
            counts = ", ".join(f"{path.name} {len(part)}" for path, part in zip(paths, parts))
            raise _broken(paths[0].parent, f"its training files should hold equally many images, but: {counts}")
        records = np.concatenate(parts)
        pixels = np.ascontiguousarray(records[:, label_bytes:]).reshape(-1, 3, 32, 32)
        return pixels, records[:, label_bytes - 1].astype(np.int64)

    return parse


def _cifar_python(label_key: bytes) -> Callable[[list[Path]], Part]:
    """Pickles of {b"data": uint8 [N, 3072], label_key: list of N int}, read by an unpickler that builds nothing else."""

    def parse(paths: list[Path]) -> Part:
        pixels, labels = [], []
        for path in paths:
            found = _pickles.load(path)
            data = found.get(b"data") if type(found) is dict else None
            names = found.get(label_key) if type(found) is dict else None
            if type(data) is not np.ndarray or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
                raise _broken(path, "it has no b'data', uint8 [N, 3072]")
            if type(names) is not list or len(names) != len(data) or any(type(label) is not int for label in names):
                raise _broken(path, f"it has no {label_key!r}, a list of {len(data)} integers")
            pixels.append(data.reshape(-1, 3, 32, 32))
            labels += names
        return np.concatenate(pixels), np.array(labels, dtype=np.int64)

    return parse


# --- SVHN, STL-10, MNIST ---------------------------------------------------------------------------------------------


def _svhn(paths: list[Path]) -> Part:
    """A MATLAB file with X, uint8 [32, 32, 3, N], and y, [N, 1], where 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ArgumentError(
            "data: 'svhn' comes in MATLAB files, which are read by scipy, and it is not installed; pip install scipy"
        ) from error
    (path,) = paths
    try:
        found = loadmat(path)
    except Exception as error:  # scipy raises whatever its parser runs into
        raise _broken(path, f"scipy cannot read it as a MATLAB file ({error})") from error
    x, y = found.get("X"), found.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise _broken(path, "it has no X, uint8 [32, 32, 3, N]")
    if y is None or y.dtype.kind not in "iuf" or y.size != x.shape[3] or not 1 <= y.min() <= y.max() <= 10:
        raise _broken(path, f"it has no y with {x.shape[3]} labels from 1 to 10")
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y.reshape(-1).astype(np.int64) % 10


def _stl10(paths: list[Path]) -> Part:
    """3x96x96 bytes an image, every channel column by column; labels 1 to 10, a byte each."""
    raw, labels = (np.frombuffer(_bytes(path), np.uint8) for path in paths)
    if len(raw) == 0 or len(raw) % (3 * 96 * 96):
        raise _broken(paths[0], f"{len(raw)} bytes are no whole number of images of 3 x 96 x 96 bytes")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= 10:
        raise _broken(paths[1], f"its labels go from {labels.min()} to {labels.max()}, not from 1 to 10")
    return np.ascontiguousarray(raw.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)), labels.astype(np.int64) - 1


def _mnist(paths: list[Path]) -> Part:
    """idx files, plain or gzipped: big-endian magic number and sizes, then bytes."""
    return _idx(paths[0], 3)[:, None], _idx(paths[1], 1).astype(np.int64)


def _idx(path: Path, dimensions: int) -> Pixels:
    raw = _bytes(path)
    magic = 0x0800 + dimensions  # 0x08: unsigned bytes
    given = int.from_bytes(raw[:4], "big")
    head = 4 + 4 * dimensions
    if len(raw) < head or given != magic:
        raise _broken(path, f"its magic number is {given:#010x}, not {magic:#010x} (bytes in {dimensions} dimensions)")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, head, 4)]
    if len(raw) - head != math.prod(shape):
        raise _broken(path, f"it says {shape}, which is {math.prod(shape)} bytes, but {len(raw) - head} follow")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


# --- files -----------------------------------------------------------------------------------------------------------


def _file(folder: Path, names: str) -> Path | None:
    return next((folder / name for name in names.split("|") if (folder / name).is_file()), None)


def _bytes(path: Path) -> bytearray:
    # bytearray: arrays that view it are writable, as PyTorch wants them
    try:
        raw = path.read_bytes()
        return bytearray(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, EOFError, zlib.error) as error:
        raise _broken(path, f"it cannot be read ({error})") from error


def _broken(path: Path, why: str) -> ArgumentError:
    return ArgumentError(f"root: {path} is not what its name says: {why}; it may be cut short, get it again")


def _idx_names(part: str) -> tuple[str, ...]:
    names = [(f"{part}-images", "idx3-ubyte"), (f"{part}-labels", "idx1-ubyte")]
    return tuple("|".join(f"{a}{dash}{b}{gz}" for dash in "-." for gz in ("", ".gz")) for a, b in names)


def _mnist_form(*folders: str) -> tuple[Form, ...]:
    return (Form(("", *folders), _idx_names("train"), _idx_names("t10k"), _mnist),)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CIFAR100_NAMES = _words(
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

SETS: dict[str, Known] = {
    "cifar10": Known(
        _words("airplane automobile bird cat deer dog frog horse ship truck"),
        _CIFAR,
        (
            Form(
                ("cifar-10-batches-bin", ""),
                tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
                ("test_batch.bin",),
                _cifar_binary(1),
            ),
            Form(
                ("cifar-10-batches-py", ""),
                tuple(f"data_batch_{i}" for i in range(1, 6)),
                ("test_batch",),
                _cifar_python(b"labels"),
            ),
        ),
    ),
    "cifar100": Known(
        _CIFAR100_NAMES,
        _CIFAR,
        (
            Form(("cifar-100-binary", ""), ("train.bin",), ("test.bin",), _cifar_binary(2)),
            Form(("cifar-100-python", ""), ("train",), ("test",), _cifar_python(b"fine_labels")),
        ),
    ),
    "svhn": Known(
        DIGITS,
        "http://ufldl.stanford.edu/housenumbers",
        (Form(("", "SVHN", "svhn"), ("train_32x32.mat",), ("test_32x32.mat",), _svhn),),
    ),
    "stl10": Known(
        _words("airplane bird car cat deer dog horse monkey ship truck"),
        "https://cs.stanford.edu/~acoates/stl10",
        (Form(("stl10_binary", ""), ("train_X.bin", "train_y.bin"), ("test_X.bin", "test_y.bin"), _stl10),),
    ),
    "mnist": Known(DIGITS, "http://yann.lecun.com/exdb/mnist", _mnist_form("MNIST/raw", "mnist")),
    "fashion_mnist": Known(
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        "https://github.com/zalandoresearch/fashion-mnist",
        _mnist_form("FashionMNIST/raw", "fashion_mnist", "fashion-mnist"),
    ),
}
