import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlocal.data import load
from fastlocal.errors import ArgumentError


def write(path: Path, **changed: object) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "x_train": rng.integers(0, 256, (12, 6, 5), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (4, 6, 5), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
    }
    arrays |= changed
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_digits_are_split_by_class_and_seed():
    pytest.importorskip("sklearn")
    a, b, other = load("digits"), load("digits"), load("digits", seed=1)
    assert len(a.x_train) + len(a.x_test) == 1797
    assert a.x_train.dtype == torch.uint8 and a.shape == (1, 8, 8) and a.num_classes == 10
    assert torch.equal(a.x_test, b.x_test) and not torch.equal(a.x_test, other.x_test)
    per_class = torch.bincount(a.y_train) + torch.bincount(a.y_test)
    assert torch.equal(torch.bincount(a.y_test), (per_class / 5).round().long())
    assert a.x_train.unique().numel() == 17 and a.x_train.max() == 255
    scaled = a.x_train.double() / 255
    assert a.mean.item() == pytest.approx(scaled.mean().item(), rel=1e-6)
    assert a.std.item() == pytest.approx(scaled.std(correction=0).item(), rel=1e-6)


def test_digits_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ArgumentError, match=r"'digits' comes with scikit-learn.*fastlocal\[demo\]"):
        load("digits")


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (1, 6, 5), (6, 5, 3), (3, 6, 5)])
def test_layouts(tmp_path, shape):
    x = np.arange(12 * np.prod(shape)).astype(np.uint8).reshape(12, *shape)
    images = load(write(tmp_path / "set.npz", x_train=x, x_test=x[:4]))
    channels = 3 if 3 in shape else 1
    assert images.shape == (channels, 6, 5) and images.name == "set" and images.num_classes == 3
    expected = (
        x.reshape(12, 6, 5, channels).transpose(0, 3, 1, 2) if shape[-1] in (1, 3) else x.reshape(12, channels, 6, 5)
    )
    assert np.array_equal(images.x_train.numpy(), expected)
    assert images.y_train.dtype == torch.int64 and len(images.mean) == channels


def test_a_constant_channel_has_std_one(tmp_path):
    images = load(write(tmp_path / "set.npz", x_train=np.full((12, 6, 5), 51, np.uint8)))
    assert images.std.item() == 1 and images.mean.item() == pytest.approx(0.2)


U8 = np.uint8
BAD = {
    "missing key": ({"y_test": None}, r"has no y_test \(it has x_train, y_train, x_test\).*numpy.savez"),
    "float pixels": ({"x_train": np.zeros((12, 6, 5), np.float32)}, "x_train is float32; give uint8"),
    "flat images": ({"x_train": np.zeros((12, 30), U8)}, r"x_train has shape \[12, 30\]; give \[N, H, W\]"),
    "no channels": ({"x_train": np.zeros((12, 6, 5, 2), U8)}, "neither could be the channels.*C = 1 or 3"),
    "two channels": ({"x_train": np.zeros((12, 3, 3, 3), U8)}, "either could be the channels"),
    "no pixels": ({"x_train": np.zeros((12, 0, 5), U8)}, "no pixels"),
    "unequal sizes": ({"x_test": np.zeros((4, 6, 6), U8)}, "x_train are 1x6x5, of x_test 1x6x6"),
    "lengths": ({"y_train": np.arange(11) % 3}, "x_train holds 12 images but y_train 11 labels"),
    "empty": ({"x_test": np.zeros((0, 6, 5), U8), "y_test": np.zeros(0, int)}, "x_test is empty"),
    "one-hot": ({"y_train": np.zeros((12, 3), int)}, r"y_train has shape \[12, 3\]; give one integer an image"),
    "float labels": ({"y_train": np.zeros(12)}, "y_train is float64; give integers"),
    "negative": ({"y_test": np.array([0, -1, 1, 2])}, "negative labels; number the classes from 0"),
    "from one": ({"y_train": np.arange(12) % 3 + 1}, "up to 3 but y_train has no sample of class 0"),
    "a gap": ({"y_train": np.arange(12) % 3 * 2}, "up to 4 but y_train has no sample of class 1, 3"),
    "huge": ({"y_train": np.arange(12) * 10**9}, "no sample of class 1, 2, 3, 4, 5, ..."),
    "unseen": ({"y_test": np.array([0, 1, 2, 3])}, "y_test has label 3, y_train only 0 to 2"),
    "objects": ({"y_train": np.array([{}] * 12)}, "cannot read.*plain arrays"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    changed, message = BAD[case]
    with pytest.raises(ArgumentError, match=f"^data: .*{message}"):
        load(write(tmp_path / "bad.npz", **changed))


def test_no_such_data(tmp_path):
    with pytest.raises(ArgumentError, match=r"there is no file .*gone.npz'; give the path of a .npz file, or 'digits'"):
        load(tmp_path / "gone.npz")
    with pytest.raises(ArgumentError, match=r"got 'digitz'.*Did you mean \"digits\""):
        load("digitz")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_file(tmp_path, keep):
    path = write(tmp_path / "half.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep < 1 else int(keep)])
    with pytest.raises(ArgumentError, match=r"cannot read .*half\.npz"):
        load(path)
    path.write_text("not an archive, but text")
    with pytest.raises(ArgumentError, match=r"cannot read .*half\.npz"):
        load(path)


def test_subsets(tmp_path):
    y = np.array([0, 1, 2, 1, 1, 0, 2, 1, 0, 1, 0, 0])
    images = load(write(tmp_path / "set.npz", y_train=y))
    first = images.subset(2)
    assert first.y_train.tolist() == [0, 1, 2, 1, 0, 2]
    assert torch.equal(first.x_train, images.x_train[[0, 1, 2, 3, 5, 6]])
    assert torch.equal(first.x_test, images.x_test) and torch.equal(first.mean, images.mean)
    assert images.subset(100).y_train.tolist() == y.tolist() == images.subset(1.0).y_train.tolist()
    assert torch.bincount(images.subset(0.4).y_train).tolist() == [2, 2, 1]
    assert torch.bincount(images.subset(0.01).y_train).tolist() == [1, 1, 1], "at least one of each"
    drawn = [images.subset(2, seed) for seed in range(8)]
    assert all(torch.bincount(one.y_train).tolist() == [2, 2, 2] for one in drawn)
    assert torch.equal(images.subset(2, 3).x_train, drawn[3].x_train)
    assert len({tuple(one.x_train.flatten().tolist()) for one in drawn}) > 1
    for bad in (0, -1, 0.0, 1.5, True, "2"):
        with pytest.raises(ArgumentError, match=r"^n: got .*images per class"):
            images.subset(bad)


def test_importing_needs_no_optional_package():
    code = (
        "import sys\nfor name in ('PIL', 'scipy', 'sklearn', 'datasets', 'torchvision'): sys.modules[name] = None\n"
        "from fastlocal.data import *\nprint(sorted(globals()))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "'from_huggingface'" in done.stdout and "'FolderImages'" in done.stdout
