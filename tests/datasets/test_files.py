"""Tiny files, byte for byte in the published formats."""

import gzip
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlocal.data import load
from fastlocal.errors import ArgumentError


def drawn(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def cifar10_binary(root: Path, per_file: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Five training files; returns what they hold."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    x, y = drawn(5 * per_file + 3, 3, 32, 32), (np.arange(5 * per_file + 3) * 7) % 10
    records = [bytes([label]) + image.tobytes() for image, label in zip(x, y)]
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(b"".join(records[i * per_file : (i + 1) * per_file]))
    (folder / "test_batch.bin").write_bytes(b"".join(records[5 * per_file :]))
    return x, y


class Numpy1(pickle._Pickler):
    """As Python 2 with NumPy 1 wrote CIFAR's files: protocol 2, byte strings as such, numpy.core."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + len(value).to_bytes(4, "little") + value
        )

    def save_array(self, value):
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.write(b"(cnumpy\nndarray\n(K\x00tU\x01btR")
        self.write(b"(K\x01")
        self.save(tuple(value.shape))
        self.write(b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        self.save(value.tobytes())
        self.write(b"tb")

    dispatch[bytes] = save_bytes
    dispatch[np.ndarray] = save_array


def python2(path: Path, content: object) -> None:
    with open(path, "wb") as file:
        Numpy1(file, 2).dump(content)


def cifar10_python(root: Path, writer=python2) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    x, y = drawn(12, 3, 32, 32), (np.arange(12) * 7) % 10
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        rows = slice(2 * i, 2 * i + 2)
        content = {
            b"batch_label": b"training batch %d of 5" % i,
            b"labels": y[rows].tolist(),
            b"data": x[rows].reshape(2, 3072),
            b"filenames": [b"leptodactylus_s_%06d.png" % j for j in range(2)],
        }
        writer(folder / name, content)
    return x, y


def check(images, x, y, train: int) -> None:
    for part, rows in (("train", slice(None, train)), ("test", slice(train, None))):
        got_x, got_y = getattr(images, f"x_{part}"), getattr(images, f"y_{part}")
        assert got_x.dtype == torch.uint8 and got_y.dtype == torch.int64 and got_x.is_contiguous()
        assert np.array_equal(got_x.numpy(), x[rows]) and got_y.tolist() == y[rows].tolist()
    assert images.class_names is None or len(images.class_names) == images.num_classes


# --- CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["name", "name and folder", "path", "folder itself"])
def test_cifar10_binary(tmp_path, way):
    x, y = cifar10_binary(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    images = {
        "name": lambda: load("cifar10", tmp_path),
        "name and folder": lambda: load("cifar10", root=str(folder)),
        "path": lambda: load(tmp_path),
        "folder itself": lambda: load(str(folder)),
    }[way]()
    check(images, x, y, 10)
    assert images.name == "cifar10" and images.num_classes == 10 and images.class_names[3] == "cat"


def test_cifar10_python(tmp_path):
    x, y = cifar10_python(tmp_path)
    check(load("cifar10", tmp_path), x, y, 10)
    assert load(tmp_path / "cifar-10-batches-py").name == "cifar10"


def test_the_writer_of_python_2_files_writes_what_pickle_reads(tmp_path):
    x, y = cifar10_python(tmp_path)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_1", "rb") as file:
        found = pickle.load(file, encoding="bytes")
    assert np.array_equal(found[b"data"], x[:2].reshape(2, 3072)) and found[b"labels"] == y[:2].tolist()


def test_cifar10_python_saved_again_by_python_3(tmp_path):
    x, y = cifar10_python(tmp_path, lambda path, content: path.write_bytes(pickle.dumps(content, protocol=2)))
    check(load("cifar10", tmp_path), x, y, 10)


def test_the_binary_version_is_preferred(tmp_path):
    x, y = cifar10_binary(tmp_path)
    cifar10_python(tmp_path)
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        path.write_bytes(b"not read")
    check(load("cifar10", tmp_path), x, y, 10)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100(tmp_path, form):
    folder = tmp_path / f"cifar-100-{form}"
    folder.mkdir()
    x, fine, coarse = drawn(7, 3, 32, 32), np.array([99, 0, 41, 7, 7, 99, 3]), np.arange(7)
    for name, rows in (("train", range(5)), ("test", range(5, 7))):
        if form == "binary":
            records = [bytes([coarse[i], fine[i]]) + x[i].tobytes() for i in rows]
            (folder / f"{name}.bin").write_bytes(b"".join(records))
        else:
            part = {
                b"coarse_labels": coarse[rows].tolist(),
                b"fine_labels": fine[rows].tolist(),
                b"data": x[rows].reshape(-1, 3072),
            }
            python2(folder / name, part)
    for images in (load("cifar100", tmp_path), load(folder)):
        check(images, x, fine, 5)
        assert images.num_classes == 100 and images.class_names[0] == "apple" and images.class_names[99] == "worm"
        assert list(images.class_names) == sorted(images.class_names)


@pytest.mark.parametrize("cut", [3072, 3074, 0])
def test_truncated_cifar(tmp_path, cut):
    cifar10_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArgumentError, match=rf"data_batch_3\.bin .*{cut} bytes are no whole number of records of 3073"):
        load("cifar10", tmp_path)


def test_cifar_with_a_record_less(tmp_path):
    cifar10_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:3073])
    with pytest.raises(ArgumentError, match=r"data_batch_2\.bin 2, data_batch_3\.bin 1"):
        load("cifar10", tmp_path)


def test_cifar_label_out_of_range(tmp_path):
    cifar10_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ArgumentError, match=r"test part of cifar10 go from \d to 10; its 10 classes are 0 to 9"):
        load("cifar10", tmp_path)


class Runs:
    """A pickle of this calls a function of choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = {
    "os.system": (Runs(os.system, "touch {mark}"), r"asks for \w+\.system"),
    "eval": (Runs(eval, "open('{mark}', 'w')"), r"asks for (__builtin__|builtins)\.eval"),
    "getattr": (Runs(getattr, "text", "upper"), r"asks for (__builtin__|builtins)\.getattr"),
    "object arrays": ({b"data": np.array([{}, {}])}, "asks for arrays of dtype 'O8'"),
    "floats": ({b"data": np.zeros(3)}, "asks for arrays of dtype 'f8'"),
    "codec": (Runs(__import__("_codecs").encode, "text", "rot13"), "asks for the codec 'rot13'"),
    "a path": (Path("/tmp"), r"asks for pathlib"),
}


@pytest.mark.parametrize("case", EVIL)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path, case, protocol):
    content, message = EVIL[case]
    cifar10_python(tmp_path)
    mark = tmp_path / "mark"
    if isinstance(content, Runs):
        content = Runs(content.call[0], *(a.format(mark=mark) if isinstance(a, str) else a for a in content.call[1]))
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ArgumentError, match=rf"data_batch_1 .*{message}.*not loaded"):
        load("cifar10", tmp_path)
    assert not mark.exists()


WRONG = {
    "not a dict": [1, 2],
    "no data": {b"labels": [1]},
    "data of another width": {b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]},
    "labels missing": {b"data": np.zeros((2, 3072), np.uint8)},
    "a label less": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
    "labels of text": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [b"1", b"2"]},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_pickle_of_something_else(tmp_path, case):
    cifar10_python(tmp_path)
    python2(tmp_path / "cifar-10-batches-py" / "data_batch_2", WRONG[case])
    with pytest.raises(ArgumentError, match=r"data_batch_2 is not what its name says: it has no b'(data|labels)'"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 6000])
def test_a_truncated_pickle(tmp_path, keep):
    cifar10_python(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArgumentError, match=r"data_batch_2 .*cannot be read as a pickle"):
        load("cifar10", tmp_path)


# --- SVHN ------------------------------------------------------------------------------------------------------------


def svhn(root: Path, **changed) -> tuple[np.ndarray, np.ndarray]:
    io = pytest.importorskip("scipy.io")
    root.mkdir(exist_ok=True)
    x, y = drawn(9, 3, 32, 32), np.array([1, 10, 2, 9, 10, 3, 1, 10, 5])
    for name, rows in (("train", slice(0, 6)), ("test", slice(6, 9))):
        part = {"X": x[rows].transpose(2, 3, 1, 0), "y": y[rows, None].astype(np.uint8)} | changed
        io.savemat(root / f"{name}_32x32.mat", part, do_compression=True)
    return x, y % 10


def test_svhn(tmp_path):
    x, y = svhn(tmp_path)
    for images in (load("svhn", tmp_path), load(tmp_path)):
        check(images, x, y, 6)
        assert images.name == "svhn" and images.class_names[0] == "0" and images.y_train[1] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": np.zeros((3, 4))}, "it has no X, uint8"),
        ({"y": np.zeros((6, 1), np.uint8)}, "it has no y with 6 labels from 1 to 10"),
        ({"y": np.ones((5, 1), np.uint8)}, "it has no y with 6 labels from 1 to 10"),
    ],
)
def test_wrong_svhn(tmp_path, changed, message):
    svhn(tmp_path, **changed)
    with pytest.raises(ArgumentError, match=rf"train_32x32\.mat .*{message}"):
        load("svhn", tmp_path)


@pytest.mark.parametrize("keep", [0, 60, 3000])
def test_damaged_svhn(tmp_path, keep):
    svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArgumentError, match=r"train_32x32\.mat is not what its name says"):
        load("svhn", tmp_path)


def test_svhn_without_scipy(tmp_path, monkeypatch):
    svhn(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ArgumentError, match=r"'svhn' comes in MATLAB files.*pip install scipy"):
        load("svhn", tmp_path)


# --- STL-10 ----------------------------------------------------------------------------------------------------------


def stl10(root: Path) -> tuple[np.ndarray, np.ndarray, Path]:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    x, y = drawn(5, 3, 96, 96), np.array([10, 1, 4, 7, 10])
    for name, rows in (("train", range(3)), ("test", range(3, 5))):
        # column by column: byte (channel, column, row)
        (folder / f"{name}_X.bin").write_bytes(
            b"".join(x[i, c, :, j].tobytes() for i in rows for c in range(3) for j in range(96))
        )
        (folder / f"{name}_y.bin").write_bytes(bytes(y[i] for i in rows))
    return x, y - 1, folder


def test_stl10(tmp_path):
    x, y, folder = stl10(tmp_path)
    for images in (load("stl10", tmp_path), load(tmp_path), load(folder)):
        check(images, x, y, 3)
        assert images.class_names[:3] == ("airplane", "bird", "car") and images.shape == (3, 96, 96)


def test_wrong_stl10(tmp_path):
    _, _, folder = stl10(tmp_path)
    (folder / "train_y.bin").write_bytes(b"\x01\x02")
    with pytest.raises(ArgumentError, match=r"training part of 'stl10' .* has 3 images but 2 labels"):
        load("stl10", tmp_path)
    (folder / "train_y.bin").write_bytes(b"\x01\x02\x00")
    with pytest.raises(ArgumentError, match=r"train_y\.bin .*labels go from 0 to 2, not from 1 to 10"):
        load("stl10", tmp_path)
    path = folder / "train_X.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArgumentError, match=r"train_X\.bin .*82943 bytes are no whole number of images"):
        load("stl10", tmp_path)


# --- MNIST -----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def mnist(root: Path, ending: str = "", dash: str = "-") -> tuple[np.ndarray, np.ndarray]:
    root.mkdir(parents=True, exist_ok=True)
    x, y = drawn(6, 28, 28), np.array([9, 0, 3, 3, 1, 9], np.uint8)
    for name, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        for kind, array in (("images", x[rows]), ("labels", y[rows])):
            raw = idx(array)
            path = root / f"{name}-{kind}{dash}idx{array.ndim}-ubyte{ending}"
            path.write_bytes(gzip.compress(raw) if ending == ".gz" else raw)
    return x[:, None], y


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(tmp_path, ending, dash, name):
    x, y = mnist(tmp_path, ending, dash)
    images = load(name, tmp_path)
    check(images, x, y, 4)
    assert images.name == name and images.class_names[0] == {"mnist": "0", "fashion_mnist": "T-shirt/top"}[name]


def test_mnist_by_path(tmp_path):
    x, y = mnist(tmp_path / "letters")
    images = load(tmp_path / "letters")
    check(images, x, y, 4)
    assert images.name == "letters" and images.class_names is None and images.num_classes == 10
    mnist(tmp_path / "FashionMNIST" / "raw")
    assert load(tmp_path).name == "fashion_mnist"
    mnist(tmp_path / "MNIST" / "raw")
    assert load("mnist", tmp_path).name == "mnist"
    with pytest.raises(ArgumentError, match="holds the files of 'mnist', 'fashion_mnist'; say which"):
        load(tmp_path)


BAD_IDX = {
    "labels for images": (lambda raw: b"\0\0\x08\x01" + raw[4:], "magic number is 0x00000801, not 0x00000803"),
    "text": (lambda raw: b"hello", "magic number is 0x68656c6c, not 0x00000803"),
    "empty": (lambda raw: b"", "magic number is 0x00000000, not 0x00000803"),
    "header alone": (lambda raw: raw[:10], "not 0x00000803|magic"),
    "cut": (lambda raw: raw[:-1], r"it says \[4, 28, 28\], which is 3136 bytes, but 3135 follow"),
    "longer": (lambda raw: raw + b"x", "but 3137 follow"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_bad_idx(tmp_path, case):
    change, message = BAD_IDX[case]
    mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArgumentError, match=rf"train-images-idx3-ubyte .*({message})"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "change", [lambda raw: raw[: len(raw) // 2], lambda raw: b"plain", lambda raw: raw[:10] + b"\xff" * 20]
)
def test_damaged_gzip(tmp_path, change):
    mnist(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArgumentError, match=r"t10k-images-idx3-ubyte\.gz .*cannot be read"):
        load("mnist", tmp_path)


# --- by name and as .npz ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_path", [False, True])
def test_a_named_set_as_npz(tmp_path, whole_path):
    x, y = drawn(40, 28, 28), np.arange(40) % 10
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    images = load("mnist", path if whole_path else tmp_path)
    check(images, x[:, None], y, 30)
    assert images.name == "mnist" and images.class_names == tuple("0123456789")


FILES = {
    "cifar10": ("data_batch_1.bin", "data_batch_5", "cs.toronto.edu", "cifar10.npz"),
    "cifar100": ("train.bin", "cifar-100-python", "cs.toronto.edu"),
    "svhn": ("train_32x32.mat", "test_32x32.mat", "ufldl.stanford.edu"),
    "stl10": ("train_X.bin", "test_y.bin", "stl10_binary", "cs.stanford.edu"),
    "mnist": ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "yann.lecun.com"),
    "fashion_mnist": ("train-images-idx3-ubyte", "FashionMNIST/raw", "zalandoresearch"),
}


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named_with_their_home(tmp_path, name):
    for call in (lambda: load(name, tmp_path), lambda: load(name)):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert str(caught.value).startswith("root: ")
        assert all(word in str(caught.value) for word in FILES[name]), str(caught.value)


def test_one_missing_file(tmp_path):
    cifar10_binary(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(ArgumentError, match=r"files of 'cifar10' are not all in .*data_batch_4\.bin"):
        load("cifar10", tmp_path)


def test_several_sets_and_unknown_names(tmp_path):
    cifar10_binary(tmp_path)
    stl10(tmp_path)
    with pytest.raises(ArgumentError, match=r"holds the files of 'cifar10', 'stl10'; say which, load\('cifar10', root"):
        load(tmp_path)
    with pytest.raises(ArgumentError, match=r"'cifar' is none\. Did you mean \"cifar10\""):
        load("cifar", tmp_path)
