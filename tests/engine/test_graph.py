"""graph="on" against eager steps, bit for bit, with graphs that record operators in place of a device's."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models, ops
from fastlocal.engine.clip import Clip
from fastlocal.engine.graph import MAX_GRAPHS, WARM_UP, graph_device
from fastlocal.errors import ArgumentError, BackendError, NonFiniteError
from fastlocal.ops._dispatch import as_on_gpu
from tests.engine import recorder
from tests.engine.untouched import assert_same, state_of

OPTIONS: dict[str, dict[str, Any]] = {"auglocal": {"blocks": 4, "depth": 1}, "infopro": {"lam": (5.0, 0.5)}}
METHODS = ["dgl", "auglocal", "predsim", "infopro"]
Make = Callable[[Any], torch.optim.Optimizer]


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-3, weight_decay=0.01)


def fused_sgd(named: Any) -> torch.optim.Optimizer:
    return ops.FusedSGD(named, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def fused_adamw(named: Any) -> torch.optim.Optimizer:
    return ops.FusedAdamW(named, lr=1e-3, weight_decay=0.01, max_norm=1.0)


OPTIMIZERS: dict[str, Make] = {"sgd": sgd, "adamw": adamw, "fused_sgd": fused_sgd, "fused_adamw": fused_adamw}


def localized(method: str = "dgl", **options: Any) -> fl.LocalModel:
    torch.manual_seed(0)
    net = models.ResNetCIFAR(1, width=4, **options)
    how = {"blocks": 3} | OPTIONS.get(method, {})
    model = fl.localize(net, method, sample=torch.randn(2, 3, 8, 8), **how)
    assert len(model.blocks) == 3
    return model


def batch(seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 8, 8, generator=g), torch.randint(10, (rows,), generator=g)


class Pair:
    """An eager engine and one with graphs, which do the same."""

    def __init__(self, model: fl.LocalModel, make: Make = sgd, **options: Any):
        self.eager = recorder.eager(copy.deepcopy(model), make, **options)
        self.graph = recorder.engine(copy.deepcopy(model), make, **options)
        self.both = (self.eager, self.graph)

    @property
    def graphs(self) -> Any:
        return self.graph._graphs

    def step(self, *data: Any, **named: Any) -> Any:
        state = torch.get_rng_state()
        expected = self.eager.step(*data, **named)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        got = self.graph.step(*data, **named)
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(got.losses, expected.losses, rtol=0, atol=0, equal_nan=True)
        assert got.step == expected.step and torch.equal(got.correct, expected.correct)
        assert (got.logits is None) == (expected.logits is None)
        if got.logits is not None:
            torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0, equal_nan=True)
        return got

    def check(self) -> None:
        a, b = self.both
        assert_same(dict(a.model.state_dict()), dict(b.model.state_dict()))
        assert_same(a.state_dict(), b.state_dict())
        assert torch.equal(a._guard.first_bad, b._guard.first_bad)
        assert all(p.grad is None for p in b.model.parameters())

    def each(self, change: Callable[[fl.Engine], Any]) -> None:
        for engine in self.both:
            change(engine)


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_with_changing_rates_and_an_odd_last_batch(method: str) -> None:
    pair = Pair(localized(method))
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(e.optimizer, 20) for e in pair.both]
    for i in range(20):
        pair.step(*batch(i, 3 if i % 5 == 4 else 6))
        for scheduler in schedulers:
            scheduler.step()
        rates = [g["lr"] for g in pair.graph.optimizer.param_groups]
        assert all(type(r) is float for r in rates) and rates == [g["lr"] for g in pair.eager.optimizer.param_groups]
    pair.check()
    assert (pair.graphs.captures, pair.graphs.eager, pair.graphs.replays) == (2, 3 + WARM_UP, 15)


@pytest.mark.parametrize("method", METHODS)
def test_the_operators_of_a_gpu(method: str) -> None:
    with as_on_gpu():
        pair = Pair(localized(method), fused_sgd)
        for i in range(6):
            pair.step(*batch(i))
        pair.check()
    assert pair.graphs.replays == 3


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: str, update: str) -> None:
    pair = Pair(localized(), OPTIMIZERS[optimizer], update=update)
    for i in range(8):
        for engine in pair.both:
            for k, g in enumerate(engine.optimizer.param_groups):
                g["lr"] = 0.01 * (1 + (k == 1)) / (i + 1)
        pair.step(*batch(i, 3 if i == 6 else 6))
        inner: Any = pair.graph.optimizer.blocks[0]
        if optimizer == "fused_adamw":
            assert torch.equal(inner.norm, pair.eager.optimizer.blocks[0].norm) and inner.norm > 0
    pair.check()
    assert pair.graphs.replays >= 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", ["dgl", "infopro"])
def test_half_precision(method: str, precision: str) -> None:
    pair = Pair(localized(method), precision=precision)
    for i in range(8):
        x, y = batch(i)
        if i == 6 and method == "dgl":
            x[0, 0, 0, 0] = 1e30  # overflows: the loss scales fall
        pair.step(x, y)
    pair.check()
    assert pair.graphs.replays >= 3
    if precision == "16-mixed" and method == "dgl":
        assert pair.graph.skipped.sum() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.05}, {"clip": Clip(0.01, "agc")}, {"clip": Clip(0.05, scope="global"), "update": "end"},
        {"memory_format": "channels_last"}, {"backend": "reference"},
    ],
    ids=str,
)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    def make(named: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(named, lr=0.1, momentum=0.9, fused=True)

    pair = Pair(localized(), make, **options)
    for i in range(7):
        pair.step(*batch(i))
    pair.check()
    assert pair.graphs.replays == 4


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_a_batch_that_is_not_finite(update: str) -> None:
    pair = Pair(localized(), update=update, nonfinite="skip")
    for i in range(9):
        x, y = batch(i)
        if i in (1, 5, 7):
            x[0] = float("nan")
        pair.step(x, y)
        assert pair.graph._guard.first_bad.max() == (-1 if i < 1 else 1)
    pair.check()
    pair.each(lambda e: e._guard.first_bad.fill_(-1))
    x, y = batch(9)
    pair.step(x * float("inf"), y)
    assert pair.graph._guard.first_bad.tolist() == [9.0] * 3, "the number of the step is not that of the capture"
    pair.graph.nonfinite = "raise"
    with pytest.raises(NonFiniteError, match="at step 9"):
        pair.graph.flush()


def test_dropout_follows_the_stream() -> None:
    pair = Pair(localized(dropout=0.5))
    torch.manual_seed(5)
    first = pair.step(*batch(0)).losses
    for _ in range(6):
        pair.step(*batch(0))
    assert pair.graphs.replays == 4
    pair.check()
    assert not torch.equal(first, pair.step(*batch(0)).losses)


def test_deterministic_without_random_numbers() -> None:
    pair = Pair(localized(), deterministic=True)
    for i in range(5):
        pair.step(*batch(i))
    pair.check()
    assert pair.graphs.replays == 2


def test_a_network_cut_by_hooks_with_named_inputs() -> None:
    from tests.engine.nets import TorchvisionStyleResNet

    class Named(TorchvisionStyleResNet):
        def forward(self, image: Tensor, flip: bool = False) -> Tensor:
            return super().forward(image.flip(-1) if flip else image)

    torch.manual_seed(0)
    model = fl.localize(Named(), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8))
    pair = Pair(model)
    for i in range(10):
        x, y = batch(i)
        pair.step(image=x, labels=y % 5, flip=i % 2 == 1)
    pair.check()
    assert pair.graphs.captures == 2, "an input that is no tensor is part of the shape"


def test_outputs_outlive_the_next_steps() -> None:
    pair = Pair(localized())
    outs = [(pair.eager.step(*batch(i)), pair.graph.step(*batch(i))) for i in range(7)]
    for a, b in outs:
        assert torch.equal(a.losses, b.losses) and torch.equal(a.correct, b.correct)
        assert torch.equal(a.logits, b.logits)


def test_adam_is_capturable_while_it_is_captured_and_at_no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a capture otherwise, and warns in eager steps."""
    engine = recorder.engine(localized(), adamw)
    device: Any = engine._graphs._device
    seen: list[bool] = []

    def check(self: torch.optim.Optimizer) -> None:
        assert all(g["capturable"] == device.capturing for g in self.param_groups)
        seen.append(device.capturing)

    monkeypatch.setattr(torch.optim.AdamW, "_accelerator_graph_capture_health_check", check)
    for i in range(5):
        engine.step(*batch(i))
    assert seen == [False] * 9 + [True] * 3
    assert not any(g["capturable"] for g in engine.optimizer.param_groups)


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls: eager steps and captures on one side stream, one pool, streams wait for one another."""
    calls: list[Any] = []
    device = torch.device("cuda", 0)

    class Stream:
        def __init__(self, where: Any = None, name: str = "side"):
            self.name = name

        def wait_stream(self, other: Any) -> None:
            calls.append((self.name, "waits for", other.name))

    class Graph:
        def pool(self) -> str:
            return "pool of the first"

        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def stream(s: Any) -> Iterator[None]:
        calls.append(("on", s.name))
        yield
        calls.append(("off", s.name))

    @contextmanager
    def capture(graph: Any, pool: Any, s: Any, capture_error_mode: str) -> Iterator[None]:
        calls.append(("begin", pool, s.name))
        try:
            yield
        finally:
            calls.append("end")
            if "broken" in calls:
                raise RuntimeError("capture invalidated")

    main = Stream(name="main")
    fakes = dict(Stream=Stream, CUDAGraph=Graph, stream=stream, graph=capture, current_stream=lambda d: main)
    fakes |= dict(graph_pool_handle=lambda: "a pool", get_rng_state=lambda d: "state")
    fakes |= dict(set_rng_state=lambda s, d: calls.append(("random", s)))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs: Any = graph_device(device)
    assert calls == [] and graphs.rate_dtype == torch.float32
    around = [("side", "waits for", "main"), ("on", "side")], [("off", "side"), ("main", "waits for", "side")]
    with graphs.warm_up():
        calls.append("step")
    assert calls == [*around[0], "step", *around[1]]
    calls.clear()
    first = graphs.capture(lambda: calls.append("step"), [])
    assert calls == [*around[0], ("begin", "a pool", "side"), "step", "end", *around[1]]
    calls.clear()
    graphs.capture(lambda: calls.append("step"), [first]).replay()
    assert calls[2] == ("begin", "pool of the first", "side") and calls[-1] == "replay"

    def breaks() -> None:
        calls.append("broken")
        raise ValueError("an operator")

    with pytest.raises(ValueError, match="an operator"):
        graphs.capture(breaks, [])
    assert ("random", "state") in calls


# ---------------------------------------------------------------------------------------------------------------- state


def test_accumulation_stays_eager_and_the_graph_goes_on_after_it() -> None:
    pair = Pair(localized())
    for i in range(12):
        if i % 4 == 3:
            for engine in pair.both:
                engine.accumulate(*batch(100 + i, 4))
        pair.step(*batch(i))
    pair.check()
    assert (pair.graphs.captures, pair.graphs.replays) == (1, 12 - 3 - 3)


def test_a_resumed_engine_continues_bitwise() -> None:
    model = localized()
    straight = Pair(model)
    for i in range(5):
        straight.step(*batch(i))
    saved = copy.deepcopy((straight.graph.model.state_dict(), straight.graph.state_dict()))
    assert all(type(g["lr"]) is float for g in saved[1]["optimizer"]["param_groups"])
    resumed = Pair(model)
    resumed.each(lambda e: e.model.load_state_dict(saved[0]))
    resumed.each(lambda e: e.load_state_dict(copy.deepcopy(saved[1])))  # torch's optimizers keep the tensors
    for i in range(5, 12):
        out = straight.step(*batch(i))
        assert torch.equal(out.losses, resumed.step(*batch(i)).losses)
    straight.check()
    resumed.check()
    assert resumed.graphs.replays >= 4


def test_a_state_loaded_between_replays() -> None:
    pair = Pair(localized())
    for i in range(5):
        pair.step(*batch(i))
    saved = copy.deepcopy((pair.graph.model.state_dict(), pair.graph.state_dict()))
    for i in range(5, 8):
        pair.step(*batch(i))
    pair.each(lambda e: e.model.load_state_dict(saved[0]))
    pair.each(lambda e: e.load_state_dict(copy.deepcopy(saved[1])))
    replays = pair.graphs.replays
    for i in range(5, 10):
        pair.step(*batch(i))
    pair.check()
    assert pair.graph.steps == 10 and pair.graphs.captures == 2 and pair.graphs.replays > replays


def test_averages_in_the_update() -> None:
    pair = Pair(localized(), fused_sgd)
    averages: list[list[Tensor]] = []
    decays = []
    for engine in pair.both:
        decay = torch.tensor(0.5, dtype=torch.float64)
        inner: Any = engine.optimizer.blocks[1]
        params = inner.param_groups[0]["params"]
        averages.append([p.detach().clone() for p in params])
        inner.link(zip(params, averages[-1]), decay)
        decays.append(decay)
    for i in range(8):
        for decay in decays:
            decay.fill_(0.5 + 0.05 * i)
        pair.step(*batch(i))
        assert all(torch.equal(a, b) for a, b in zip(*averages))
    assert pair.graphs.replays == 5
    pair.check()


# --------------------------------------------------------------------------------------------------------- what changes


def freeze(engine: fl.Engine) -> None:
    for p in list(engine.model.backbone.parameters())[:3]:
        p.requires_grad_(False)


def replace_module(engine: fl.Engine) -> None:
    net: Any = engine.model.backbone
    for module in net.modules():
        for name, child in module.named_children():
            if type(child) is nn.ReLU:
                setattr(module, name, nn.LeakyReLU(0.3))


def move(engine: fl.Engine) -> None:
    for p in engine.model.parameters():
        p.data = p.data.clone()


def move_buffers(engine: fl.Engine) -> None:
    for m in engine.model.modules():
        for key, b in m._buffers.items():
            if b is not None:
                m._buffers[key] = b.clone()


def move_a_counter(engine: fl.Engine) -> None:
    """Equal in value, so that comparing the tensors would not tell."""
    norm = next(m for m in engine.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm._buffers["num_batches_tracked"] = norm._buffers["num_batches_tracked"].clone()  # type: ignore[union-attr]


def eval_norm(engine: fl.Engine) -> None:
    next(m for m in engine.model.modules() if isinstance(m, nn.BatchNorm2d)).eval()


def norm_momentum(engine: fl.Engine) -> None:
    next(m for m in engine.model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.5


def weight_decay(engine: fl.Engine) -> None:
    for g in engine.optimizer.param_groups:
        g["weight_decay"] = 0.2


def hook(engine: fl.Engine) -> None:
    next(m for m in engine.model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda m, i, o: o * 0.5)


def grad_hook(engine: fl.Engine) -> None:
    next(engine.model.backbone.parameters()).register_hook(lambda g: g * 0.5)


def forget_momentum(engine: fl.Engine) -> None:
    for inner in engine.optimizer.blocks:
        assert inner is not None
        for state in inner.state.values():
            state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])


def load_optimizer(engine: fl.Engine) -> None:
    state = copy.deepcopy(engine.optimizer.state_dict())
    for s in state["state"].values():
        s["momentum_buffer"].mul_(0.5)
    engine.optimizer.load_state_dict(state)


def criterion(engine: fl.Engine) -> None:
    engine.model.criterion = nn.CrossEntropyLoss(label_smoothing=0.2)


def clip(engine: fl.Engine) -> None:
    engine.clip = Clip(0.01)


def own_attribute(engine: fl.Engine) -> None:
    engine.model.backbone.strength = 3.0


def own_tensor(engine: fl.Engine) -> None:
    """The same object with the same value, elsewhere."""
    net: Any = engine.model.backbone
    net.shift.data = net.shift.data.clone()


def own_list(engine: fl.Engine) -> None:
    net: Any = engine.model.backbone
    net.factors[0] = 0.5


CHANGES = [
    freeze, replace_module, move, move_buffers, move_a_counter, eval_norm, norm_momentum, weight_decay, hook, grad_hook,
    forget_momentum, load_optimizer, criterion, clip, own_attribute, own_tensor, own_list,
]  # fmt: skip


class Scaled(models.ResNetCIFAR):
    """Reads numbers of its own at every forward."""

    strength = 1.0

    def __init__(self) -> None:
        super().__init__(1, width=4)
        self.strength = 1.0
        self.shift = torch.zeros(1)
        self.factors = [1.0]

    def readout(self, h: Tensor) -> Tensor:
        return (super().readout(h) + self.shift) * (self.strength * self.factors[0])


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_between_steps_is_captured_anew(change: Callable[[fl.Engine], None]) -> None:
    torch.manual_seed(0)
    pair = Pair(fl.localize(Scaled(), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8)))
    for i in range(5):
        pair.step(*batch(i))
    assert pair.graphs.captures == 1
    pair.each(change)
    for i in range(5, 11):
        for engine in pair.both:
            net: Any = engine.model.backbone
            net.shift += torch.arange(10.0)[i - 5]  # in place: that is no change of what is captured
        pair.step(*batch(i))
    pair.check()
    assert pair.graphs.captures == 2 and pair.graphs.replays > 4


def test_options_of_a_fused_optimizer_and_settings_are_captured_anew() -> None:
    pair = Pair(localized(), fused_adamw)
    averages: list[list[Tensor]] = []
    for i in range(24):
        if i == 5:
            pair.each(lambda e: [setattr(o, "max_norm", 0.01) for o in e.optimizer.blocks])
        if i == 19:
            pair.each(lambda e: [setattr(o, "seed", 7) for o in e.optimizer.blocks])
        if i == 9:
            for engine in pair.both:
                inner: Any = engine.optimizer.blocks[0]
                own = inner.param_groups[0]["params"]
                averages.append([p.detach().clone() for p in own])
                inner.link(zip(own, averages[-1]), 0.5)
        with ops.backend("reference" if i >= 14 else "auto"):
            pair.step(*batch(i))
    assert all(torch.equal(a, b) for a, b in zip(*averages))
    pair.check()
    assert pair.graphs.captures == 5


def test_what_is_undone_or_set_anew_to_the_same_keeps_the_graph() -> None:
    pair = Pair(localized(dropout=0.1))
    for i in range(10):
        pair.step(*batch(i))
        for engine in pair.both:
            engine.model.eval()
            engine.model(batch(0)[0])
            engine.model.train()
            engine.model.load_state_dict(copy.deepcopy(engine.model.state_dict()))
            for m in engine.model.modules():
                if isinstance(m, nn.Dropout):
                    m.p = 0.2 / 2
            handle = engine.model.backbone.register_forward_hook(lambda m, i, o: None)
            handle.remove()
    pair.check()
    assert (pair.graphs.captures, pair.graphs.replays) == (1, 7)


def test_rates_as_tensors() -> None:
    made: list[int] = []

    def make(named: Any) -> torch.optim.Optimizer:
        made.append(len(named))
        k = (len(made) - 1) % 3
        lr = torch.tensor(0.1 * k, dtype=torch.float64) if k else 0.1
        return torch.optim.SGD(named, lr=lr, momentum=0.9, fused=True)

    pair = Pair(localized(), make)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(e.optimizer, 0.7) for e in pair.both]
    own = [g["lr"] for g in pair.graph.optimizer.param_groups]
    for i in range(8):
        pair.step(*batch(i))
        for s in schedulers:
            s.step()
    assert all(a is g["lr"] for a, g in list(zip(own, pair.graph.optimizer.param_groups))[1:])
    pair.check()
    assert (pair.graphs.captures, pair.graphs.replays) == (1, 5)


def test_many_shapes_have_a_limit() -> None:
    pair = Pair(localized())
    with pytest.warns(UserWarning, match=r"20 steps have run and none is captured: every shape .* 10 were seen"):
        for i in range(4):
            for rows in range(2, 2 + MAX_GRAPHS + 2):
                pair.step(*batch(i, rows))
    pair.check()
    assert pair.graphs.captures == MAX_GRAPHS


def test_inputs_that_cannot_be_copied_stay_eager() -> None:
    pair = Pair(localized())
    for i in range(5):
        x, y = batch(i)
        pair.step(x[:1].expand(6, -1, -1, -1), y)
        pair.step(x.clone().requires_grad_(), y)
    pair.check()
    assert pair.graphs.captures == 0 and pair.graphs.eager == 10
    assert "holds what cannot be copied" in pair.graph.explain()


def test_inputs_with_gaps_and_shared_tensors() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    torch.manual_seed(0)
    model = fl.localize(net, "dgl", blocks=2, sample=torch.randn(5, 4))
    pair = Pair(model)
    for i in range(6):
        wide = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        pair.step(wide[:, ::2], torch.arange(5) % 3)
    pair.check()
    assert pair.graphs.replays == 3
    assert pair.graphs._shapes[pair.graphs._batch.key].inputs[0].stride() == (8, 2)
    pair.step(torch.randn(5, 4), torch.arange(5) % 3)
    assert (pair.graphs.replays, pair.graphs.eager) == (3, 4), "other strides are another shape"


# --------------------------------------------------------------------------------------------------------------- refuse


def test_a_cpu_has_no_graphs() -> None:
    model = localized()
    with pytest.raises(BackendError, match=r"^graph: 'on' needs a CUDA device, the model is on cpu; move it there"):
        fl.Engine(model, sgd, graph="on")
    assert "graph: off; 'auto' is eager" in fl.Engine(model, sgd).explain()
    assert "graph: off; as asked for" in fl.Engine(model, sgd, graph="off").explain()
    with pytest.raises(BackendError):
        graph_device(torch.device("cpu"))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda named: torch.optim.SGD(named, lr=0.1, foreach=True),
            "SGD, cannot leave out a step.*use SGD .*fused=True",
        ),
        (lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9, dampening=0.1), "cannot leave out a step"),
        (lambda named: torch.optim.RMSprop(named, lr=0.1), "RMSprop, cannot leave out a step"),
    ],
)
def test_optimizers_that_a_graph_cannot_hold(make: Make, message: str) -> None:
    model = localized()
    before = state_of(model)
    with pytest.raises(BackendError, match=message):
        recorder.engine(model, make, memory_format="channels_last")
    assert_same(before, state_of(model))


def test_an_unknown_optimizer_and_one_with_hooks() -> None:
    class Own(torch.optim.SGD):
        pass

    def make(named: Any) -> torch.optim.Optimizer:
        return Own(named, lr=0.1, fused=True)

    def hooked(named: Any) -> torch.optim.Optimizer:
        made = sgd(named)
        made.register_step_post_hook(lambda *a: None)
        return made

    def declared(named: Any) -> torch.optim.Optimizer:
        made = make(named)
        made.param_groups[0]["capturable"] = True
        return made

    with pytest.raises(
        BackendError, match=r"Own, is not known to keep all that changes on the device.*capturable=True"
    ):
        recorder.engine(localized(), make)
    with pytest.raises(BackendError, match=r"has step hooks.*register them on engine.optimizer"):
        recorder.engine(localized(), hooked)
    pair = Pair(localized(), declared)
    for i in range(10):
        if i == 6:  # its rate may be captured, so it is
            pair.each(lambda e: [g.update(lr=0.05) for g in e.optimizer.param_groups])
        pair.step(*batch(i))
    pair.check()
    assert pair.graphs.captures == 2


def test_hooks_of_the_whole_optimizer_run_at_every_step() -> None:
    engine = recorder.engine(localized(), sgd)
    calls: list[int] = []
    engine.optimizer.register_step_post_hook(lambda *a: calls.append(engine.steps))
    for i in range(6):
        engine.step(*batch(i))
    assert calls == list(range(6)) and engine._graphs.replays == 3


def test_random_streams_of_blocks_are_refused() -> None:
    with pytest.raises(BackendError, match=r"^graph: deterministic=True gives each block a random stream"):
        recorder.engine(localized(dropout=0.5), sgd, deterministic=True)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("method", ["dgl", "predsim"])
def test_a_failed_capture_changes_nothing(method: str, precision: str) -> None:
    pair = Pair(localized(method), precision=precision)
    steps = 3 if precision == "32-true" else 4  # the buffer of the casts has found its size
    for i in range(steps):
        pair.step(*batch(i))
    device: Any = pair.graphs._device
    before = state_of(pair.graph.model, optimizer=pair.graph.optimizer)
    for operator in (
        "_fused_sgd_",
        "_amp_foreach_non_finite_check_and_unscale_",
        "convolution_backward",
        "convolution",
    ):
        device.fail_at = operator
        with pytest.raises(BackendError, match=rf"could not be captured, at its .*{operator}.*Nothing was changed"):
            pair.graph.step(*batch(3))
        assert_same(before, state_of(pair.graph.model, optimizer=pair.graph.optimizer))
        assert pair.graph.steps == steps and all(type(g["lr"]) is float for g in pair.graph.optimizer.param_groups)
    device.fail_at = None
    for i in range(steps, 8):
        pair.step(*batch(i))
    pair.check()
    assert pair.graphs.captures == 1


def test_a_read_in_the_forward_is_named() -> None:
    class Reads(Scaled):
        def readout(self, h: Tensor) -> Tensor:
            return super().readout(h) * (2.0 if float(h.sum()) > 0 else 1.0)

    torch.manual_seed(0)
    engine = recorder.engine(fl.localize(Reads(), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8)), sgd)
    for i in range(3):
        engine.step(*batch(i))
    with pytest.raises(
        BackendError, match=r"block 2 \('.*'\) could not be captured, at its forward: RuntimeError: _local_sca"
    ):
        engine.step(*batch(3))


class Remembers(Scaled):
    """Replaces a tensor in every forward, from the moment on that it is told."""

    remembers = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(()))

    def readout(self, h: Tensor) -> Tensor:
        if Remembers.remembers:
            self.average = 0.5 * self.average + h.detach().mean()
        return super().readout(h) + self.average


def test_a_tensor_that_every_step_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pair = Pair(fl.localize(Remembers(), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8)))
    for i in range(3):
        pair.step(*batch(i))
    monkeypatch.setattr(Remembers, "remembers", True)  # nothing that a stamp sees: the capture itself shows it
    before = state_of(pair.graph.model)
    with pytest.raises(BackendError, match=r"replaces what the next one reads.*Write into it in place"):
        pair.graph.step(*batch(3))
    assert_same(before, state_of(pair.graph.model))
    monkeypatch.setattr("fastlocal.engine.graph._PATIENCE", 7)
    pair = Pair(fl.localize(Remembers(), "dgl", blocks=3, sample=torch.randn(2, 3, 8, 8)))
    with pytest.warns(
        UserWarning, match=r"7 steps have run and none is captured: changed since: .*parameters, buffers"
    ):
        for i in range(8):
            pair.step(*batch(i))
    pair.check()
    assert pair.graphs.captures == 0


def test_bad_batches_are_refused_as_ever() -> None:
    engine = recorder.engine(localized(), sgd)
    x, y = batch(0)
    for i in range(5):
        engine.step(*batch(i))
    for bad in ((x[:0], y[:0]), (x, y[:3]), (x[:1], y[:1]), (x, y.int())):
        with pytest.raises(ArgumentError):
            engine.step(*bad)
    engine.model.eval()
    with pytest.raises(ArgumentError, match="eval mode"):
        engine.step(x, y)
    assert engine.steps == 5


def test_graphs_and_their_memory_go() -> None:
    engine = recorder.engine(localized(), sgd)
    for i in range(5):
        engine.step(*batch(i))
    shape = next(iter(engine._graphs._shapes.values()))
    ref = weakref.ref(shape.results.flats[0])
    old = weakref.ref(next(engine.model.parameters()).untyped_storage())
    assert ref() is not None
    move(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.step(*batch(5))
    del shape
    gc.collect()
    assert ref() is None
    assert old is not None
