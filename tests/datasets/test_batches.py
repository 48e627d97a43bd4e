import json

import pytest
import torch

from fastlocal.data import Batches, Images
from fastlocal.errors import ArgumentError


def numbered(count: int = 21, height: int = 6, width: int = 5) -> Images:
    """Image i is filled with i, and so is its label."""
    x = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, height, width).contiguous()
    y = torch.arange(count)
    return Images(x, y, x[:7], y[:7], count, torch.zeros(2), torch.full((2,), 1 / 255), "numbered")


def labels(batches: Batches, epoch: int) -> list[int]:
    return torch.cat([y for _, y in batches.epoch(epoch)]).tolist()


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = Batches(numbered(), batch_size=4, seed=3)
    assert labels(batches, 5) == labels(Batches(numbered(), batch_size=4, seed=3), 5)
    assert labels(batches, 5) != labels(batches, 6)
    assert labels(batches, 5) != labels(Batches(numbered(), batch_size=4, seed=4), 5)
    # neither the global generator nor the batch size nor augmentation has a say
    torch.manual_seed(99)
    assert labels(batches, 5) == labels(Batches(numbered(), batch_size=7, seed=3, crop=2, flip=True), 5)


def test_iterating_goes_on_to_the_next_epoch():
    batches = Batches(numbered(), batch_size=4)
    for epoch in range(2):
        assert torch.cat([y for _, y in batches]).tolist() == labels(batches, epoch)


def test_nothing_is_dropped_and_image_and_label_stay_together():
    batches = Batches(numbered(), batch_size=4)
    assert sorted(labels(batches, 0)) == list(range(21))
    for x, y in batches.epoch(0):
        assert x.dtype == torch.float32 and x.shape[1:] == (2, 6, 5)
        torch.testing.assert_close(x, y.float().view(-1, 1, 1, 1).expand_as(x))


@pytest.mark.parametrize(
    ("size", "sizes"), [(4, [4, 4, 4, 4, 5]), (8, [8, 8, 5]), (20, [21]), (64, [21]), (1, [1] * 21)]
)
def test_a_last_batch_of_one_joins_the_one_before(size, sizes):
    batches = Batches(numbered(), batch_size=size)
    assert [len(y) for _, y in batches.epoch(0)] == sizes and len(batches) == len(sizes)


def test_the_test_part_comes_in_order():
    assert labels(Batches(numbered(), train=False, batch_size=3), 4) == list(range(7))


def test_normalisation():
    images = numbered()
    images.x_train.copy_(torch.randint(256, images.x_train.shape))
    mean, std = torch.tensor([0.1, 0.7]), torch.tensor([0.5, 0.2])
    plain = Images(images.x_train, images.y_train, images.x_test, images.y_test, 21, mean, std, "set")
    x, y = next(Batches(plain, batch_size=21).epoch(0))
    expected = (images.x_train[y] / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(x, expected)


def test_crops_are_windows_of_the_reflected_image_and_flips_are_mirrors():
    torch.manual_seed(0)
    images = numbered(count=200)
    images.x_train.copy_(torch.randint(256, images.x_train.shape))
    originals = images.x_train.float()
    x, y = next(Batches(images, batch_size=200, crop=2).epoch(0))
    padded = torch.nn.functional.pad(originals[y], (2, 2, 2, 2), mode="reflect")
    windows = torch.stack([padded[:, :, r : r + 6, c : c + 5] for r in range(5) for c in range(5)])
    found = (windows - x).abs().flatten(2).amax(2) < 1e-3  # [25 windows, 200 images]
    assert found.any(0).all(), "every crop is one of the 25 windows"
    assert found.any(1).all(), "every window is drawn some time"

    x, y = next(Batches(images, batch_size=200, flip=True).epoch(0))
    same = (x - originals[y]).abs().flatten(1).amax(1) < 1e-3
    mirrored = (x - originals[y].flip(3)).abs().flatten(1).amax(1) < 1e-3
    assert (same ^ mirrored).all() and 60 < mirrored.sum() < 140


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_batch_size(size):
    with pytest.raises(ArgumentError, match=r"^batch_size: got .*from 1"):
        Batches(numbered(), batch_size=size)


@pytest.mark.parametrize("crop", [-1, 5])
def test_bad_crop(crop):
    with pytest.raises(ArgumentError, match=f"^crop: got {crop}; give 0 .* up to 4"):
        Batches(numbered(), crop=crop)


def test_bad_cutout():
    for size in (-1, 13, 2.0, True):
        with pytest.raises(ArgumentError, match=r"^cutout: got .*; give 0 \(off\) up to 12"):
            Batches(numbered(), cutout=size)


def test_the_order_is_the_recorded_one():
    # Results are recorded with this order; a change of it must be meant.
    expected = torch.randperm(21, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2))
    assert labels(Batches(numbered(), seed=3, batch_size=4), 2) == expected.tolist()


def test_a_start_in_the_middle_and_one_batch_equal_the_epoch():
    torch.manual_seed(0)
    images = numbered(count=22)
    images.x_train.copy_(torch.randint(256, images.x_train.shape))
    batches = Batches(images, batch_size=4, crop=2, flip=True, cutout=3, seed=1)
    whole = list(batches.epoch(5))
    assert len(whole) == len(batches) == 6
    for start in (0, 1, 4, 6):
        rest = list(batches.epoch(5, start))
        assert len(rest) == 6 - start
        for (x, y), (x_whole, y_whole) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)
    for index, (x, y) in enumerate(whole):
        x_one, y_one = batches.batch(5, index)
        assert torch.equal(x, x_one) and torch.equal(y, y_one)
    test = Batches(images, train=False, batch_size=3, crop=2)
    assert [y.tolist() for _, y in test.epoch(0, 1)] == [[3, 4, 5, 6]]
    assert torch.equal(next(test.epoch(0, 1))[0], test.batch(0, 1)[0])
    for bad in (-1, 7, 1.0, True):
        with pytest.raises(ArgumentError, match=r"^start: got .*from 0 up to 6"):
            batches.epoch(0, bad)
    with pytest.raises(ArgumentError, match=r"^index: got 6; give 0 up to 5"):
        batches.batch(0, 6)


def test_augmentations_differ_between_batches_and_epochs_and_do_not_disturb_each_other():
    torch.manual_seed(0)
    images = numbered(count=1, height=16, width=16)
    images.x_train.copy_(torch.randint(256, images.x_train.shape))
    rows = torch.zeros(64, dtype=torch.long)
    images = Images(
        images.x_train[rows], rows, images.x_train, rows[:1], 1, torch.zeros(2), torch.full((2,), 1 / 255), "one"
    )
    batches = Batches(images, batch_size=16, crop=4, flip=True)
    shown = [x for epoch in (0, 1) for x, _ in batches.epoch(epoch)]
    assert not any(torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])
    cut = [x for epoch in (0, 1) for x, _ in Batches(images, batch_size=16, crop=4, flip=True, cutout=5).epoch(epoch)]
    for plain, with_hole in zip(shown, cut, strict=True):
        assert torch.equal(with_hole, torch.where(with_hole == 0, with_hole, plain))


def test_cutout_is_one_square_of_mean_colour_cut_off_at_the_border():
    images = numbered(count=300, height=8, width=9)
    images.x_train.fill_(255)
    images = Images(
        images.x_train, images.y_train, images.x_test, images.y_test, 300, torch.full((2,), 0.5), torch.ones(2), "white"
    )
    x, _ = next(Batches(images, batch_size=300, cutout=4).epoch(0))
    hole = x == 0
    assert torch.equal(hole[:, 0], hole[:, 1]) and (x[~hole] == 0.5).all()
    centers: tuple[set[int], set[int]] = (set(), set())
    for one in hole[:, 0]:
        i, j = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        assert one[i[0] : i[-1] + 1, j[0] : j[-1] + 1].all() and one.sum() == len(i) * len(j), "a rectangle"
        for span, size, seen in ((i, 8, centers[0]), (j, 9, centers[1])):
            assert len(span) == 4 or (2 <= len(span) < 4 and (span[0] == 0 or span[-1] == size - 1))
            seen.add(int(span[-1]) - 1 if span[0] == 0 else int(span[0]) + 2)
    assert centers == (set(range(8)), set(range(9))), "every row and column holds a centre some time"


def test_flips_in_order_of_the_test_part():
    torch.manual_seed(0)
    images = numbered(count=60)
    images.x_train.copy_(torch.randint(256, images.x_train.shape))
    test = Images(images.x_train, images.y_train, images.x_train, images.y_train, 60, images.mean, images.std, "same")
    x, y = next(Batches(test, train=False, batch_size=60, flip=True, crop=1).epoch(0))
    original = images.x_train.float()
    middle = torch.stack(
        [
            (x - torch.roll(original, (i, j), (2, 3)))[:, :, 1:-1, 1:-1].abs().flatten(1).amax(1)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
    )
    assert y.tolist() == list(range(60)) and 10 < ((middle < 1e-3).any(0)).sum() < 50


def test_description():
    described = Batches(numbered(), batch_size=4, seed=3, crop=1, flip=True, cutout=2).describe()
    assert described == {
        "kind": "Batches", "data": "numbered", "part": "train", "samples": 21, "shape": [2, 6, 5], "classes": 21,
        "batch_size": 4, "batches": 5, "seed": 3, "border": "reflect",
        "crop": 1, "flip": True, "cutout": 2,
    }  # fmt: skip
    assert json.loads(json.dumps(described)) == described
    assert Batches(numbered(), batch_size=4).length == 5


def test_the_host_reads_nothing_from_the_device():
    # On the meta device there is nothing to read: whatever waits for a value raises.
    batches = Batches(numbered().to("meta"), batch_size=4, crop=2, flip=True, cutout=3)
    assert [(x.device.type, tuple(x.shape), len(y)) for x, y in batches.epoch(0, 3)] == [
        ("meta", (4, 2, 6, 5), 4),
        ("meta", (5, 2, 6, 5), 5),
    ]


def test_a_black_border_is_torchvisions_zero_padding():
    """Every crop is a window of the zero-padded image; with the same draws it is the reflected one where it is inside."""
    pixels = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    images = Images(
        pixels, torch.arange(40) % 4, pixels, torch.arange(40) % 4, 4, torch.full((3,), 0.5), torch.ones(3), "n"
    )
    black = Batches(images, batch_size=40, crop=2, border="black")
    x, _ = black.batch(0, 0)
    whole = Batches(images, batch_size=40).batch(0, 0)[0]
    reflected, _ = Batches(images, batch_size=40, crop=2).batch(0, 0)
    padded = torch.nn.functional.pad(whole, (2, 2, 2, 2), value=-0.5)
    seen = set()
    for i in range(40):
        at = [(a, b) for a in range(5) for b in range(5) if torch.equal(padded[i, :, a : a + 6, b : b + 6], x[i])]
        assert len(at) == 1
        seen.add(at[0])
    assert len(seen) > 10
    inside = x != -0.5
    assert torch.equal(x[inside], reflected[inside]) and not inside.all()
    assert black.describe()["border"] == "black"
    with pytest.raises(ArgumentError, match="border: got 'zero'; valid are 'reflect', 'black'"):
        Batches(images, border="zero")
