"""Losses that reach over several blocks: one forward per block (levels A and B) against the streams run one by one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.heads import CascadeHead, ClassifierHead, NoHead
from fastlocal.errors import ArgumentError
from fastlocal.methods import Method
from fastlocal.methods.hpff import stream_passes
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.ops.modules import AvgPool, FusedSequential
from fastlocal.reference import train_step
from tests.engine.nets import TorchvisionStyleResNet

ROWS = 6


class Windowed(Method):
    """Linear heads of both streams; ``kinds``: which of them each block has, by letters ("o", "s", "os" or "")."""

    def __init__(self, window: int, kinds: list[str], share: float = 0.75, weight: float = 1.5):
        super().__init__()
        self.window, self.kinds, self.share, self.weight = window, kinds, share, weight

    def head(self, site: Any) -> nn.Module:
        kinds = self.kinds[site.index]
        if not kinds:
            return NoHead()

        def one(weight: float) -> nn.Module:
            width = site.shape[0] if len(site.shape) == 3 else site.shape[-1]
            pool = [AvgPool()] if len(site.shape) > 1 else []
            return ClassifierHead(FusedSequential(*pool, nn.Linear(width, site.num_classes)), weight)

        return CascadeHead(one(0.3) if "o" in kinds else None, one(0.7) if "s" in kinds else None)

    def passes(self, block: int, blocks: int, unit: int) -> int:
        return stream_passes(block, blocks, unit, self.window, self.share < 1 or any("o" in k for k in self.kinds))

    @property
    def final_weight(self) -> float:
        return self.weight

    @property
    def final_share(self) -> float:
        return self.share


def resnet() -> nn.Module:
    return models.resnet20(width=4, num_classes=5)


def mlp(batch_norm: bool) -> nn.Module:
    return models.mlp(in_features=7, hidden=(8, 6, 9, 5, 7), num_classes=5, batch_norm=batch_norm)


def vit() -> nn.Module:
    return models.vit_tiny(num_classes=5, img_size=8, patch_size=4, dim=8, depth=5, heads=2)


IMAGE, VECTOR = (3, 8, 8), (7,)
Make = Callable[[], fl.LocalModel]


def localized(net: nn.Module, shape: tuple[int, ...], method: Any, blocks: Any, **options: Any) -> fl.LocalModel:
    return fl.localize(net.double(), method, blocks=blocks, sample=torch.randn(2, *shape).double(), **options)


CASES: dict[str, tuple[tuple[int, ...], Make]] = {
    **{
        f"resnet, mlaan {mode}, window {w}": (
            IMAGE,
            lambda mode=mode, w=w: localized(resnet(), IMAGE, "mlaan", 10, mode=mode, window=w, wx=0.2, momentum=0.9),
        )
        for mode in ("paper", "official")
        for w in (2, 3)
    },
    "resnet, mlaan imagenet": (IMAGE, lambda: localized(resnet(), IMAGE, "mlaan", 5, mode="official", form="imagenet")),
    "resnet, mlaan without own losses": (IMAGE, lambda: localized(resnet(), IMAGE, "mlaan", 4, wx=0, window=3)),
    "resnet, hpff": (IMAGE, lambda: localized(resnet(), IMAGE, "hpff", 10)),
    "resnet, hpff official": (IMAGE, lambda: localized(resnet(), IMAGE, "hpff", 4, mode="official", wx=0.3)),
    "resnet, hpff without own losses": (IMAGE, lambda: localized(resnet(), IMAGE, "hpff", 4, wx=0, lam=(5, 0.5))),
    "mlp, mlaan, more window than blocks": (VECTOR, lambda: localized(mlp(True), VECTOR, "mlaan", 2, window=3)),
    **{
        f"vit, mlaan, window {w}": (IMAGE, lambda w=w: localized(vit(), IMAGE, "mlaan", 6, window=w, wx=0.3))
        for w in (2, 3)
    },
    **{
        f"mlp, {'norms, ' if norm else ''}window {w}, {'-'.join(kinds)}": (
            VECTOR,
            lambda norm=norm, w=w, kinds=kinds: localized(mlp(norm), VECTOR, Windowed(w, kinds), 5),
        )
        for norm in (False, True)
        for w, kinds in (
            (2, ["", "os", "os", "os"]),
            (2, ["o", "s", "o", "s"]),
            (3, ["", "", "os", "os"]),
            (3, ["o", "o", "s", "os"]),
            (3, ["", "", "s", ""]),
            (4, ["", "", "", "os"]),
        )
    },
    "mlp, all of the last loss shared": (VECTOR, lambda: localized(mlp(True), VECTOR, Windowed(2, [""] * 4, 1.0), 5)),
    "mlp, none of it shared": (VECTOR, lambda: localized(mlp(True), VECTOR, Windowed(3, ["", "", "s", "s"], 0.0), 5)),
}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def batch(shape: tuple[int, ...], step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.rand(ROWS, *shape, generator=g, dtype=torch.float64), torch.randint(0, 5, (ROWS,), generator=g)


def literal(model: fl.LocalModel, shape: tuple[int, ...], steps: int) -> list[list[float]]:
    optimizer = sgd(model.parameters())
    return [[float(loss) for loss in train_step(model, batch(shape, k), optimizer)] for k in range(steps)]


def level_a(model: fl.LocalModel, shape: tuple[int, ...], steps: int) -> list[list[float]]:
    optimizer, losses = sgd(model.parameters()), []
    for k in range(steps):
        optimizer.zero_grad()
        out = model(*batch(shape, k))
        out.loss.backward()
        optimizer.step()
        losses.append(out.losses.tolist())
    return losses


def level_b(update: str) -> Callable[..., list[list[float]]]:
    def run(model: fl.LocalModel, shape: tuple[int, ...], steps: int) -> list[list[float]]:
        engine = fl.Engine(model, lambda named: sgd([p for _, p in named]), update=update)
        return [engine.step(*batch(shape, k)).losses.tolist() for k in range(steps)]

    return run


def level_b_as_on_a_gpu(model: fl.LocalModel, shape: tuple[int, ...], steps: int) -> list[list[float]]:
    with as_on_gpu():
        return level_b("immediate")(model, shape, steps)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, a in ours.items():
        b = theirs[name]
        assert (a is None) == (b is None), name
        if a is None:
            continue
        if not a.is_floating_point():
            assert torch.equal(a, b), (name, a, b)
        else:
            # What one entry of the parameter may lose is measured by all of it: some are rounding alone.
            assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("run", [level_a, level_b("immediate"), level_b("end"), level_b_as_on_a_gpu])
@pytest.mark.parametrize("case", CASES)
def test_one_forward_equals_the_streams_run_one_by_one(case: str, run: Callable[..., list[list[float]]]) -> None:
    torch.manual_seed(0)
    shape, make = CASES[case]
    model = make().train()
    twin = copy.deepcopy(model)
    ours, theirs = run(model, shape, 2), literal(twin, shape, 2)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-13)
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same(case: str) -> None:
    torch.manual_seed(0)
    shape, make = CASES[case]
    model = make().train()
    twin = copy.deepcopy(model)
    model(*batch(shape, 0)).loss.backward()
    train_step(twin, batch(shape, 0), torch.optim.SGD(twin.parameters(), lr=0.0))
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (model, twin))
    assert_same(ours, theirs)
    assert sum(g is not None and float(g.abs().sum()) > 0 for g in ours.values()) >= 4


@pytest.mark.parametrize(("window", "kinds"), [(2, ["", "os", "os", "os"]), (3, ["o", "o", "s", "os"])])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_streams_train_what_they_say(window: int, kinds: list[str], share: float) -> None:
    """Block j is trained by its own loss and the shared ones of blocks j to j + window - 1: the gradient of their sum in one
    graph without a border, as the streams' numbers are the same.
    """
    torch.manual_seed(0)
    method = Windowed(window, kinds, share)
    model = localized(mlp(True), VECTOR, method, 5).train()
    x, y = batch(VECTOR, 0)
    ctx = model.context((x,), {}, y)
    own, shared, h = [], [], x
    zero = torch.zeros((), dtype=torch.float64)
    for block in model.blocks:
        h = block(h)
        head = block.head
        if isinstance(head, CascadeHead):
            own.append(head.own(h, ctx).loss if head.own is not None else zero)
            shared.append(head.shared(h, ctx).loss if head.shared is not None else zero)
        elif head is not None:
            own.append(zero)
            shared.append(zero)
    last = model.final_loss(h, y)
    own.append((1 - share) * last)
    shared.append(share * last)
    expected = {}
    for j, block in enumerate(model.blocks):
        total = own[j] + sum(shared[j : j + window])
        params = [p for _, p in block.named_parameters() if block.head is None or p not in set(block.head.parameters())]
        for p, g in zip(params, torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)):
            expected[p] = g
    train_step(model, (x, y), torch.optim.SGD(model.parameters(), lr=0.0))
    for p, g in expected.items():
        assert (p.grad is None) == (g is None)
        assert g is None or torch.allclose(p.grad, g, rtol=1e-12, atol=1e-14)


def test_statistics_move_as_often_as_the_published_code_runs_a_unit() -> None:
    torch.manual_seed(0)
    model = localized(resnet(), IMAGE, "hpff", 10).train()
    model(*batch(IMAGE, 0))
    net = model.backbone
    counts = [int(net.bn1.num_batches_tracked)]
    counts += [int(unit.bn1.num_batches_tracked) for name, unit in net.units()[1:]]
    assert counts == [1, 2, *[3] * 7, 2]
    model = localized(resnet(), IMAGE, "mlaan", 10, form="imagenet").train()
    model(*batch(IMAGE, 0))
    net = model.backbone
    counts = [int(net.bn1.num_batches_tracked)]
    counts += [int(unit.bn1.num_batches_tracked) for name, unit in net.units()[1:]]
    assert counts == [1, 2, 3, *[4] * 5, 3, 2]


@pytest.mark.parametrize("level", ["A", "B"])
def test_every_unit_runs_once(level: str) -> None:
    torch.manual_seed(0)
    model = localized(resnet(), IMAGE, "mlaan", 10, window=3).train()
    ran: dict[str, int] = {}
    engine = fl.Engine(model, lambda named: sgd([p for _, p in named])) if level == "B" else None
    for name, unit in model.backbone.units()[1:]:
        unit.register_forward_hook(lambda *_, name=name: ran.update({name: ran.get(name, 0) + 1}))
    x, y = batch(IMAGE, 0)
    engine.step(x, y) if engine else model(x, y).loss.backward()
    assert set(ran.values()) == {1} and len(ran) == 9


def test_only_the_window_is_alive() -> None:
    """When a block's head runs, its graph and that of the block before live."""
    torch.manual_seed(0)
    model = localized(mlp(True), VECTOR, Windowed(2, ["", "os", "os", "os"]), 5).train()
    alive: dict[int, Any] = {}
    seen = []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, k: int) -> Tensor:
            ctx.token = type("Token", (), {})()
            alive[k] = weakref.ref(ctx.token)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g, None

    for k, block in enumerate(model.blocks[:-1]):
        model._adapter.slices[k] = (*block.fns, lambda h, k=k: Kept.apply(h, k))  # type: ignore[union-attr, misc]
        if isinstance(block.head, CascadeHead):
            block.head.parts = _counted(block.head.parts, alive, seen)  # type: ignore[method-assign]
    model(*batch(VECTOR, 0))
    assert seen == [2, 2, 2]


def _counted(parts: Callable[..., Any], alive: dict[int, Any], seen: list[int]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        seen.append(sum(ref() is not None for ref in alive.values()))
        return parts(*args)

    return run


def test_frozen_blocks_are_passed_through() -> None:
    torch.manual_seed(0)
    net = mlp(True)
    net.layers[2].requires_grad_(False)
    model = localized(net, VECTOR, Windowed(3, ["", "", "os", "os"]), 5).train()
    twin = copy.deepcopy(model)
    level_a(model, VECTOR, 2)
    literal(twin, VECTOR, 2)
    assert_same(model.state_dict(), twin.state_dict())
    assert all(p.grad is None for p in model.backbone.layers[2].parameters())
    assert model.backbone.layers[1].linear.weight.grad is not None


def test_momentum_is_what_it_was_after_a_step_and_after_a_failure() -> None:
    torch.manual_seed(0)
    model = localized(resnet(), IMAGE, "mlaan", 10).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(*batch(IMAGE, 0))
    assert {m.momentum for m in norms} == {0.1}

    def fail(*_: Any) -> None:
        raise RuntimeError("here")

    model.backbone.layer3[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="here"):
        model(*batch(IMAGE, 0))
    assert {m.momentum for m in norms} == {0.1}


def test_networks_and_numbers_that_cannot_be_rewritten_are_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        ArgumentError, match=r"which needs a network that can be sliced; give .* units\(\) and readout\(\)"
    ):
        localized(TorchvisionStyleResNet(), IMAGE, Windowed(2, [""]), ["layer2"])
    net = mlp(True)
    net.layers[1].bn.momentum = None
    with pytest.raises(ArgumentError, match=r"momentum=None \(a cumulative average\).*give it a momentum"):
        localized(net, VECTOR, Windowed(2, [""] * 4), 5)
    model = localized(mlp(False), VECTOR, Windowed(2, [""] * 4), 5)
    with pytest.raises(ArgumentError, match=r"fp16.*reach several blocks; use .bf16-mixed. or .32-true."):
        fl.Engine(model, lambda named: sgd([p for _, p in named]), precision="fp16")


def test_the_streams_need_blocks_that_run_alone() -> None:
    torch.manual_seed(0)
    model = localized(mlp(False), VECTOR, Windowed(2, [""] * 4), 5)
    for block in model.blocks:
        block.fns = None
    with pytest.raises(ArgumentError, match=r"net: MLP is cut by hooks.*give the network units\(\) and readout\(\)"):
        train_step(model, batch(VECTOR, 0), sgd(model.parameters()))
