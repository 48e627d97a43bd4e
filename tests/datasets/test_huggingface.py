import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastlocal.data import as_source, from_huggingface
from fastlocal.errors import ArgumentError


class Rows:
    """What is used of a data set: a length, rows, and maybe features."""

    def __init__(self, rows, features=None):
        self.rows, self.features = rows, features

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class ClassLabel:
    def __init__(self, names):
        self.names = names


# the type's name decides, as of datasets.Image
Picture = type("Image", (), {})


def arrays(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def parts(x, y, train=4, features=None, image="img", label="fine"):
    rows = [{image: a, label: int(b), "other": "text"} for a, b in zip(x, y)]
    return {"train": Rows(rows[:train], features), "test": Rows(rows[train:], features)}


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6), (5, 6, 1), (1, 5, 6)])
def test_arrays(shape):
    x, y = arrays(6, *shape), [0, 1, 2, 1, 0, 2]
    images = from_huggingface(parts(x, y), image="img", label="fine")
    channels = 3 if 3 in shape else 1
    expected = x.reshape(6, 5, 6, channels).transpose(0, 3, 1, 2) if shape[0] == 5 else x.reshape(6, channels, 5, 6)
    assert np.array_equal(images.x_train.numpy(), expected[:4]) and np.array_equal(images.x_test.numpy(), expected[4:])
    assert images.y_train.tolist() == y[:4] and images.y_test.tolist() == y[4:] and images.y_test.dtype == torch.int64
    assert images.num_classes == 3 and images.class_names is None and images.x_train.dtype == torch.uint8
    assert images.mean.shape == (channels,)


def test_features_name_columns_and_classes():
    features = {"img": Picture(), "fine": ClassLabel(["a", "b", "c", "d"]), "other": object()}
    images = from_huggingface(parts(arrays(6, 5, 6), [0, 1, 2, 1, 0, 2], features=features))
    assert images.num_classes == 4 and images.class_names == ("a", "b", "c", "d")
    features["coarse"] = ClassLabel(["e"])
    with pytest.raises(
        ArgumentError, match=r"^label: the columns 'fine', 'coarse' are of type ClassLabel; name the one"
    ):
        from_huggingface(parts(arrays(6, 5, 6), [0] * 6, features=features))


def test_parts():
    data = parts(arrays(6, 5, 6), [0, 1, 2, 1, 0, 2])
    named = {"first": data["train"], "validation": data["test"]}
    assert len(from_huggingface(named, image="img", label="fine", train="first").x_test) == 2
    for given, message in (
        (named, r"^train: got 'train'; the parts are 'first', 'validation'"),
        ({"train": data["train"]}, r"^test: got None; the parts are 'train'"),
        (data["train"], r"^data: got Rows; give a DatasetDict"),
        ({"train": iter([]), "test": data["test"]}, r"does not know its length, as streaming"),
        ({"train": data["train"], "test": Rows([])}, "a part is empty"),
    ):
        with pytest.raises(ArgumentError, match=message):
            from_huggingface(given, image="img", label="fine")


def test_pictures_and_sizes():
    Image = pytest.importorskip("PIL.Image")
    x = arrays(6, 8, 8, 3)
    pictures = [Image.fromarray(a) for a in x]
    images = from_huggingface(parts(pictures, [0, 1, 2, 1, 0, 2]), image="img", label="fine")
    assert np.array_equal(images.x_train.numpy(), x[:4].transpose(0, 3, 1, 2))
    pictures[1] = pictures[1].convert("L")
    mixed = from_huggingface(parts(pictures, [0, 1, 2, 1, 0, 2]), image="img", label="fine")
    assert mixed.shape == (3, 8, 8) and torch.equal(mixed.x_train[1, 0], mixed.x_train[1, 2])
    pictures[2] = pictures[2].resize((12, 10))
    with pytest.raises(ArgumentError, match=r"^size: there are pictures of .*; give size="):
        from_huggingface(parts(pictures, [0] * 6), image="img", label="fine")
    assert from_huggingface(parts(pictures, [0] * 6), image="img", label="fine", size=4).shape == (3, 4, 4)
    assert from_huggingface(parts(x, [0] * 6), image="img", label="fine", size=4).shape == (3, 4, 4)


def test_bad_rows():
    x = arrays(6, 5, 6)
    data = parts(x, [0, 1, 2, 1, 0, 2])
    with pytest.raises(ArgumentError, match=r"row 0 has no 'picture'; its columns are 'img', 'fine', 'other'"):
        from_huggingface(data, image="picture", label="fine")
    with pytest.raises(ArgumentError, match=r"^label: row 0 has 'text' in 'other'"):
        from_huggingface(data, image="img", label="other")
    with pytest.raises(
        ArgumentError, match=r"^image: no column is of type Image; name the one to use \(columns: unknown\)"
    ):
        from_huggingface(data)
    with pytest.raises(ArgumentError, match=r"^image: 'img' holds ndarray of float64"):
        from_huggingface(parts(x / 255, [0] * 6), image="img", label="fine")
    with pytest.raises(ArgumentError, match=r"labels of the test part of .* go from -1 to 2"):
        from_huggingface(parts(x, [0, 1, 2, 1, -1, 2]), image="img", label="fine")
    with pytest.raises(ArgumentError, match=r"^limit: 6 pictures of 1x5x6 take 180 bytes, more than limit=179"):
        from_huggingface(data, image="img", label="fine", limit=179)


# --- the real thing --------------------------------------------------------------------------------------------------


@pytest.fixture
def real():
    datasets = pytest.importorskip("datasets")
    Image = pytest.importorskip("PIL.Image")
    x, y = arrays(8, 7, 6, 3), [0, 1, 2, 1, 0, 2, 1, 1]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])})
    columns = {"img": [Image.fromarray(a) for a in x], "label": y}
    whole = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict({"train": whole.select(range(6)), "test": whole.select(range(6, 8))}), x, y


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_real_dataset_dict(real, form):
    data, x, y = real
    images = from_huggingface(data.with_format(form))
    assert np.array_equal(images.x_train.numpy(), x[:6].transpose(0, 3, 1, 2))
    assert images.y_train.tolist() == y[:6] and images.y_test.tolist() == y[6:]
    assert images.class_names == ("ant", "bee", "cat") and images.name
    assert len(from_huggingface(data["train"].train_test_split(2, seed=0)).x_train) == 4


def test_a_real_streaming_set_is_refused(real):
    data, _, _ = real
    streaming = {name: part.to_iterable_dataset() for name, part in data.items()}
    with pytest.raises(ArgumentError, match="as streaming data sets; use a DataLoader and as_source"):
        from_huggingface(streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_real_set_through_a_loader(real, streaming):
    part = real[0]["train"].with_format("torch")
    with pytest.raises(ArgumentError, match=r"single samples; give DataLoader"):
        as_source(part)

    def source():
        if streaming:
            data = part.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4)
            return as_source(DataLoader(data, batch_size=2), seed=1)
        return as_source(DataLoader(part, batch_size=2, shuffle=True), seed=1)

    orders = []
    for epoch in (0, 1, 2):
        torch.manual_seed(epoch)
        first = [batch["img"] for batch in source().epoch(epoch)]
        again = source()
        list(again.epoch(0))
        torch.rand(5)
        rest = [batch["img"] for batch in again.epoch(epoch, 1)]
        assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first[1:], rest, strict=True))
        orders.append(torch.cat(first))
    assert not all(torch.equal(orders[0], other) for other in orders[1:])
    assert source().length == (None if streaming else 3)
