"""The engine's own behaviour: outputs, state, streams, precision, its optimizers' forms. Its numbers: test_levels_equal."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.types import StepContext
from fastlocal.engine.output import KEEP_LOGITS, KEEP_SCORES, count_correct
from tests.engine.untouched import assert_same, state_of

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 9, 1, 1, 2])


def localized(blocks: Any = 3, dropout: float = 0.0) -> fl.LocalModel:
    torch.manual_seed(0)
    return fl.localize(models.ResNetCIFAR(1, width=4, dropout=dropout), "dgl", blocks=blocks, sample=X[:2])


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


# --------------------------------------------------------------------------------------------------------------- output


def test_step_output() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    twin = copy.deepcopy(model)
    out = engine.step(X, Y)
    again = engine.step(X, Y)
    assert (out.step, again.step, engine.steps) == (0, 1, 2)
    assert out.losses.shape == (3,) and not out.losses.requires_grad and out.losses.dtype == torch.float32
    assert torch.equal(out.loss, out.losses.sum()) and out.logits is not None and out.logits.shape == (6, 10)
    assert out.correct.shape == (3,) and out.correct.dtype == torch.int64
    assert int(out.correct[-1]) == int((out.logits.argmax(1) == Y).sum())
    assert torch.equal(out.losses[-1], model.criterion(out.logits, Y))
    assert torch.equal(twin(X, Y).correct, out.correct)
    assert repr(out).startswith("StepOutput(step=0, losses=[")
    assert engine.flush() == []


def test_batches_of_every_kind_are_the_same_step() -> None:
    def batch(b: Any) -> Any:
        return (b["image"],), {}, b["class"]

    results = []
    for args, kwargs in (((X, Y), {}), (((X, Y),), {}), (([X, Y],), {}), ((X,), {"labels": Y})):
        results.append(fl.Engine(localized(), momentum).step(*args, **kwargs).losses)
    model = localized()
    model._batch = batch
    results.append(fl.Engine(model, momentum).step({"image": X, "class": Y}).losses)
    for losses in results[1:]:
        assert torch.equal(losses, results[0])


def test_probabilities_as_targets() -> None:
    soft = torch.nn.functional.one_hot(Y, 10).float()
    hard, same = fl.Engine(localized(), momentum).step(X, Y), fl.Engine(localized(), momentum).step(X, soft)
    torch.testing.assert_close(same.losses, hard.losses)
    assert torch.equal(same.correct, hard.correct)


def test_what_was_in_grad_before_is_not_part_of_a_step() -> None:
    one, two = localized(), localized()
    engines = [fl.Engine(m, momentum) for m in (one, two)]
    two(X, Y).loss.backward()
    for p in two.parameters():
        assert p.grad is not None
    # a level-A forward updates BatchNorm: give both the same
    two.load_state_dict(one.state_dict())
    for engine in engines:
        engine.step(X, Y)
    assert_same(dict(one.state_dict()), dict(two.state_dict()))
    assert all(p.grad is None for p in two.parameters())


def test_large_scores_do_not_pile_up() -> None:
    """Small scores wait until somebody asks for the hits; large ones are counted at once, and large outputs not kept."""
    kept: list[weakref.ref[Tensor]] = []

    def localized_with(classes: int) -> fl.LocalModel:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, classes))
        return fl.localize(net, "predsim", losses="pred", blocks=3, sample=torch.randn(8, 4))

    for rows, classes in ((8, 10), (8, KEEP_SCORES // 8 + 1), (8, KEEP_LOGITS // 8 + 1)):
        kept.clear()
        model = localized_with(classes)
        criterion = model.criterion

        def watched(logits: Tensor, target: Tensor, criterion: Any = criterion) -> Tensor:
            kept.append(weakref.ref(logits.untyped_storage()))
            return criterion(logits, target)

        model.criterion = watched
        engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
        y = torch.zeros(rows, dtype=torch.int64)
        out = engine.step(torch.randn(rows, 4), y)
        gc.collect()
        alive = [ref() is not None for ref in kept]
        small, fits = rows * classes <= KEEP_SCORES, rows * classes <= KEEP_LOGITS
        assert alive == [small, small, fits]
        assert (out.logits is not None) == fits and out.correct.shape == (3,)


def test_hits_of_a_head_without_scores_are_minus_one() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model = fl.localize(net, "predsim", losses="sim", blocks=3, sample=torch.randn(5, 4))
    out = fl.Engine(model, momentum).step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert out.correct[:2].tolist() == [-1, -1] and out.correct[2] >= 0


def test_count_correct_of_probabilities() -> None:
    logits = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert int(count_correct(logits, torch.tensor([[0.2, 0.8], [0.3, 0.7]]))) == 1


# ---------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(
    "options",
    [{}, {"update": "end"}, {"deterministic": True, "seed": 7}, {"precision": "bf16-mixed"}, {"precision": "16-mixed"}],
    ids=lambda o: " ".join(map(str, o.values())) or "plain",
)
def test_a_resumed_engine_continues_bitwise(options: dict[str, Any]) -> None:
    model = localized(dropout=0.3)
    engine = fl.Engine(model, momentum, **options)
    for _ in range(3):
        engine.step(X, Y)
    saved = copy.deepcopy((model.state_dict(), engine.state_dict(), torch.get_rng_state()))
    expected = [engine.step(X, Y).losses for _ in range(3)]
    final = copy.deepcopy(dict(model.state_dict()))

    fresh = localized(dropout=0.3)
    resumed = fl.Engine(fresh, momentum, **options)
    fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    assert resumed.steps == 3
    for losses in expected:
        assert torch.equal(resumed.step(X, Y).losses, losses)
    assert_same(final, dict(fresh.state_dict()))


def test_a_state_is_a_copy() -> None:
    engine = fl.Engine(localized(dropout=0.3), momentum, deterministic=True, precision="16-mixed")
    engine.step(X, Y)
    state = engine.state_dict()
    counters = {k: copy.deepcopy(v) for k, v in state.items() if k != "optimizer"}  # torch's optimizers share theirs
    engine.step(X, Y)
    assert_same(counters, {k: v for k, v in state.items() if k != "optimizer"})
    assert state["steps"] == 1 and engine.steps == 2


def test_streams_in_a_state_do_not_bind_an_engine_without_them() -> None:
    """They would switch the caller's own generator."""
    engine = fl.Engine(localized(dropout=0.3), momentum, deterministic=True)
    engine.step(X, Y)
    plain = fl.Engine(localized(dropout=0.3), momentum)
    plain.load_state_dict(copy.deepcopy(engine.state_dict()))
    assert plain.state_dict()["streams"] == []
    torch.manual_seed(1)
    first = plain.step(X, Y).losses
    torch.manual_seed(2)
    assert not torch.equal(plain.step(X, Y).losses, first)


def test_seeds_give_other_masks_and_equal_seeds_the_same() -> None:
    losses = []
    for seed in (0, 0, 1):
        engine = fl.Engine(localized(dropout=0.5), momentum, deterministic=True, seed=seed)
        torch.manual_seed(int(torch.randint(0, 1000, ()).item()))  # whatever the caller's stream is
        losses.append(engine.step(X, Y).losses)
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


# ------------------------------------------------------------------------------------------------------------ optimizer


@pytest.mark.parametrize(
    "make, fused",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
        (lambda p: torch.optim.Adam(p, lr=1e-3), True),
        (lambda p: torch.optim.AdamW(p, lr=1e-3), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, foreach=False), None),
        (lambda p: torch.optim.SGD(p, lr=0.1, foreach=True), None),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=False), False),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), None),  # see LocalOptimizer
        (lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), capturable=False), None),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), "none"),
        (lambda p: type("MySGD", (torch.optim.SGD,), {})(p, lr=0.1), None),
    ],
    ids=["SGD", "Adam", "AdamW", "foreach=False", "foreach=True", "fused=False", "fused=True", "dampening", "lr", "RMSprop", "sub"],
)  # fmt: skip
def test_the_fused_step_is_taken_where_nothing_else_was_chosen(make: Any, fused: Any) -> None:
    engine = fl.Engine(localized(), make)
    groups = engine.optimizer.param_groups
    assert {g.get("fused", "none") for g in groups} == {fused}
    assert f"optimizer: fused step in {3 if fused is True else 0} of 3 blocks" in engine.explain()
    assert torch.isfinite(engine.step(X, Y).losses).all()
    plain = fl.Engine(localized(), make, backend="reference")
    chosen = fl.LocalOptimizer(localized(), make).param_groups
    assert [g.get("fused") for g in plain.optimizer.param_groups] == [g.get("fused") for g in chosen]


def test_loading_keeps_the_form_of_the_step() -> None:
    plain = fl.Engine(localized(), momentum, backend="reference")
    fused = fl.Engine(localized(), momentum)
    plain.step(X, Y)
    fused.step(X, Y)
    states = copy.deepcopy((plain.state_dict(), fused.state_dict()))
    plain.load_state_dict(states[1])
    fused.load_state_dict(states[0])
    assert not any(g["fused"] for g in plain.optimizer.param_groups) and all(
        g["fused"] for g in fused.optimizer.param_groups
    )
    plain.step(X, Y)
    fused.step(X, Y)


class Sometimes(nn.Module):
    """A layer that is left out of the first forwards (stochastic depth)."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rarely = nn.Linear(4, 4), nn.Linear(4, 4)
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return x + self.rarely(x) if self.use else x


@pytest.mark.parametrize("make", [momentum, lambda p: torch.optim.AdamW(p, lr=1e-2)], ids=["SGD", "AdamW"])
def test_a_layer_that_joins_later_trains_with_the_fused_step_too(make: Any) -> None:
    """Regression: PyTorch's fused SGD fails on a group in which some parameters have a momentum and others none."""
    models_ = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        net = nn.Sequential(Sometimes(), nn.Linear(4, 3))
        model = fl.localize(net, "dgl", blocks=2, sample=torch.randn(5, 4))
        engine = fl.Engine(model, make, backend=backend)  # type: ignore[arg-type]
        torch.manual_seed(1)
        for step in range(4):
            net[0].use = step in (1, 3)
            engine.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        models_.append(model)
    for (name, a), b in zip(models_[0].named_parameters(), models_[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_hooks_of_the_local_optimizer_run_once_a_step(update: Any) -> None:
    engine = fl.Engine(localized(), momentum, update=update)
    seen: list[str] = []
    engine.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    engine.optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    engine.step(X, Y)
    assert seen == ["pre", "post"]


def test_a_given_local_optimizer_is_taken_as_it_is() -> None:
    model = localized()
    optimizer = fl.LocalOptimizer(model, momentum)
    engine = fl.Engine(model, optimizer)
    assert engine.optimizer is optimizer and not any(g["fused"] for g in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------- precision and layout


class Overflow(nn.Module):
    """A head whose gradient leaves the range of float16 when told so."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.factor = head, 1.0

    def forward(self, h: Tensor, ctx: StepContext) -> Any:
        local = self.head(h, ctx)
        return local._replace(loss=local.loss * self.factor)


def scaled(engine: fl.Engine, scale: float, good: int = 0) -> fl.Engine:
    """The engine with this loss scale in every block, after ``good`` clean steps."""
    state = engine.state_dict()
    scales = [torch.full_like(v, scale) for v in state["scales"]]
    engine.load_state_dict({**state, "scales": scales, "good": [torch.full_like(g, good) for g in state["good"]]})
    return engine


def scales_of(engine: fl.Engine) -> list[float]:
    return [float(v) for v in engine.state_dict()["scales"]]


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_an_fp16_overflow_skips_its_block_and_halves_its_scale(update: Any) -> None:
    model = localized()
    head = Overflow(model.heads[1])
    model.heads[1] = head
    model.blocks[1].head = head
    engine = scaled(fl.Engine(model, momentum, precision="16-mixed", update=update), 256.0)
    engine.step(X, Y)
    assert scales_of(engine) == [256.0] * 3
    before = [state_of(model, random=False), copy.deepcopy(engine.optimizer.state_dict())]
    head.factor = 1e30
    out = engine.step(X, Y)  # no error: this is how a scale finds its place
    head.factor = 1.0
    assert torch.isfinite(out.losses).all() and not engine.should_stop
    assert scales_of(engine) == [256.0, 128.0, 256.0]
    after = state_of(model, random=False)
    changed = set()
    for block in model.blocks:
        names = [n for n, _ in block.named_parameters()] + [s.name for s in block.buffers]
        same = [torch.equal(before[0][f"0:{_path(n)}"], after[f"0:{_path(n)}"]) for n in names]
        if not all(same):
            assert not any(same), f"block {block.index} is updated in part"
            changed.add(block.index)
    assert changed == ({0, 2} if update == "immediate" else set())
    engine.step(X, Y)


def _path(name: str) -> str:
    return name.replace("heads.1.", "heads.1.head.", 1) if name.startswith("heads.1.net") else name


def test_an_fp16_scale_that_runs_out_is_an_error() -> None:
    model = localized()
    engine = scaled(fl.Engine(model, momentum, precision="16-mixed"), 4.0)
    with torch.no_grad():
        model.blocks[0].parameters()[0].fill_(float("nan"))
    engine.step(X, Y)
    engine.step(X, Y)
    assert scales_of(engine) == [1.0] * 3  # every block reads what block 0 makes
    with pytest.raises(fl.errors.NonFiniteError, match="block 0"):
        engine.step(X, Y)


def test_fp16_scales_double_after_clean_steps() -> None:
    engine = scaled(fl.Engine(localized(), momentum, precision="16-mixed"), 256.0, good=1999)
    engine.step(X, Y)
    assert scales_of(engine) == [512.0] * 3 and [int(g) for g in engine.state_dict()["good"]] == [0] * 3
    assert scales_of(fl.Engine(localized(), momentum, precision="16-mixed")) == [2.0**14] * 3


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_leaves_parameters_and_losses_in_float32(precision: str) -> None:
    model = localized()
    params = list(model.parameters())
    engine = fl.Engine(model, momentum, precision=precision)
    seen: list[torch.dtype] = []
    handle = model.backbone.layer2.register_forward_hook(lambda m, i, o: seen.append(o.dtype))  # type: ignore[union-attr]
    inner = model.backbone.layer2[0].conv1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))  # type: ignore[union-attr, index]
    out = engine.step(X, Y)
    handle.remove()
    inner.remove()
    assert seen and set(seen) == {torch.bfloat16 if "bf16" in precision else torch.float16}
    assert out.losses.dtype == torch.float32
    assert [id(p) for p in params] == [id(p) for p in model.parameters()]
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("update", ["immediate", "end"])
def test_an_error_under_mixed_precision_brings_the_float32_weights_back(precision: str, update: Any) -> None:
    model = localized()
    engine = fl.Engine(model, momentum, precision=precision, update=update)
    engine.step(X, Y)
    before = state_of(model, random=False)
    criterion = model.criterion

    def fail(logits: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    model.criterion = fail
    with pytest.raises(ZeroDivisionError):
        engine.step(X, Y)
    model.criterion = criterion
    assert_same(before, state_of(model, random=False))
    engine.step(X, Y)


def test_channels_last_reaches_the_weights_and_every_unit() -> None:
    model = localized()
    engine = fl.Engine(model, momentum, memory_format="channels_last")
    assert model.backbone.layer3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, index]
    seen: list[bool] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

    handles = [m.register_forward_hook(look) for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    engine.step(X, Y)
    for handle in handles:
        handle.remove()
    assert len(seen) == 9 and all(seen)
    assert "memory format: channels_last" in engine.explain()


# -------------------------------------------------------------------------------------------------------------- the rest


def test_explain_says_what_serves_and_what_does_not() -> None:
    text = fl.Engine(localized(), momentum, update="end").explain()
    for line in (
        "schedule: sequential; PyTorch has one thread here, which leaves none for a second worker",
        "graph: off; 'auto' is eager, because graphs have not been measured on a device",
        "backend: auto",
        "optimizer: fused step in 3 of 3 blocks",
        "precision: 32-true; memory format: preserve; update: end",
        "3 blocks as slices",
    ):
        assert line in text


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_target_values_are_read_at_every_step_only_where_that_is_free(device: str, monkeypatch: Any) -> None:
    """Tensors on the meta device stand for an accelerator: to read one is to wait for it (here, an error)."""
    model = localized().to(device)
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1), update="immediate")
    reads: list[bool] = []

    def check(target: Any, *args: Any, read: bool = True, **kwargs: Any) -> None:
        reads.append(read)
        raise InterruptedError

    monkeypatch.setattr("fastlocal.engine.model.check_target", check)
    for steps in (0, 1, 7):
        engine.steps = steps
        with pytest.raises(InterruptedError):
            engine.step(X.to(device), Y.to(device))
    assert reads == ([True, True, True] if device == "cpu" else [True, False, False])


def test_frozen_blocks_pass_their_values_on() -> None:
    model = localized()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    engine = fl.Engine(model, momentum)
    before = [p.detach().clone() for p in model.blocks[0].parameters()]
    out = engine.step(X, Y)
    assert torch.isfinite(out.losses).all() and engine.optimizer.blocks[0] is None
    assert all(torch.equal(a, b) for a, b in zip(before, model.blocks[0].parameters(), strict=True))


def test_buffers_that_a_forward_replaces_are_put_back_too() -> None:
    class Rebinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
            return h - self.mean

    torch.manual_seed(0)
    net = nn.Sequential(Rebinds(), Rebinds(), nn.Linear(4, 3))
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randn(5, 4))
    engine = fl.Engine(model, momentum, update="end", nonfinite="skip")
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    engine.step(x, y)
    before = [net[0].mean.clone(), net[1].mean.clone()]
    engine.step(x.fill_(float("nan")), y)
    assert torch.equal(before[0], net[0].mean) and torch.equal(before[1], net[1].mean)
