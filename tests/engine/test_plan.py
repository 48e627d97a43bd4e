"""The plan of a step against the same step run on real tensors, under the same tools."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch.utils.flop_counter import FlopCounterMode

import fastlocal as fl
from fastlocal import cli, models
from fastlocal.blocks.measure import LaunchCounter, StorageTracker
from fastlocal.engine import calibrate
from fastlocal.engine.plan import DEVICES, Device, _rate
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops._dispatch import as_on_gpu

OPTIMIZERS = {
    "momentum": lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9),
    "adam": lambda named: torch.optim.AdamW(named, lr=1e-3),
}


def _resnet():
    return models.create("resnet44")  # the full models are in bench/results/plan.json


def _vit():
    return models.create("vit_small", img_size=32, patch_size=8, num_classes=10)


def _vgg():
    return models.create("vgg11b")


def _gpt():
    return models.create("gpt", vocab_size=128, block_size=32, n_embd=64, n_layer=6, n_head=4, tie=False)


def _tokens():
    return torch.randint(0, 128, (8, 32))


def _images():
    return torch.randn(4, 3, 32, 32)


BP = ("bp", 1, {})
CASES = [
    *((_resnet, _images, m) for m in (BP, ("dgl", 16, {}), ("auglocal", 16, {"depth": 2}), ("predsim", 16, {}))),
    *((_vit, _images, m) for m in (BP, ("dgl", 6, {}), ("auglocal", 6, {"depth": 2}), ("predsim", 6, {}))),
    *((_vgg, _images, m) for m in (BP, ("dgl", 4, {}), ("predsim", 4, {}))),
    (_vgg, _images, ("infopro", 3, {"loss": "cross_entropy", "lam": (1.0, 1.0)})),
    *((_gpt, _tokens, m) for m in (BP, ("dgl", 3, {}), ("auglocal", 4, {"depth": 2}))),
    (_gpt, _tokens, ("auglocal", 3, {"depth": 1, "form": "imagenet"})),
]


def _real(
    make, x, method, blocks, optimizer="momentum", engine_options=None, count_flops=False, waits=False, **options
):
    """Bytes alive at the peak of a second step, everything counted that was made for it; launches and FLOPs."""
    storages, launches, flops = StorageTracker(), LaunchCounter(), FlopCounterMode(display=False)
    with storages:
        model = fl.localize(make(), method, blocks=blocks, sample=x[:2], **options)
        engine = fl.Engine(model, OPTIMIZERS[optimizer], **(engine_options or {}))
        engine._guard.waits = waits
        batch = x.clone(), torch.zeros((len(x), *model.blocks[-1].cost.boundary[:-1]), dtype=torch.int64)
        engine.step(batch)
        gc.collect()
        storages.mark("step")
        with launches:
            engine.step(batch)
    if count_flops:
        with flops:
            engine.step(batch)
    return storages.peaks["step"], launches.total, flops.get_total_flops()


def _name(case):
    return f"{case[0].__name__[1:]}-{case[2][0]}"


# With the operators that a GPU's step calls, too: a residual net, a VGG, and heads with more than a cross-entropy.
FORMS = [(case, "cpu-core") for case in CASES]
FORMS += [(case, "h100") for case in CASES if _name(case) in ("resnet-auglocal", "vgg-predsim", "vgg-infopro")]


@pytest.mark.parametrize(("case", "device"), FORMS, ids=[f"{_name(case)}-{device}" for case, device in FORMS])
def test_the_peak_is_that_of_a_real_step(case, device) -> None:
    make, sample, (method, blocks, options) = case
    x = sample()
    plan = fl.plan(make, x, method=method, blocks=blocks, device=device, **options)
    counted = make is _vgg and device == "cpu-core"  # torch's counter has no formula for a CPU's attention
    with as_on_gpu() if device == "h100" else nullcontext():
        gpu = device == "h100"
        peak, launches, flops = _real(make, x, method, blocks, count_flops=counted, waits=gpu, **options)
    assert plan.peak_bytes == pytest.approx(peak, rel=0.01)  # the promise is 10 %
    assert plan.launches == pytest.approx(launches, rel=0.01, abs=2)  # on a CPU the step looks at its flags
    if counted:
        assert plan.flops == flops


@pytest.mark.parametrize(
    "engine_options",
    [{"precision": "bf16-mixed"}, {"update": "end"}, {"memory_format": "channels_last"}],
    ids=["bf16", "end", "channels_last"],
)
def test_the_engine_options_are_planned(engine_options) -> None:
    x = torch.randn(16, 3, 32, 32)

    def make():
        return models.create("resnet20")

    plan = fl.plan(make, x, method="dgl", blocks=4, optimizer="adam", device="cpu-core", **engine_options)
    peak, launches, _ = _real(make, x, "dgl", 4, "adam", engine_options=engine_options)
    assert plan.peak_bytes == pytest.approx(peak, rel=0.03)
    assert plan.launches == pytest.approx(launches, rel=0.03)


def test_a_local_model_is_left_as_it_was() -> None:
    model = fl.localize(models.create("resnet20"), "auglocal", blocks=5, sample=torch.randn(2, 3, 32, 32))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    batch = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    random = torch.get_rng_state()
    plan = fl.plan(model, batch)
    assert len(plan.blocks) == len(model.blocks) == len(plan.table)
    assert modes == [m.training for m in model.modules()] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_parts_add_up() -> None:
    plan = fl.plan(lambda: models.create("resnet20"), torch.empty(2, 3, 32, 32), rows=32, method="dgl", blocks=4)
    assert plan.rows == 32 and plan.batch_bytes == 32 * (3 * 32 * 32 * 4 + 8)
    for b in plan.blocks:
        assert b.peak_bytes == b.saved_bytes + b.gradient_bytes + b.workspace_bytes
        assert b.workspace_bytes >= 0 and b.saved_bytes <= b.most_saved_bytes
        assert b.flops and b.bytes_moved and b.launches and b.seconds >= b.launches * DEVICES["h100"].launch * 0.99
    assert plan.blocks[0].boundary_bytes == 32 * 16 * 32 * 32 * 4
    numbers = sum(b.parameters for b in plan.blocks)
    assert plan.parameter_bytes > 4 * numbers == plan.optimizer_bytes
    assert sum(b.flops for b in plan.blocks) == plan.flops
    fewer = fl.plan(lambda: models.create("resnet20"), torch.empty(2, 3, 32, 32), rows=16, method="dgl", blocks=4)
    assert fewer.flops * 2 == plan.flops


def test_the_roofline_takes_the_largest_of_three() -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(8, 64)
    flat = {torch.float32: 1e30}
    plans = [
        fl.plan(net, x, device=Device("launch", flat, 1e30, 1.0)),
        fl.plan(net, x, device=Device("bytes", flat, 1.0, 0.0)),
        fl.plan(net, x, device=Device("flops", {torch.float32: 1.0}, 1e30, 0.0)),
    ]
    assert plans[0].seconds == plans[0].launches
    assert plans[1].seconds == plans[1].bytes_moved
    assert plans[2].seconds == pytest.approx(plans[2].flops)
    # forward and the weights' gradients of both layers, the input's gradient of the second alone
    assert plans[2].flops == 2 * 8 * (2 * 64 * 64 + 3 * 64 * 10)


def test_large_networks_take_no_memory() -> None:
    with torch.device("meta"):
        net = models.create("vit_base")
    plan = fl.plan(net, torch.empty(256, 3, 224, 224, device="meta"), precision="bf16-mixed")
    assert plan.peak_bytes > 10 * 2**30 and plan.parameter_bytes > 300 * 2**20


def test_a_budget_chooses_the_blocks() -> None:
    units = (nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(32, 32), nn.Tanh()))) for _ in range(4))
    net = nn.Sequential(*units, nn.Linear(32, 10))

    def planned(**how):
        return fl.plan(net, torch.empty(4096, 32), method="dgl", **how)

    whole, three = fl.plan(net, torch.empty(4096, 32)), planned(blocks=3)
    assert three.peak_bytes < whole.peak_bytes and three.fits() and not three.fits(three.peak_bytes - 1)
    auto = planned(blocks="auto", budget=three.peak_bytes)
    assert 1 < len(auto.blocks) <= 3 and auto.fits(three.peak_bytes)
    with pytest.raises(ArgumentError, match="budget"):
        planned(blocks="auto", budget="100KB")


@pytest.mark.parametrize("method", ["infopro", "predsim"])
def test_image_methods_say_that_they_do_not_fit_a_gpt(method) -> None:
    with pytest.raises(ArgumentError, match=f"'{method}'"):
        fl.plan(_gpt, _tokens(), method=method, blocks=3)


def test_rates_that_were_measured_stand_instead_of_the_roof() -> None:
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(8, 64)
    free = Device("free", {torch.float32: 1e30}, 1e30, 0.0)
    rates = {(f"aten::{name}", torch.float32): ((1.0, 1.0), (1e9, 1.0)) for name in ("addmm", "mm")}
    plan = fl.plan(net, x, device=dataclasses.replace(free, rates=rates))
    assert plan.seconds == pytest.approx(plan.flops)
    waiting = fl.plan(net, x, device=dataclasses.replace(free, rates=rates, waits=True, launch=1e6))
    assert waiting.seconds == pytest.approx(plan.flops + 1e6 * plan.launches)
    assert _rate(((1.0, 1.0), (100.0, 9.0)), 10.0) == pytest.approx(3.0)  # half way by logarithms
    assert _rate(((1.0, 1.0), (100.0, 9.0)), 1e4) == 9.0 and _rate(((2.0, 4.0),), 1.0) == 4.0


def test_the_machine_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(calibrate, "ROUNDS", 2)
    monkeypatch.setattr(
        calibrate, "_networks", lambda device: [(lambda: calibrate._Stack(16), torch.randn(4, 3, 8, 8))]
    )
    found = calibrate.measure_device.__wrapped__("cpu")
    assert found.waits and found.launch > 0 and found.bandwidth > 0
    assert found.rates["aten::convolution_backward", torch.float32][0][1] > 0
    assert ("aten::native_batch_norm", torch.float32) in found.rates
    with pytest.raises(ArgumentError, match="cannot measure"):
        calibrate.measure_device.__wrapped__("tpu")


def test_an_optimizer_runs_on_no_real_memory(monkeypatch) -> None:
    def refuse(mode, func, *args, **kwargs):
        raise AssertionError(f"{func} would run on real tensors")

    monkeypatch.setattr(fake_tensor, "run_fallback_kernel", refuse)
    for optimizer in ("sgd", "momentum", "adam"):
        fl.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(4, 8), optimizer=optimizer)


def test_text_and_chart(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    plan = fl.plan(lambda: models.create("resnet20"), torch.empty(8, 3, 32, 32), method="dgl", blocks=3)
    text = plan.to_text()
    assert f"{plan.launches:,} launches" in text and len(text.splitlines()) == 1 + 1 + 3 + 2
    plan.draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": "h1000"}, "device: 'h1000'"),
        ({"optimizer": "adamm"}, "optimizer"),
        ({"rows": 0}, "rows"),
        ({"blocks": "auto"}, "budget"),
        ({"memory_format": "nhwc"}, "memory_format"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_bad_arguments(how, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        fl.plan(nn.Linear(4, 2), torch.randn(2, 4), **how)


def test_a_cut_model_takes_no_method() -> None:
    model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "bp", sample=torch.randn(2, 4))
    with pytest.raises(ArgumentError, match="cut already"):
        fl.plan(model, torch.randn(2, 4), method="dgl")


def test_the_command(capsys, tmp_path) -> None:
    small = ["plan", "--model", "resnet20", "--method", "dgl", "--batch", "8"]
    assert cli.main([*small, "--device", "a100", "--budget", "1GiB", "--draw", str(tmp_path / "a.svg")]) == 0
    assert "roofline of a100" in capsys.readouterr().out and (tmp_path / "a.svg").exists()
    assert cli.main([*small, "--blocks", "3", "--budget", "1MB"]) == 1
    assert "over the budget" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "gpt", "--method", "bp", "--batch", "2", "--model-option", "n_layer=1"]) == 0
    assert cli.main([*small, "--device", "nothing"]) == 2


def test_the_operators_of_a_gpu_do_the_same_products() -> None:
    net, x = models.vgg8b(feat_mult=0.1, num_hidden=16), torch.empty(8, 3, 32, 32)
    plans = [fl.plan(net, x, method="dgl", blocks=3, device=device) for device in ("cpu-core", "h100")]
    assert plans[0].flops == plans[1].flops
    assert plans[1].launches < plans[0].launches and plans[1].peak_bytes < plans[0].peak_bytes


# ------------------------------------------------------------------------------------------------------------- schedules


def _small():
    return models.create("resnet20", width=4)


@functools.cache
def _planned(method="dgl", blocks=4, **options):
    return fl.plan(_small, torch.empty(16, 3, 32, 32), method=method, blocks=blocks, device="cpu-core", **options)


LAM = (("lam", (1.0, 1.0)),)
TASKED = [
    ("dgl", 4, ()),
    ("hpff", 4, ()),
    ("man", 4, LAM),
    ("predsim", 4, ()),
    ("bp", 1, ()),
    ("dgl", 4, (("update", "end"),)),
]


@pytest.mark.parametrize(("method", "blocks", "options"), TASKED, ids=lambda value: str(value) if value else "-")
def test_the_tasks_of_a_step_add_up_to_it(method, blocks, options) -> None:
    plan = _planned(method, blocks, **dict(options))
    schedule = plan.schedule
    assert schedule.kind == "sequential" and schedule.plan.period == pytest.approx(plan.seconds)
    assert sum(schedule.bytes_made) == sum(schedule.bytes_freed) and min(schedule.bytes_freed) >= 0
    # one after another, the tasks hold what was tracked, to the byte
    assert schedule.plan.peak_bytes == plan.peak_bytes - plan.resident_bytes + plan.batch_bytes
    seconds = {}
    for task, cost in zip(schedule.tasks, schedule.cost):
        seconds.setdefault((task.kind, task.block), 0.0)
        seconds[task.kind, task.block] += cost
        if task.kind in ("forward", "backward"):
            assert cost > 0
    if method == "dgl" and not options:
        for k, cost in enumerate(plan.costs):
            assert (cost.forward, cost.backward) == pytest.approx((seconds["forward", k], seconds["backward", k]))
            assert cost.head == pytest.approx(seconds["head", k])
            whole = cost.forward + cost.head + cost.backward + cost.update
            assert whole == pytest.approx(plan.blocks[k].seconds, rel=0.01)
            assert cost.backward > cost.forward > cost.head > 0 and cost.output_bytes == plan.blocks[k].boundary_bytes


@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize(("method", "options"), [("dgl", ()), ("hpff", ()), ("man", LAM)])
def test_a_schedule_is_legal_and_shorter(method, options, streams) -> None:
    sequential = _planned(method, **dict(options))
    for kind in ("overlap", "pipeline"):
        planned = sequential.with_schedule(kind, streams=streams)
        found = planned.schedule
        plan = found.plan
        assert found.kind == kind and (kind == "pipeline" or plan.in_flight == 1)
        work = sum(found.cost)
        assert work / streams <= plan.period * (1 + 1e-9) and plan.period < 0.95 * work
        for u, v, distance in found.edges:
            assert plan.stage[u] <= plan.stage[v] + distance
            if plan.stage[u] == plan.stage[v] + distance:
                assert plan.start[u] + found.cost[u] <= plan.start[v] + 1e-9
        assert planned.peak_bytes == planned.resident_bytes - planned.batch_bytes + plan.peak_bytes
        assert planned.blocks is sequential.blocks and not planned.fits(planned.peak_bytes - 1)


def test_a_budget_holds_what_tasks_have_alive() -> None:
    free = _planned().with_schedule("pipeline")
    least = _planned().schedule.plan.peak_bytes
    budget = (free.schedule.plan.peak_bytes + least) // 2
    tight = _planned().with_schedule("pipeline", memory_budget=budget)
    assert least <= tight.schedule.plan.peak_bytes <= budget < free.schedule.plan.peak_bytes
    assert tight.schedule.plan.period >= free.schedule.plan.period
    with pytest.raises(ArgumentError, match="budget"):
        _planned().with_schedule("pipeline", memory_budget=least // 4)


@pytest.mark.parametrize(("method", "options"), [("dgl", {}), ("hpff", {})])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_engine_stays_below_the_peak_of_the_schedule(method, options, streams) -> None:
    """Its rounds, run by the planned schedule on one thread, where every storage can be tracked."""
    x, y = torch.randn(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64)
    plan = _planned(method, **options).with_schedule("pipeline", streams=streams, in_flight=2)
    storages = StorageTracker()
    with storages:
        model = fl.localize(_small(), method, blocks=4, sample=x[:2], **options)
        engine = fl.Engine(model, OPTIMIZERS["momentum"], schedule="pipeline", workers=streams, in_flight=2)
        for _ in range(3):
            engine.step(x.clone(), y.clone())
        engine.flush()
        assert engine._rounds.schedule.tasks == plan.schedule.tasks
        assert engine._rounds.schedule.edges == plan.schedule.edges
        engine._rounds.schedule = plan.schedule
        gc.collect()
        storages.mark("steps")
        for _ in range(4):
            engine.step(x.clone(), y.clone())
        engine.flush()
    peak = storages.peaks["steps"]
    assert peak <= 1.05 * plan.peak_bytes
    assert plan.peak_bytes < (1.05 if streams == 1 else 1.5) * peak


def test_one_order_is_said_so() -> None:
    plan = fl.plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(4, 4), schedule="pipeline")
    assert plan.schedule.kind == "sequential" and "pipeline cannot serve: one block leaves nothing" in plan.to_text()
    with pytest.raises(BackendError, match=r"'pipeline' updates a block while .* update='end'"):
        _planned(update="end").with_schedule("pipeline")
    assert _planned(update="end").with_schedule("overlap").schedule.kind == "overlap"


class _Chain(nn.Module):
    """Units that may begin with an operator in place."""

    def __init__(self, inplace):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.act = nn.ReLU(inplace)

    def units(self):
        return [(f"layers.{i}", self.layers[i] if i == 0 else functools.partial(self._unit, i)) for i in range(3)]

    def _unit(self, i, h):
        return self.layers[i](self.act(h))

    def readout(self, h):
        return h

    def forward(self, x):
        for _, unit in self.units():
            x = unit(x)
        return self.readout(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_first_operator_that_writes_its_input_waits_for_the_block_before(inplace) -> None:
    schedule = fl.plan(_Chain(inplace), torch.randn(4, 8), method="dgl", blocks=3).schedule
    at = {(task.kind, task.block): i for i, task in enumerate(schedule.tasks)}
    assert ((at["backward", 0], at["forward", 1], 0) in schedule.edges) == inplace


def test_heads_that_copy_modules_are_planned() -> None:
    x = torch.randn(16, 3, 32, 32)
    peak, _, _ = _real(_small, x, "man", 4, **dict(LAM))
    assert _planned("man", **dict(LAM)).peak_bytes == pytest.approx(peak, rel=0.03)


def test_back_propagation_by_units_is_the_same_step() -> None:
    whole = _planned("bp", 1)
    units = whole._stages(whole.rows)
    assert units.seconds == whole.seconds and units.peak_bytes == whole.peak_bytes and units.flops == whole.flops
    assert [cost.name for cost in units.costs] == [name for name, _ in _small().units()]
    each = [cost.forward + cost.backward + cost.head + cost.update for cost in units.costs]
    assert sum(each) == pytest.approx(whole.seconds) and min(each) > 0
    # what is saved, unit by unit, is what autograd holds in all, but for a few bytes of the loss
    saved = sum(cost.saved_bytes + cost.output_bytes for cost in units.costs)
    assert saved == pytest.approx(whole.blocks[0].most_saved_bytes, rel=1e-3)
    one, other = units.costs[2:4]  # two equal blocks of one stage of the network
    assert (one.forward, one.backward, one.saved_bytes) == (other.forward, other.backward, other.saved_bytes)
    assert all(1.5 < cost.backward / cost.forward < 2.5 for cost in units.costs[1:])


def _mlp():
    return nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())), nn.Linear(32, 10))


@functools.cache
def _planned_mlp(method="dgl", blocks=4, rows=16, **options):
    machine = Device("paper", {torch.float32: 1e10}, 4e9, 1e-6)
    plan = fl.plan(_mlp, torch.empty(rows, 32), method=method, blocks=blocks, device=machine, **options)
    plan._stages = functools.cache(plan._stages)
    return plan


def test_many_ranks_have_the_plans_own_costs() -> None:
    plan, bp, micro = _planned_mlp(), _planned_mlp("bp", 1), _planned_mlp("bp", 1, rows=4)
    found = plan.simulate(2, bandwidth=1e9, latency=1e-6, microbatches=4)
    assert list(found.runs)[:4] == ["local, one rank", "local", "bp, one rank", "gpipe"]
    assert found["local, one rank"].seconds == pytest.approx(plan.seconds)
    assert found["bp, one rank"].seconds == pytest.approx(bp.seconds)
    one = plan.simulate(1, microbatches=4)["gpipe"].seconds
    update = sum(cost.update for cost in bp._stages(4).costs)
    assert one == pytest.approx(4 * micro.seconds - 3 * update) and update > 0
    assert one > bp.seconds  # small batches cost more
    (((source, to), sent),) = found["local"].link_bytes.items()
    cut = found["local"].blocks[0][1] - 1
    assert (source, to) == (0, 1) and sent == plan.blocks[cut].boundary_bytes == 16 * 32 * 4
    assert found["gpipe"].bytes_sent == 2 * sent and found["gpipe"].microbatches == 4
    slow = plan.simulate(2, microbatches=4, straggler={0: 2.0})  # the rank that takes longest
    assert slow["local"].seconds == pytest.approx(2 * found["local"].seconds)
    assert found.to_text().startswith("16 rows on 2 ranks of paper, links of 1 GB/s, 1 us; local: DGL(")
    assert "4 micro-batches of 4 rows" in found.to_text()


def test_micro_batches_are_the_best_of_some_and_must_divide() -> None:
    plan = _planned_mlp()
    runs = {m: plan.simulate(2, microbatches=m, steps=4)["1f1b"].seconds for m in (1, 2, 4, 8)}
    best = plan.simulate(2, steps=4)["1f1b"]
    assert best.seconds == min(runs.values()) and runs[best.microbatches] == best.seconds
    for how, message in (
        ({"microbatches": 3}, "3 do not divide a batch of 16 rows"),
        ({"microbatches": 0}, "microbatches: expected an integer of at least 1"),
        ({"ranks": 0}, "ranks: expected an integer of at least 1"),
        ({"ranks": 5, "microbatches": 1}, "5 ranks for 4 blocks"),
    ):
        with pytest.raises(ArgumentError, match=message):
            plan.simulate(**{"ranks": 2, **how})


def test_what_needs_the_blocks_behind_it_has_no_local_pipeline() -> None:
    for plan, reason in (
        (_planned_mlp("bp", 1), "there is one block"),
        (_planned_mlp(update="end"), "update='end' holds every update back"),
    ):
        found = plan.simulate(2, microbatches=2)
        assert "local" not in found.runs and f"no local pipeline: {reason}" in found.to_text()
    assert _planned("hpff")._behind == "'backward 0' needs 'head 1', which is behind it"
    assert _planned("man", **dict(LAM))._behind == "'link 0' needs 'update 1', which is behind it"


def test_a_plan_goes_through_pickle_without_its_network() -> None:
    again = pickle.loads(pickle.dumps(_planned()))
    assert again.seconds == _planned().seconds and again.with_schedule("pipeline").schedule.kind == "pipeline"
    with pytest.raises(BackendError, match="lost its network"):
        again.simulate(2)


def test_a_network_cut_by_hooks_has_no_stages() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    plan = fl.plan(Net(), torch.randn(4, 8), method="dgl", blocks=2, schedule="overlap")
    assert "overlap cannot serve: Net is cut by hooks" in plan.to_text()
    with pytest.raises(BackendError, match="Net is cut by hooks"):
        plan.simulate(2)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"schedule": "auto"}, "schedule: got 'auto'"),
        ({"schedule": "pipeline", "streams": 0}, "streams: expected an integer of at least 1, got 0"),
        ({"schedule": "pipeline", "in_flight": 1.5}, "in_flight: expected"),
        ({"schedule": "overlap", "memory_budget": "much"}, "memory_budget: cannot read 'much'"),
    ],
)
def test_bad_schedules(how, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        fl.plan(nn.Linear(4, 2), torch.randn(2, 4), **how)


def test_a_schedule_is_drawn_and_traced(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    plan = _planned().with_schedule("pipeline")
    text = plan.to_text()
    assert "pipeline: 4 blocks on 2 streams" in text and "batches and tasks in flight" in text
    plan.draw_schedule(tmp_path / "a.svg", steps=1)
    plan.trace_schedule(tmp_path / "a.json", steps=2)
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    work = [e for e in events if e["ph"] == "X"]
    assert len(work) == 2 * len(plan.schedule.tasks) and (tmp_path / "a.svg").exists()
    with pytest.raises(ArgumentError, match="path: cannot draw"):
        plan.draw_schedule(tmp_path / "a.txt")


def test_the_command_plans_schedules_and_ranks(capsys, tmp_path) -> None:
    small = [
        "plan",
        "--model",
        "resnet20",
        "--model-option",
        "width=4",
        "--method",
        "dgl",
        "--blocks",
        "3",
        "--batch",
        "8",
    ]
    trace = str(tmp_path / "a.json")
    assert cli.main([*small, "--schedule", "pipeline", "--in-flight", "2", "--tasks", "--trace", trace]) == 0
    printed = capsys.readouterr().out
    assert "pipeline: 3 blocks on 2 streams" in printed and "stream 1" in printed and f"traced to {trace}" in printed
    ranks = [*small, "--ranks", "2", "--bandwidth", "25GB", "--latency", "1e-5", "--microbatches", "2"]
    assert cli.main([*ranks, "--straggler", "1=1.5"]) == 0
    assert "links of 25 GB/s, 10 us" in (printed := capsys.readouterr().out) and "1f1b, recompute" in printed
    for extra, message in (
        (["--straggler", "1:2"], "--straggler: got '1:2'; write RANK=FACTOR"),
        (["--bandwidth", "fast"], "--bandwidth: got 'fast'"),
        (["--schedule", "pipelin"], "schedule: got 'pipelin'"),
        (["--schedule", "overlap", "--memory-budget", "1KB"], "memory_budget"),
    ):
        assert cli.main([*small, *extra]) == 2
        assert message in capsys.readouterr().err
