"""What a step holds: one block's graph, one block's gradients, and boundary activations; nothing once it is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.measure import SavedBytes, StorageTracker
from tests.engine.baseline import losses_by_units
from tests.engine.formula import predicted_peak

MIB = 2**20

# Bytes of the distinct storages that autograd's saved tensors hold at the peak of a step of the official code
# (github.com/ChenxiangMA/AugLocal, ResNet-110 on 32x32 images, fp32, batch 8), measured with SavedBytes.
OFFICIAL = {"auglocal": 5_641_604, "dgl": 2_863_108}  # 0.67 and 0.34 MiB an image
METHODS: dict[str, dict[str, Any]] = {"auglocal": {"depth": 3}, "dgl": {"head": "auglocal"}}


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.01, momentum=0.9)


def batch(rows: int, size: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, size, size), torch.arange(rows) % 10


@pytest.fixture(scope="module", params=["auglocal", "dgl"])
def deep(request: Any) -> tuple[str, fl.LocalModel]:
    torch.manual_seed(0)
    net = models.create("resnet110")
    return request.param, fl.localize(net, request.param, blocks=55, sample=batch(2)[0], **METHODS[request.param])


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def nbytes(params: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in params)


def test_saved_bytes_of_resnet110_are_the_official_ones_at_most(deep: tuple[str, fl.LocalModel]) -> None:
    method, model = deep
    assert len(model.blocks) == {"auglocal": 52, "dgl": 55}[method]
    engine = fl.Engine(model, sgd)
    with SavedBytes(exclude=tensors(model)) as saved:
        engine.step(*batch(8))
    assert saved.peak <= OFFICIAL[method], f"{saved.peak / 8 / MIB:.4f} MiB an image"
    assert saved.current == 0
    # what localize measured on two rows, summary() tells, and blocks='auto' relies on
    assert saved.peak / 8 == pytest.approx(max(b.cost.saved_bytes for b in model.blocks), rel=0.01)


@contextmanager
def gradients_alive(model: fl.LocalModel) -> Iterator[list[tuple[int, set[int]]]]:
    """Whenever a gradient has been accumulated: bytes of all parameters' gradients, and the blocks they belong to."""
    owner = {id(p): block.index for block in model.blocks for p in block.parameters()}
    seen: list[tuple[int, set[int]]] = []
    alive: list[Any] = []

    def look(p: Any) -> None:
        alive[:] = [q for q in alive if q.grad is not None] + [p]
        seen.append((nbytes(alive), {owner[id(q)] for q in alive}))

    handles = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_gradients_of_one_block_only_are_alive(deep: tuple[str, fl.LocalModel]) -> None:
    _, model = deep
    x, y = batch(2)
    engine = fl.Engine(model, sgd)
    with gradients_alive(model) as seen:
        engine.step(x, y)
    assert len(seen) == len(list(model.parameters()))
    assert all(len(blocks) == 1 for _, blocks in seen)
    assert max(alive for alive, _ in seen) == max(nbytes(b.parameters()) for b in model.blocks)


def test_what_holds_all_gradients_is_seen_to_hold_them() -> None:
    torch.manual_seed(0)
    model = fl.localize(models.ResNetCIFAR(2, width=8), "dgl", blocks=4, sample=batch(2, 16)[0])
    with gradients_alive(model) as seen:
        fl.Engine(model, sgd, update="end").step(*batch(4, 16))
    assert seen[-1] == (nbytes(list(model.parameters())), {0, 1, 2, 3})


def test_real_storages_of_a_step_are_those_of_its_largest_block(deep: tuple[str, fl.LocalModel]) -> None:
    """Saved tensors and gradients of one block, and as workspace its input, its output, and once more the larger of them:
    the gradients on their way back. A plain loop over the sum of the same losses takes many times that."""
    _, model = deep
    rows = 2
    x, y = batch(rows)
    engine = fl.Engine(model, sgd)
    engine.step(x, y)  # the momentum is there now
    gc.collect()
    storages = StorageTracker()
    with storages, SavedBytes(exclude=tensors(model)) as saved:
        out = engine.step(x, y)
    bound = predicted_peak(model, rows) - 2 * nbytes(list(model.parameters()))
    assert saved.peak < storages.peak <= bound, (saved.peak, storages.peak, bound)

    # What is left is the output alone: the scores of each head, for counting hits, and the losses.
    kept = sum(live.nbytes for live in storages.alive())
    assert saved.current == 0 and kept <= 4 * (len(model.blocks) * (rows * 10 + 1) + rows * 10)
    assert out.correct.shape == (len(model.blocks),)
    del out
    gc.collect()
    assert storages.alive() == []

    storages = StorageTracker()
    with storages, SavedBytes(exclude=tensors(model)) as everything:
        torch.stack(losses_by_units(model, x, y)).sum().backward()
    for p in model.parameters():
        p.grad = None
    assert everything.peak > 15 * saved.peak and storages.peak > 10 * bound


def test_a_blocks_graph_is_gone_before_the_next_head_starts() -> None:
    torch.manual_seed(0)
    model = fl.localize(models.ResNetCIFAR(3, width=8), "dgl", blocks=10, sample=batch(2, 16)[0])
    engine = fl.Engine(model, sgd)
    x, y = batch(4, 16)
    engine.step(x, y)
    storages, saved = StorageTracker(), SavedBytes(exclude=tensors(model))
    alive: list[tuple[int, int]] = []
    handles = [
        h.register_forward_pre_hook(lambda *_: alive.append((saved.current, storages.current))) for h in model.heads
    ]
    with storages, saved:
        engine.step(x, y)
    for handle in handles:
        handle.remove()
    assert len(alive) == 9
    scores = 0
    for block, (held, real) in zip(model.blocks, alive, strict=False):
        own = 4 * block.cost.saved_bytes  # of four rows, its head's included
        boundary = 4 * 4 * torch.Size(block.cost.boundary).numel()
        assert 0 < held <= own
        assert real <= own + boundary + scores
        scores += 4 * (4 * 10 + 1)  # each head's scores and loss stay, for the output


@pytest.mark.parametrize("adapter", ["slices", "hooks"])
@pytest.mark.parametrize(
    "method, options", [("predsim", {}), ("infopro", {"lam": (5.0, 0.5)}), ("auglocal", {"depth": 1})]
)
def test_every_method_and_both_adapters_hold_one_block(method: str, options: dict[str, Any], adapter: str) -> None:
    torch.manual_seed(0)
    net: Any = models.ResNetCIFAR(2, width=8)
    names = ["layer1.1", "layer2.1"]
    if adapter == "hooks":
        names[0] = "layer1"  # the same place, but no unit
        options = {**options, "head": "dgl"} if method == "auglocal" else options
    if (method, adapter) == ("auglocal", "hooks"):
        method, options = "dgl", {}  # AugLocal's heads are made of units
    x, y = batch(4, 16)
    model = fl.localize(net, method, blocks=names, sample=x[:2], **options)
    engine = fl.Engine(model, sgd)
    engine.step(x, y)
    storages = StorageTracker()
    with storages, SavedBytes(exclude=tensors(model)) as saved, gradients_alive(model) as seen:
        out = engine.step(x, y)
    assert all(len(blocks) == 1 for _, blocks in seen)
    assert saved.peak <= 4 * 1.01 * max(b.cost.saved_bytes for b in model.blocks) and saved.current == 0
    assert storages.peak <= 1.02 * (predicted_peak(model, 4) - 2 * nbytes(list(model.parameters())))
    del out
    gc.collect()
    assert sum(live.nbytes for live in storages.alive()) == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_halves_what_is_saved_and_leaves_no_copies(precision: str) -> None:
    peaks, left = {}, {}
    for kind in ("32-true", precision):
        torch.manual_seed(0)
        model = fl.localize(models.ResNetCIFAR(2, width=8), "dgl", blocks=4, sample=batch(2, 16)[0])
        engine = fl.Engine(model, sgd, precision=kind)
        x, y = batch(32, 16)
        engine.step(x, y)
        storages = StorageTracker()
        with storages, SavedBytes(exclude=tensors(model)) as saved:
            out = engine.step(x, y)
        del out
        gc.collect()
        peaks[kind], left[kind] = saved.peak, storages.current
    assert peaks[precision] < 0.58 * peaks["32-true"]
    assert left == {"32-true": 0, precision: 0}


def test_large_scores_of_a_step_do_not_live_on_in_the_next() -> None:
    """A language model's logits are its largest tensor; the output of the step before is held while a step runs."""
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=2000, block_size=64, n_layer=3, n_head=2, n_embd=8, tie=False)
    ids = torch.randint(0, 2000, (4, 64))
    model = fl.localize(net, "dgl", blocks=3, sample=ids[:2])
    engine = fl.Engine(model, sgd)
    out = engine.step(ids, ids)
    logits = 4 * 64 * 2000 * 4
    storages = StorageTracker()
    with storages:
        out = engine.step(ids, ids)
    assert storages.current < 0.01 * logits and out.logits is None
    assert storages.peak < 4.5 * logits  # scores, their log-softmax, its gradient; and once more in between
