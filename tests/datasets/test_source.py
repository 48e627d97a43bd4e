import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from fastlocal.data import Batches, Images, Source, as_source
from fastlocal.errors import ArgumentError

COUNT = 23


class Noisy(Dataset):
    """Sample i with a number from each of the three global random states: an augmentation of any kind."""

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return torch.tensor(
            [float(i), torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64
        ), i


class Stream(IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        begin, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = list(range(begin, COUNT, step))
        random.shuffle(order)
        for i in order:
            yield Noisy()[i]


class Hooked(Noisy):
    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        return torch.tensor(100 * self.epoch + i), i


def state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def same_state(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1] and all(np.array_equal(p, q) for p, q in zip(a[2], b[2]))


def read(source, epoch, start=0, model=None):
    """The epoch's batches, and what the "model" does to the random states between them."""
    found = []
    for batch in source.epoch(epoch, start):
        found.append(batch)
        if model is not None:
            model(len(found))
    return found


def draws(n):
    torch.rand(n), random.random(), np.random.rand(3)


def reseeds(n):
    torch.manual_seed(n), random.seed(n), np.random.seed(n)


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) and torch.equal(r, s) for (p, r), (q, s) in zip(a, b))


LOADERS = {
    "shuffle": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), batch_size=4),
    "generator": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler": lambda: DataLoader(
        Noisy(), batch_size=4, sampler=RandomSampler(Noisy(), generator=torch.Generator().manual_seed(5))
    ),
    "weighted": lambda: DataLoader(Noisy(), batch_size=4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "batch sampler": lambda: DataLoader(
        Noisy(),
        batch_sampler=torch.utils.data.BatchSampler(RandomSampler(Noisy(), generator=torch.Generator()), 4, False),
    ),
    "default generator": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.default_generator),
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
    "workers": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True),
    "iterable with workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
}
FEW = ["shuffle", "generator", "batch sampler", "iterable"]


@pytest.mark.parametrize("name", LOADERS)
def test_an_epoch_is_a_function_of_seed_and_number(name):
    torch.manual_seed(1)
    first = as_source(LOADERS[name](), seed=3)
    epochs = [read(first, e) for e in (0, 1, 2)]
    torch.manual_seed(2)
    second = as_source(LOADERS[name](), seed=3)
    assert equal(epochs[1], read(second, 1, model=draws)), "another run, which starts at epoch 1, and draws in between"
    assert equal(epochs[0], read(first, 0, model=reseeds)), "again, after others"
    assert equal(epochs[2][4:], read(second, 2, start=4, model=draws)), "from the middle on"
    assert not equal(epochs[0], epochs[1])
    assert not equal(epochs[0], read(as_source(LOADERS[name](), seed=4), 0))
    rows = torch.cat([x for x, _ in epochs[0]])
    assert (rows[:, 1:].unique(dim=0).shape[0]) == COUNT, "every sample has draws of its own"
    assert name == "weighted" or sorted(rows[:, 0].tolist()) == list(range(COUNT))


@pytest.mark.parametrize("name", LOADERS)
def test_nobody_elses_random_state_is_touched(name):
    loader = LOADERS[name]()
    source = as_source(loader)
    own = [
        g
        for holder in (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        if isinstance(g := getattr(holder, "generator", None), torch.Generator)
    ]
    before, own_before = state(), [g.get_state() for g in own]
    for _ in source.epoch(0):
        assert same_state(before, state())
        assert all(torch.equal(g.get_state(), s) for g, s in zip(own, own_before))
    next(source.epoch(1))
    assert same_state(before, state())


@pytest.mark.parametrize("name", FEW)
def test_two_epochs_at_once(name):
    source = as_source(LOADERS[name]())
    alone = read(source, 0), read(source, 1)
    both = list(zip(source.epoch(0), source.epoch(1)))
    assert equal([a for a, _ in both], alone[0]) and equal([b for _, b in both], alone[1])


def test_persistent_workers_of_two_epochs_at_once():
    source = as_source(LOADERS["persistent"]())
    alone = read(source, 0), read(source, 1)
    both = list(zip(source.epoch(0), source.epoch(1)))
    assert equal([a for a, _ in both], alone[0]) and equal([b for _, b in both], alone[1])


def test_an_error_in_the_data_puts_the_states_back():
    class Broken(Noisy):
        def __getitem__(self, i):
            torch.rand(3), random.random(), np.random.rand()
            raise KeyError("no such sample")

    before = state()
    with pytest.raises(KeyError, match="no such sample"):
        next(as_source(DataLoader(Broken())).epoch(0))
    assert same_state(before, state())


@pytest.mark.parametrize("workers", [0, 2])
def test_set_epoch_is_called(workers):
    source = as_source(DataLoader(Hooked(), batch_size=COUNT, num_workers=workers, persistent_workers=workers > 0))
    assert next(source.epoch(7))[0].tolist() == [700 + i for i in range(COUNT)]
    assert next(source.epoch(2))[0].tolist() == [200 + i for i in range(COUNT)]
    sampler = DistributedSampler(Noisy(), num_replicas=2, rank=1, seed=9)
    shared = as_source(DataLoader(Noisy(), batch_size=4, sampler=sampler))
    expected = DistributedSampler(Noisy(), num_replicas=2, rank=1, seed=9)
    for epoch in (3, 0):
        expected.set_epoch(epoch)
        assert torch.cat([y for _, y in shared.epoch(epoch)]).tolist() == list(expected)


def test_length_and_start():
    source = as_source(LOADERS["shuffle"]())
    assert len(source) == source.length == 6 and read(source, 0, 6) == []
    for bad in (-1, 7, 1.5, True):
        with pytest.raises(ArgumentError, match=r"^start: got .*; give an integer from 0 up to 6"):
            source.epoch(0, bad)
    unknown = as_source(LOADERS["iterable"]())
    assert unknown.length is None and read(unknown, 0, 6) == []
    with pytest.raises(TypeError):
        len(unknown)
    with pytest.raises(ArgumentError, match=r"^start: got 7, but epoch 0 ended after 6 batches"):
        read(unknown, 0, 7)

    class Again:
        def __iter__(self):
            return iter([torch.rand(2), torch.rand(2)])

    again = as_source(Again(), seed=1)
    assert again.length is None
    with pytest.raises(TypeError, match=r"does not say how many batches it has; ask \.length"):
        len(again)
    assert all(torch.equal(a, b) for a, b in zip(again.epoch(0), again.epoch(0), strict=True))
    assert not torch.equal(next(again.epoch(0)), next(again.epoch(1)))


def test_a_list_of_batches_and_batches_of_dicts():
    listed = [(torch.ones(2), torch.zeros(2)), {"x": torch.zeros(3)}]
    source = as_source(listed)
    assert len(source) == 2 and list(source.epoch(4)) == listed and list(source.epoch(4, 1)) == listed[1:]
    assert source.describe() == {"kind": "list", "batches": 2}
    with pytest.raises(ArgumentError, match=r"^start: got 3"):
        source.epoch(0, 3)


def test_sources_are_taken_as_they_are():
    x = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    batches = Batches(Images(x, torch.arange(5), x, torch.arange(5), 5, torch.zeros(1), torch.ones(1), "five"))
    assert as_source(batches) is batches and isinstance(batches, Source)

    class Own:
        def epoch(self, number, start=0):
            return iter(range(10 * number + start, 10 * number + 3))

        def __len__(self):
            return 3

        def describe(self):
            return {"kind": "own"}

    own = as_source(Own())
    assert own.length == len(own) == 3 and list(own.epoch(2, 1)) == [21, 22] and own.describe() == {"kind": "own"}

    class Half:
        def epoch(self, number, start=0):
            return iter(())

    with pytest.raises(ArgumentError, match=r"Half has epoch.. but no __len__ and no describe"):
        as_source(Half())


def hf_like():
    found = type("Dataset", (), {"column_names": ["x"], "features": {}, "__iter__": lambda self: iter([])})
    return found()


REFUSED = {
    "generator": (lambda: (i for i in range(3)), "is an iterator, which can be read once"),
    "iterator of a loader": (lambda: iter(LOADERS["in order"]()), "is an iterator, which can be read once"),
    "data set": (lambda: TensorDataset(torch.zeros(3)), r"single samples; give DataLoader\(data"),
    "iterable data set": (Stream, r"single samples; give DataLoader\(data"),
    "hugging face": (hf_like, r"single samples; give DataLoader\(data"),
    "order of arrival": (lambda: DataLoader(Noisy(), num_workers=2, in_order=False), "in_order=False .*in_order=True"),
    "tensor": (lambda: torch.zeros(3), "holds no batches"),
    "pair of tensors": (lambda: (torch.zeros(3), torch.zeros(3)), "tensors in a list"),
    "dict": (lambda: {"x": 1}, "holds no batches"),
    "text": (lambda: "train", "holds no batches"),
    "number": (lambda: 3, "holds no batches"),
    "none": (lambda: None, "holds no batches"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_source(name):
    make, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=f"^data: .*{message}"):
        as_source(make())


@pytest.mark.parametrize("name", LOADERS)
def test_descriptions_are_plain(name):
    described = as_source(LOADERS[name](), seed=2).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["kind"] == "DataLoader" and described["seed"] == 2
    assert described["samples"] == (None if "iterable" in name else COUNT)
    assert described["batches"] == (None if "iterable" in name else 6)
    assert described["workers"] == (2 if name in ("workers", "persistent", "iterable with workers") else 0)
