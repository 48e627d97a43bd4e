"""The plan of a step against the same step run on real tensors, under the same tools."""

from __future__ import annotations

import copy
import dataclasses
import gc
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
from fastlocal.errors import ArgumentError
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
