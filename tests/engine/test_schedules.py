"""``schedule="overlap"`` and ``"pipeline"``: the numbers of the steps in sequence, bit for bit, whatever happens in between."""

from __future__ import annotations

import copy
import io
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlocal as fl
from fastlocal import ops
from fastlocal.engine.clip import Clip
from fastlocal.errors import ArgumentError, BackendError, NonFiniteError
from fastlocal.ops._dispatch import as_on_gpu
from tests.engine.nets import TorchvisionStyleResNet
from tests.engine.schedules import (
    Run,
    adamw,
    assert_same,
    data_of,
    differences,
    engine,
    images,
    local,
    rates,
    sgd,
    tensors,
    train,
)

SCHEDULES: dict[str, dict[str, Any]] = {
    "overlap": {"schedule": "overlap"},
    # more workers than blocks: with fewer, an overlap can be as short, and needs no steps in flight
    "pipeline of 2": {"schedule": "pipeline", "in_flight": 2, "workers": 4},
    "pipeline of 3": {"schedule": "pipeline", "in_flight": 3, "workers": 4},
}
SUMMED = {"dsn", "localmim"}
FORMS = [  # method, net, mode
    *((method["name"], "cnn", "paper") for method in fl.list_methods() if method["name"] not in ("localmim", "lopt", "solo")),
    *((name, "cnn", "official") for name in ("hpff", "mlaan", "man", "man_plus_plus")),
    *((name, "vit", "paper") for name in ("auglocal", "dgl", "feature_reconstruction", "glcan", "lakd", "mlaan", "predsim")),
    *((name, "gpt", "paper") for name in ("dgl", "lopt", "solo")),
    ("dgl", "swin", "paper"),
    ("localmim", "masked", "paper"),
]  # fmt: skip


def scheduled(model: fl.LocalModel, schedule: str, make: Any = sgd, **options: Any) -> fl.Engine:
    return engine(model, **({"make": make} | SCHEDULES[schedule] | options))


def test_every_method_is_tried() -> None:
    assert {name for name, *_ in FORMS} == {method["name"] for method in fl.list_methods()}


@pytest.mark.parametrize(("method", "net", "mode"), FORMS)
def test_twenty_steps_are_equal_bitwise(method: str, net: str, mode: str) -> None:
    """In threads without dropout, and with dropout in backbone and heads; rates and decays change, and sizes of batches."""
    options: dict[str, Any] = {"blocks": 1} if method == "bp" else {}
    slow = {"make": adamw} if method == "dsn" else {}
    data = data_of(net)
    for dropout in (0.0, 0.2):
        model = local(method, net, dropout, mode, **options)
        expected = train(engine(copy.deepcopy(model), "sequential", **slow), data)
        assert len(expected.losses) == 20 and "schedule: sequential" in expected.text
        for name in SCHEDULES if dropout == 0.0 else ["pipeline of 3"]:
            run = scheduled(copy.deepcopy(model), name, **slow)
            got = train(run, data)
            assert_same(got, expected)
            if method in SUMMED or method == "bp":
                assert run._rounds is None and f"{SCHEDULES[name]['schedule']} cannot serve" in got.text
                continue
            assert run._rounds is not None and run._rounds.schedule is not None
            plan = run._rounds.schedule.plan
            lag = plan.in_flight - 1
            assert got.order == [0, 1, *[None] * lag, *range(2, 20)], "one output a step, in order, none lost"
            assert max(plan.stream) > 0 and (run._rounds.threads > 1) == (dropout == 0.0)
            assert lag <= SCHEDULES[name].get("in_flight", 1) - 1
            if name != "overlap" and method not in ("solo",) and dropout == 0.0:
                assert lag > 0, "several steps were in flight"


VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16-mixed", "clip": 0.5},
    "fp16": {"precision": "16-mixed", "clip": 0.5},
    "bf16 as autocast": {"precision": "bf16-mixed", "backend": "reference"},
    "channels_last": {"memory_format": "channels_last", "make": lambda named: torch.optim.Adam(named, lr=1e-3)},
    "adamw": {"make": adamw, "clip": Clip(0.05, mode="agc")},
    "fused": {"make": lambda named: ops.FusedSGD(named, lr=0.05, momentum=0.9, max_norm=1.0)},
    "fused adamw": {"make": lambda named: ops.FusedAdamW(named, lr=1e-3)},
    "rate in a tensor": {"make": lambda named: torch.optim.Adam(named, lr=torch.tensor(1e-3), foreach=False)},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_of_the_engine(variant: str) -> None:
    method, data = ("man" if variant == "bf16" else "auglocal"), data_of("cnn", 9)
    model = local(method)
    expected = train(engine(copy.deepcopy(model), "sequential", **VARIANTS[variant]), data)
    for name in ("overlap", "pipeline of 3"):
        assert_same(train(scheduled(copy.deepcopy(model), name, **VARIANTS[variant]), data), expected)


@pytest.mark.parametrize("method", ["dgl", "man", "hpff"])
def test_all_blocks_are_updated_at_the_end_under_overlap(method: str) -> None:
    data, options = data_of("cnn", 9), {"update": "end", "clip": Clip(0.5, scope="global"), "nonfinite": "skip"}
    model = local(method, dropout=0.2)
    if method != "hpff":
        data[5][0][0, 0, 0, 0] = 99.0
        model.heads[1].register_forward_hook(_Poison())
    expected = train(engine(copy.deepcopy(model), "sequential", **options), data)
    assert expected.end["skipped"].tolist() == [0.0, float(method != "hpff"), 0.0]
    run = scheduled(copy.deepcopy(model), "overlap", **options)
    assert_same(train(run, data), expected)
    assert (
        run._rounds is not None and run._rounds.schedule is not None and run._rounds.schedule.tasks[-1].name == "update"
    )


@pytest.mark.parametrize("net", ["cnn", "vit", "gpt", "swin"])
def test_dropout_of_the_network_itself(net: str) -> None:
    """Also stochastic depth. Without deterministic=True: a schedule has streams of its own in any case."""
    data, model = data_of(net, 8), local("dgl", net, 0.3, own=True)
    assert any(block.random for block in model.blocks)
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    torch.manual_seed(7)  # does not matter
    for name in ("overlap", "pipeline of 3"):
        before = torch.get_rng_state()
        run = scheduled(copy.deepcopy(model), name, deterministic=False)
        assert_same(train(run, data), expected)
        assert torch.equal(torch.get_rng_state(), before)
    assert "all on the calling thread, because blocks draw random numbers" in run.explain()
    assert differences(train(scheduled(copy.deepcopy(model), "overlap", seed=1), data), expected) == []
    other = fl.Engine(copy.deepcopy(model), sgd, schedule="overlap", workers=2, seed=1)
    assert not torch.equal(train(other, data).losses[7], expected.losses[7])


class _Poison:
    """A loss that is NaN where the batch says so, in one block."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        ctx = inputs[1]
        return output._replace(loss=output.loss * (float("nan") if float(ctx.input[0, 0, 0, 0]) == 99.0 else 1.0))


@pytest.mark.parametrize("method", ["dgl", "man", "man_plus_plus", "mlaan"])
@pytest.mark.parametrize("name", ["overlap", "pipeline of 3"])
def test_a_block_that_is_not_finite_is_skipped_at_its_step(method: str, name: str) -> None:
    """One block of three where its loss is, or all where the images are; statistics go back."""
    data, model, one = data_of("cnn", 12), local(method), method in ("dgl", "man")
    for i in (4, 5, 9):
        data[i][0][0, 0, 0, 0] = 99.0 if one else float("nan")
    model.heads[1].register_forward_hook(_Poison())
    expected = train(engine(copy.deepcopy(model), "sequential", nonfinite="skip"), data)
    assert expected.end["skipped"].tolist() == ([0.0, 3.0, 0.0] if one else [3.0, 3.0, 3.0])
    assert all(value.isfinite().all() for key, value in expected.end.items())
    run = scheduled(copy.deepcopy(model), name, nonfinite="skip")
    assert_same(train(run, data), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nonfinite_raise_and_stop(name: str) -> None:
    data, model = data_of("cnn", 12), local("dgl")
    data[5][0][0, 0, 0, 0] = 99.0
    model.heads[1].register_forward_hook(_Poison())
    runs, errors = [], []
    for make in (engine, scheduled):
        run = make(copy.deepcopy(model), "sequential" if make is engine else name)
        record = Run()
        for batch in data:
            try:
                record.note(run.step(*batch))
            except NonFiniteError as error:
                errors.append((error.block, error.step, error.updated))
        for out in run.flush():
            record.note(out)
        record.end = tensors(run)
        runs.append(record)
    expected, got = runs
    assert errors[0] == errors[1] == (1, 5, (0, 2))
    for record in runs:  # the output of the step that raised is the error, or comes later
        record.losses.pop(5, None)
        record.correct.pop(5, None)
    assert differences(got, expected) == [] and [*got.losses] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert [n for n in got.order if n not in (None, 5)] == sorted(got.losses)
    stopped = scheduled(copy.deepcopy(model), name, nonfinite="stop")
    for i, batch in enumerate(data):
        stopped.step(*batch)
        assert not stopped.should_stop or i >= 5
    stopped.flush()
    assert stopped.should_stop
    assert stopped.skipped.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_accumulation_between_steps_in_flight(name: str) -> None:
    data, model = data_of("cnn", 16), local("man", dropout=0.2)

    def run(made: fl.Engine) -> Run:
        record, step = Run(), rates(made)
        for i, batch in enumerate(data):
            if i in (6, 7, 12):
                micro = made.accumulate(*batch)
                assert micro.step == made.steps and made.pending and not made.model.in_flight
                continue
            record.note(made.step(*batch))
            step()
        for out in made.flush():
            record.note(out)
        record.end = tensors(made)
        return record

    assert_same(run(scheduled(copy.deepcopy(model), name)), run(engine(copy.deepcopy(model), "sequential")))


# --- in the middle ----------------------------------------------------------------------------------------------------

MIDDLE: dict[str, Callable[[fl.Engine], Any]] = {
    "state_dict of the optimizer": lambda run: run.optimizer.state_dict(),
    "state_dict of the model": lambda run: run.model.state_dict(),
    "state_dict of the engine": lambda run: run.state_dict(),
    "eval": lambda run: run.model.eval(),
    "export": lambda run: run.model.export(),
    "deepcopy": lambda run: copy.deepcopy(run.model),
    "pickle": lambda run: pickle.loads(pickle.dumps(run.model)),
    "save": lambda run: torch.save(run.model, io.BytesIO()),
    "load_state_dict": lambda run: run.model.load_state_dict(run.model.state_dict()),
    "level A": lambda run: run.model(*data_of("cnn", 1)[0]),
    "to": lambda run: run.model.to(torch.float32),
    "another engine": lambda run: fl.Engine(run.model, sgd),
}


@pytest.mark.parametrize("what", MIDDLE)
def test_reading_the_model_completes_the_steps_in_flight(what: str) -> None:
    # level A counts batches of BatchNorm, so this net has none
    data, model = data_of("vit", 10), local("dgl", "vit")
    sequence, run = engine(copy.deepcopy(model), "sequential"), scheduled(copy.deepcopy(model), "pipeline of 3")
    record, expected = Run(), Run()
    for i, batch in enumerate(data):
        record.note(run.step(*batch))
        expected.note(sequence.step(*batch))
        if i in (4, 5, 7):
            assert run.model.in_flight is run and run.steps < sequence.steps
            MIDDLE[what](run)
            assert run.model.in_flight is None and run.steps == sequence.steps == i + 1
            for key, value in run.model.backbone.state_dict().items():
                assert torch.equal(value, sequence.model.backbone.state_dict()[key]), key
            run.model.train()
    for out in run.flush():
        record.note(out)
    record.end, expected.end = tensors(run), tensors(sequence)
    assert_same(record, expected)
    assert record.order.count(None) == 1 or record.order.count(None) == 2, "outputs that waited are returned first"


def test_copies_of_a_model_with_steps_in_flight_are_of_one_step() -> None:
    model, data = local("dgl"), data_of("cnn", 6)
    run = scheduled(model, "pipeline of 3")
    for batch in data:
        run.step(*batch)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.in_flight is None
        assert all(
            torch.equal(a, b) for a, b in zip(made.state_dict().values(), model.state_dict().values(), strict=True)
        )


def test_an_engine_that_is_dropped_leaves_the_model_at_one_step() -> None:
    model, data = local("dgl"), data_of("cnn", 6)
    sequence = engine(copy.deepcopy(model), "sequential")
    run = scheduled(model, "pipeline of 3")
    for batch in data:
        run.step(*batch)
        sequence.step(*batch)
    del run
    expected = sequence.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_resumed_run_goes_on_bitwise(deterministic: bool) -> None:
    """From the state of a pipeline, with dropout; also into another schedule."""
    data, model = data_of("cnn", 14), local("mlaan", dropout=0.2)
    expected = train(engine(copy.deepcopy(model), "sequential"), data, after=lambda: None)
    first = scheduled(copy.deepcopy(model), "pipeline of 2", deterministic=deterministic)
    early = Run()
    for batch in data[:7]:
        early.note(first.step(*batch))
    saved = io.BytesIO()
    torch.save((first.model.state_dict(), first.state_dict()), saved)
    for out in first.flush():
        early.note(out)
    assert sorted(early.losses) == [*range(7)]
    for name in ("pipeline of 3", "overlap", "sequential"):
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=True)
        again = copy.deepcopy(model)
        again.load_state_dict(weights)
        options = {"deterministic": deterministic or name == "sequential"}
        run = engine(again, name, **options) if name == "sequential" else scheduled(again, name, **options)
        run.load_state_dict(state)
        got = train(run, data[7:], after=lambda: None)
        got.losses |= early.losses
        got.correct |= early.correct
        got.order = [*range(7), *got.order]
        assert_same(got, expected)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.engine.schedules import data_of, engine, local, rates
path, die = sys.argv[1], int(sys.argv[2])
run = engine(local("man"), "pipeline", in_flight=3, workers=3, nonfinite="skip")
step, data, begin = rates(run), data_of("cnn", 16), 0
if os.path.exists(path):
    weights, state, schedule, begin = torch.load(path, weights_only=True)
    run.model.load_state_dict(weights)
    run.load_state_dict(state)
    for _ in range(begin):
        step()
for i in range(begin, 16):
    if i == die:
        assert run.model.in_flight is run and len(run._rounds._flights) > 0
        block = run.model.blocks[1].fns[0]
        block.register_forward_pre_hook(lambda m, x: os.kill(os.getpid(), signal.SIGKILL))  # in the middle of a round
    run.step(*data[i])
    step()
    if i % 5 == 4:
        torch.save((run.model.state_dict(), run.state_dict(), None, i + 1), path + ".new")
        os.replace(path + ".new", path)
run.flush()
torch.save((run.model.state_dict(), run.state_dict()), path)
"""


def test_killed_in_the_middle_of_a_pipeline_and_resumed(tmp_path: Path) -> None:
    script = KILLED.format(root=str(Path(__file__).parents[2]))
    path = str(tmp_path / "run.pt")
    command = [sys.executable, "-W", "ignore", "-c", script, path]
    killed = subprocess.run([*command, "13"], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(path, weights_only=True)[-1] == 10
    done = subprocess.run([*command, "99"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights, state = torch.load(path, weights_only=True)
    run = engine(local("man"), "sequential", nonfinite="skip")
    expected = train(run, data_of("cnn", 16))
    again = engine(local("man"), "sequential", nonfinite="skip")
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    assert again.steps == 16
    end = tensors(again)
    assert [key for key in expected.end if not torch.equal(end[key], expected.end[key])] == []
    assert end.keys() == expected.end.keys()


# --- what looks at or changes the calling thread ------------------------------------------------------------------------


def ambient(context: Callable[[], Any], **options: Any) -> None:
    """Steps inside a context are the same under every schedule."""
    data, model = data_of("cnn", 6), local("auglocal")
    runs = []
    for name in ("sequential", "pipeline of 3"):
        own = copy.deepcopy(model)
        run = engine(own, name, **options) if name == "sequential" else scheduled(own, name, **options)
        with context():
            runs.append(train(run, data))
    assert_same(runs[1], runs[0])


def test_a_callers_autocast() -> None:
    ambient(lambda: torch.autocast("cpu", torch.bfloat16))
    ambient(lambda: torch.autocast("cpu", torch.bfloat16), precision="bf16-mixed")


def test_a_callers_backend() -> None:
    seen: list[str] = []

    def looked(name: str) -> Callable[[], Any]:
        seen.append(name)
        return lambda: fl.backend(name)

    ambient(looked("aten"))
    ambient(as_on_gpu)
    model, data = local("auglocal"), data_of("cnn", 4)
    with fl.backend("aten"):
        a = train(scheduled(copy.deepcopy(model), "overlap"), data)
    b = train(scheduled(copy.deepcopy(model), "overlap", backend="reference"), data)
    assert differences(a, b) != [], "the request reaches the workers"


def test_saved_tensor_hooks_and_modes_see_every_operator() -> None:
    def hooks() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)

    ambient(hooks)
    ambient(lambda: torch.device("cpu"))
    model, data = local("dgl"), data_of("cnn", 5)
    run = scheduled(model, "pipeline of 2")
    for batch in data:
        run.step(*batch)
    from fastlocal.blocks.measure import StorageTracker

    with StorageTracker() as tracker:
        run.step(*data[0])
    assert tracker.peak > 0


def test_default_dtype_of_float64() -> None:
    data = [(x.double(), y) for x, y in data_of("cnn", 6)]
    torch.set_default_dtype(torch.float64)
    try:
        model = local("predsim").double()
        expected = train(engine(copy.deepcopy(model), "sequential"), data)
        assert expected.losses[0].dtype == torch.float64
        assert_same(train(scheduled(copy.deepcopy(model), "pipeline of 2"), data), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Checkpointed(nn.Module):
    """A block that is computed anew in its backward, BatchNorm and (where ``p``) dropout included."""

    def __init__(self, width: int, p: float, first: bool):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3 if first else width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(p)
        )

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("method", ["dgl", "hpff"])
def test_checkpoints_inside_blocks(method: str, p: float) -> None:
    torch.manual_seed(0)
    units = [Checkpointed(4, p, k == 0) for k in range(4)]
    net = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = fl.localize(net, method, blocks=["0", "1", "2"], sample=torch.randn(2, 3, 8, 8))
    data = images(8, 8)
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    for name in ("overlap", "pipeline of 3"):
        assert_same(train(scheduled(copy.deepcopy(model), name), data), expected)


def test_blocks_that_share_a_module_without_weights() -> None:
    """One ReLU and one pool object in every unit, and a head that blocks share parts of by a readout copy (SOLO)."""
    torch.manual_seed(0)
    act = nn.ReLU()
    units = [nn.Sequential(nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1), act) for k in range(4)]
    net = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    model = fl.localize(net, "dgl", blocks=4, sample=torch.randn(2, 3, 8, 8))
    data = images(8, 8)
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    assert_same(train(scheduled(copy.deepcopy(model), "pipeline of 3"), data), expected)


@pytest.mark.parametrize("tied", ["untie", "link"])
def test_tied_weights(tied: str) -> None:
    data, model = data_of("gpt", 8), local("dgl", "gpt", 0.2, own=True)
    torch.manual_seed(0)
    net = fl.models.create("gpt", vocab_size=13, block_size=8, n_layer=4, n_head=2, n_embd=8)
    model = fl.localize(net, "dgl", blocks=3, sample=data[0][0][:2], tied=tied)  # type: ignore[arg-type]
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    for name in SCHEDULES:
        assert_same(train(scheduled(copy.deepcopy(model), name), data), expected)


# --- what an optimizer's groups say -------------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Keeps a count and a rate of its own in its groups, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["largest"] = max(group.get("largest", 0.0), group["lr"])
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(1.0 / group["count"])
        return super().step(closure)


def test_what_an_optimizer_writes_into_its_groups_stays() -> None:
    data, model = data_of("cnn", 10), local("dgl")
    runs = []
    for name in ("sequential", *SCHEDULES):
        own = copy.deepcopy(model)

        def make(named: Any) -> torch.optim.Optimizer:
            return Counting(named, lr=0.05, momentum=0.9)

        run = engine(own, name, make) if name == "sequential" else scheduled(own, name, make)
        runs.append(train(run, data))
        assert all(group["count"] == 10 for group in run.optimizer.param_groups)
        assert {group["lr"] for group in run.optimizer.param_groups} == {0.05 / (1 + 0.3 * 10)}
    for got in runs[1:]:
        assert_same(got, runs[0])


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["overlap", "pipeline"])
def test_models_with_one_order_fall_back(schedule: Any) -> None:
    hooks = fl.localize(TorchvisionStyleResNet(), "dgl", blocks=["layer1", "layer2"], sample=torch.randn(2, 3, 16, 16))
    assert all(block.fns is None for block in hooks.blocks)
    for model, side, why in (
        (hooks, 16, "TorchvisionStyleResNet is cut by hooks"),
        (local("bp", blocks=1), 8, "one block leaves nothing to run beside it"),
        (local("dsn"), 8, "'dsn' has no gradient border"),
    ):
        with pytest.warns(UserWarning, match=f"schedule: '{schedule}' cannot serve, so steps are sequential: {why}"):
            run = fl.Engine(model, adamw, schedule=schedule)
        assert run._rounds is None and run.schedule == "sequential"
        assert f"schedule: sequential; {schedule} cannot serve: {why}" in run.explain()
        assert run.step(torch.randn(2, 3, side, side), torch.tensor([0, 1])).step == 0
        assert run.flush() == []
    with pytest.warns(UserWarning, match="links of 'mlaan' read float32 weights"):
        run = fl.Engine(local("mlaan"), sgd, schedule=schedule, precision="bf16-mixed")
    assert run._rounds is None


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = local("dgl")
    with pytest.raises(BackendError, match="'pipeline' updates a block while others are at other steps"):
        fl.Engine(model, sgd, schedule="pipeline", update="end")
    for argument in ({"workers": 0}, {"in_flight": 1.5}, {"in_flight": True}):
        with pytest.raises(ArgumentError, match=f"{next(iter(argument))}: got"):
            fl.Engine(model, sgd, schedule="pipeline", **argument)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="schedule: got 'parallel'; valid are"):
        fl.Engine(model, sgd, schedule="parallel")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="memory_budget: cannot read"):
        fl.Engine(model, sgd, schedule="pipeline", memory_budget="much")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError):
            fl.Engine(model, sgd, schedule="pipeline", graph="on")
    monkeypatch.setattr("fastlocal.engine._native.available", lambda: False)
    monkeypatch.setattr("fastlocal.engine._native.why_not", lambda: "it was not built")
    with pytest.raises(
        BackendError, match=r"'overlap' needs the native scheduler: it was not built\. Or use 'sequential'"
    ):
        fl.Engine(model, sgd, schedule="overlap")
    assert "schedule: sequential" in fl.Engine(model, sgd).explain()


def test_a_budget_that_cannot_be_met_is_said_before_anything_is_trained() -> None:
    run = scheduled(local("dgl"), "pipeline of 2", memory_budget=1000)
    data = data_of("cnn", 3)
    assert [run.step(*batch).step for batch in data[:2]] == [0, 1]
    before = tensors(run)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"memory_budget of 1000 bytes cannot be met: .* give \d+ bytes more"):
            run.step(*data[2])
    assert run.steps == 2 and run.flush() == []
    assert all(torch.equal(value, before[key]) for key, value in tensors(run).items())


def test_hooks_on_steps_of_the_optimizer() -> None:
    for name in SCHEDULES:
        run = scheduled(local("dgl"), name)
        seen: list[int] = []
        handle = run.optimizer.register_step_post_hook(lambda *_: seen.append(run.steps))  # noqa: B023
        if name == "overlap":
            for batch in data_of("cnn", 4):
                run.step(*batch)
            assert seen == [0, 1, 2, 3]
            continue
        with pytest.raises(BackendError, match=r"hooks are registered on the steps of engine\.optimizer; remove them"):
            run.step(*data_of("cnn", 1)[0])
        handle.remove()
        assert run.step(*data_of("cnn", 1)[0]).step == 0


def test_explain_and_outputs_while_a_pipeline_fills() -> None:
    run = scheduled(local("dgl"), "pipeline of 3")
    data = data_of("cnn", 6)
    assert "schedule: pipeline; the first 2 steps are sequential, to learn what tasks cost" in run.explain()
    outs = [run.step(*batch) for batch in data]
    assert run._rounds is not None and run._rounds.schedule is not None
    flying = run._rounds.schedule.plan.in_flight
    threads = 1 + max(run._rounds.schedule.plan.stream)
    assert (
        f"schedule: pipeline; {threads} threads, {flying} steps in flight, 1 thread in an operator; a round is"
        in run.explain()
    )
    empty = [out for out in outs if out.step is None]
    assert len(empty) == flying - 1 > 0
    for out in empty:
        assert out.losses.isnan().all() and out.correct.tolist() == [-1] * 3 and out.logits is None
    rest = run.flush()
    assert [out.step for out in (*outs, *rest) if out.step is not None] == [*range(6)]
    assert run.flush() == [] and run.steps == 6
    assert run.step(*data[0]).step is None and [out.step for out in run.flush()] == [6]


# --- operators in place -------------------------------------------------------------------------------------------------


def in_place_net(first: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    units = [
        nn.Sequential(*([nn.ReLU(inplace=True)] if k else []), nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1))
        for k in range(4)
    ]
    return nn.Sequential(
        *units, nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_first_operator_in_place(name: str, seed: int) -> None:
    model = fl.localize(in_place_net(), "dgl", blocks=5, sample=torch.randn(2, 3, 8, 8))
    data = images(10, 8)
    expected = train(engine(copy.deepcopy(model), "sequential"), data)
    run = scheduled(copy.deepcopy(model), name)
    from tests.engine.schedules import fake_clock

    assert run._rounds is not None
    fake_clock(run._rounds, seed)
    assert_same(train(run, data), expected)
    assert run._rounds._writes_input == {1, 2, 3, 4}


def test_an_operator_that_is_in_place_only_later() -> None:
    net: Any = in_place_net()
    for unit in net[1:]:
        unit[0].inplace = False
    model = fl.localize(net, "dgl", blocks=5, sample=torch.randn(2, 3, 8, 8))
    run = scheduled(model, "pipeline of 2")
    data = images(8, 8)
    for batch in data[:5]:
        run.step(*batch)
    net[2][0].inplace = True
    with pytest.raises(
        BackendError, match=r"block 2 \('2'\) changed its input in place in this step and not in the first 2"
    ):
        run.step(*data[5])
    net[2][0].inplace = False
    before = run.steps
    assert run.step(*data[6]).step is None
    assert [out.step for out in run.flush()] == [before]
