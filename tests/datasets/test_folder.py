import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlocal.data import FolderImages, Source, as_source, load
from fastlocal.errors import ArgumentError

Image = pytest.importorskip("PIL.Image")


def picture(seed: int, height: int = 6, width: int = 5, mode: str = "RGB"):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def smooth(height: int, width: int):
    """Brightness tells where a pixel lies: red is the row, green the column."""
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], 2).round().astype(np.uint8))


def folder(root: Path, held: str = "val", mode: str = "RGB", sizes=((6, 5),)) -> Path:
    seed = 0
    for part, count in (("train", 3), (held, 2)):
        for name in ("zebra", "ant", "Bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                picture(seed, *sizes[seed % len(sizes)], mode).save(root / part / name / f"{9 - i}.png")
                seed += 1
    return root


@pytest.mark.parametrize("held", ["val", "test"])
def test_small_folders_become_images(tmp_path, held):
    folder(tmp_path / "zoo", held)
    images = load(tmp_path / "zoo")
    assert images.class_names == ("Bee", "ant", "zebra") and images.num_classes == 3 and images.name == "zoo"
    assert images.y_train.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and images.y_test.tolist() == [0, 0, 1, 1, 2, 2]
    files = [p for name in images.class_names for p in sorted((tmp_path / "zoo" / "train" / name).iterdir())]
    expected = np.stack([np.array(Image.open(p)).transpose(2, 0, 1) for p in files])
    assert np.array_equal(images.x_train.numpy(), expected) and images.x_train.dtype == torch.uint8


def test_val_goes_before_test(tmp_path):
    folder(tmp_path, "val")
    for name in ("zebra", "ant", "Bee"):
        (tmp_path / "test" / name).mkdir(parents=True)
        picture(77).save(tmp_path / "test" / name / "a.png")
    assert len(load(tmp_path).x_test) == 6


def test_grey_and_mixed_folders(tmp_path):
    assert load(folder(tmp_path / "grey", mode="L")).shape == (1, 6, 5)
    folder(tmp_path / "mixed", mode="L")
    picture(99).save(tmp_path / "mixed" / "train" / "ant" / "colour.png")
    images = load(tmp_path / "mixed")
    assert images.shape == (3, 6, 5)
    grey = images.x_train[0]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_unequal_pictures_need_a_size(tmp_path):
    folder(tmp_path, sizes=((6, 5), (8, 8)))
    with pytest.raises(ArgumentError, match=r"^size: .*has \dx\d pixels, .*has \dx\d; give size="):
        load(tmp_path)
    images = load(tmp_path, size=4)
    assert images.shape == (3, 4, 4)
    path = sorted((tmp_path / "train" / "Bee").iterdir())[0]
    given = Image.open(path)
    small = given.resize((4, int(4 * given.height / given.width)), Image.Resampling.BILINEAR)
    top = round((small.height - 4) / 2)
    assert np.array_equal(images.x_train[0].numpy(), np.array(small.crop((0, top, 4, top + 4))).transpose(2, 0, 1))


def test_the_byte_limit(tmp_path):
    folder(tmp_path)
    assert len(load(tmp_path, limit=15 * 90).x_train) == 9
    with pytest.raises(
        ArgumentError, match=r"^limit: 15 pictures of 3x6x5 take 1350 bytes, more than limit=1349.*FolderImages"
    ):
        load(tmp_path, limit=15 * 90 - 1)


def test_what_counts_as_a_picture(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no picture")
    (tmp_path / "train" / "README").write_text("no class")
    (tmp_path / "train" / "ant" / "deeper").mkdir()
    picture(5).save(tmp_path / "train" / "ant" / "deeper" / "a.JPG", "JPEG")
    data = FolderImages(tmp_path)
    assert len(data) == 10 and sum(path.name == "a.JPG" for path in data.paths) == 1
    assert data.num_classes == 3


def test_wrong_folders(tmp_path):
    with pytest.raises(
        ArgumentError, match=r"no set that is known, and not train/CLASS/ with val/CLASS/ or test/CLASS/"
    ):
        load(tmp_path)
    folder(tmp_path)
    (tmp_path / "val" / "cat").mkdir()
    with pytest.raises(ArgumentError, match=r"val has the class 'cat', which .*train has not"):
        load(tmp_path)
    (tmp_path / "val" / "cat").rmdir()
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"empty has no picture \(\.jpg"):
        load(tmp_path)
    (tmp_path / "train" / "empty").rmdir()
    with pytest.raises(ArgumentError, match=r"^root: there is no folder .*nowhere"):
        FolderImages(tmp_path, part="nowhere")
    (tmp_path / "flat").mkdir()
    with pytest.raises(ArgumentError, match=r"^root: .*flat holds no folder"):
        FolderImages(tmp_path, part="flat")
    for size in (0, 2.5, True):
        with pytest.raises(ArgumentError, match=r"^size: got"):
            load(tmp_path, size=size)


@pytest.mark.parametrize("content", [b"", b"no picture at all", None])
def test_a_broken_picture_is_named(tmp_path, content):
    folder(tmp_path)
    path = tmp_path / "train" / "ant" / "9.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(ArgumentError, match=r"cannot decode .*ant/9\.png"):
        load(tmp_path)
    data = FolderImages(tmp_path, size=4)
    with pytest.raises(ArgumentError, match=r"cannot decode .*ant/9\.png"):
        data[data.paths.index(path)]
    for workers in (0, 1) if content == b"" else (0,):  # PyTorch takes 5 s to clean up after a worker's error
        with pytest.raises(ArgumentError, match=r"cannot decode .*ant/9\.png"):
            list(data.batches(batch_size=4, workers=workers).epoch(0))


def test_without_pillow(tmp_path, monkeypatch):
    folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for call in (lambda: load(tmp_path), lambda: FolderImages(tmp_path)):
        with pytest.raises(ArgumentError, match=r"decoded by Pillow, which is not installed; pip install pillow"):
            call()


def one(root: Path, image) -> Path:
    (root / "train" / "a").mkdir(parents=True)
    image.save(root / "train" / "a" / "1.png")
    return root


def test_random_crops(tmp_path):
    """On a picture whose colours are coordinates a crop shows where it was cut."""
    data = FolderImages(one(tmp_path, smooth(90, 120)), size=16, scale=(0.2, 0.8), flip=False)
    shares, ratios, corners = [], [], []
    for epoch in range(300):
        x, label = data[epoch, 0]
        assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and label == 0
        rows, columns = x[0, :, 8].double(), x[1, 8].double()
        assert (rows.diff() >= 0).all() and (columns.diff() >= 0).all(), "neither turned nor mirrored"
        # the middle of the first and of the last pixel are 15/16 of the crop apart
        height, width = ((line[-1] - line[0]).item() / 255 * 16 / 15 for line in (rows, columns))
        shares.append(height * width)
        ratios.append(width * 120 / (height * 90))
        corners.append((rows[0].item(), columns[0].item()))
    assert 0.17 < min(shares) < 0.28 and 0.65 < max(shares) < 0.86
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
    assert len(set(corners)) > 200


def test_a_long_picture_falls_back_to_the_middle(tmp_path):
    data = FolderImages(one(tmp_path, smooth(4, 200)), size=16, scale=(1.0, 1.0), flip=False)
    x, _ = data[3, 0]
    assert torch.equal(x, data[4, 0][0])
    columns = x[1, 8].double() / 255
    assert columns.mean().item() == pytest.approx(0.5, abs=0.01)
    assert (columns[-1] - columns[0]).item() == pytest.approx(5 / 200, abs=0.01), "4 pixels high, 5 wide"


def test_flips_happen_half_of_the_time(tmp_path):
    data = FolderImages(one(tmp_path, smooth(32, 32)), size=8)
    mirrored = [bool((data[epoch, 0][0][1, 4].double().diff() < 0).any()) for epoch in range(200)]
    assert 70 < sum(mirrored) < 130


def test_evaluation_takes_the_middle(tmp_path):
    image = smooth(40, 60)
    data = FolderImages(one(tmp_path, image), size=14, resize=16, train=False)
    small = np.array(image.resize((24, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(data[0][0].numpy(), small[:, 1:15, 5:19])
    assert torch.equal(data[0][0], data[7, 0][0])
    assert FolderImages(tmp_path).resize == 256


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_source(tmp_path, workers):
    folder(tmp_path, sizes=((30, 40),))
    data = FolderImages(tmp_path, size=8, seed=2)
    batches = data.batches(batch_size=2, seed=5, workers=workers)
    assert isinstance(batches, Source) and as_source(batches) is batches
    state = torch.get_rng_state()
    first = list(batches.epoch(1))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"
    assert [len(y) for _, y in first] == [2, 2, 2, 3] and batches.length == 4
    torch.manual_seed(99)
    for start in (0, 2, 4):
        rest = list(data.batches(batch_size=2, seed=5).epoch(1, start))
        assert len(rest) == 4 - start
        for (x, y), (x_whole, y_whole) in zip(rest, first[start:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)
    assert sorted(torch.cat([y for _, y in first]).tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    other = list(batches.epoch(2))
    assert not torch.equal(torch.cat([x for x, _ in first]).sum(0), torch.cat([x for x, _ in other]).sum(0))
    with pytest.raises(ArgumentError, match=r"^start: got 5; .*up to 4"):
        batches.epoch(0, 5)


def test_normalisation_and_order_of_evaluation(tmp_path):
    folder(tmp_path, sizes=((8, 8),))
    data = FolderImages(tmp_path, part="val", size=8, resize=8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    x, y = next(data.batches(batch_size=64, mean=mean, std=std).epoch(3))
    raw = torch.stack([data[i][0] for i in range(6)]).double() / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and y.tolist() == [0, 0, 1, 1, 2, 2]
    described = data.batches(batch_size=4).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["samples"] == 6 and described["batches"] == 2 and not described["shuffle"]
    grey = FolderImages(tmp_path, size=8, channels=1)
    assert grey[0][0].shape == (1, 8, 8)
    with pytest.raises(ArgumentError, match=r"^mean, std: got None and None; give 1 numbers each"):
        grey.batches()
    assert next(grey.batches(mean=[0.5], std=[0.2]).epoch(0))[0].shape == (9, 1, 8, 8)


BAD = [
    ({"channels": 4}, r"^channels: got 4"),
    ({"size": 0}, r"^size: got 0"),
    ({"size": 8, "resize": 7}, r"^resize: got 7; give at least size=8"),
    ({"scale": (0.0, 1.0)}, r"^scale: got"),
    ({"scale": (0.9, 0.5)}, r"^scale: got"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments(tmp_path, options, message):
    folder(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        FolderImages(tmp_path, **options)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}, {"batch_size": True}])
def test_bad_batches(tmp_path, options):
    with pytest.raises(ArgumentError, match=rf"^{next(iter(options))}: got .*; give an integer from"):
        FolderImages(folder(tmp_path)).batches(**options)
