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
