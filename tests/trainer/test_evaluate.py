from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.types import StepContext
from fastlocal.data import Batches, Images
from fastlocal.errors import ArgumentError
from fastlocal.models import ResNetCIFAR
from fastlocal.trainer import accuracy
from fastlocal.trainer.evaluate import early_exit, evaluate, predict_early, recalibrate
from tests.engine.nets import TorchvisionStyleResNet

CLASSES = 5


def batches(rows: tuple[int, ...] = (6, 6, 3), seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, 8, 8, generator=g), torch.randint(CLASSES, (n,), generator=g)) for n in rows]


def make(method: str = "dgl", kind: str = "slices", **options: Any) -> fl.LocalModel:
    torch.manual_seed(0)
    blocks: Any = 1 if method == "bp" else 4
    if kind == "slices":
        net: nn.Module = ResNetCIFAR(1, width=4, num_classes=CLASSES)
    else:
        net = TorchvisionStyleResNet(CLASSES)
        blocks = 1 if method == "bp" else ["layer1", "layer2", "layer3"]
    model = fl.localize(net, method, blocks=blocks, sample=torch.randn(2, 3, 8, 8), **options)
    model.train()
    with torch.no_grad():
        for x, _ in batches(seed=9):  # statistics and readouts that are not the initial ones
            model.backbone(x)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


METHODS = [
    ("bp", "slices", {}),
    ("bp", "hooks", {}),
    ("dgl", "slices", {}),
    ("dgl", "hooks", {}),
    ("predsim", "slices", {}),
    ("predsim", "slices", {"losses": "sim"}),
    ("auglocal", "slices", {"depth": 1}),
    ("infopro", "slices", {"lam": (1.0, 1.0)}),
    ("infopro", "hooks", {"lam": (1.0, 1.0)}),
    ("infopro", "slices", {"lam": (1.0, 1.0), "loss": "cross_entropy"}),
    ("feature_reconstruction", "slices", {"first": "image"}),  # its heads read their block's input
]


def by_hand(model: fl.LocalModel, data: list[tuple[Tensor, Tensor]]) -> tuple[list[float], list[int | None]]:
    """Sums of loss times rows, and hits, block by block, from the boundary activations of the plain backbone."""
    model.eval()
    seen: dict[str, Tensor] = {}
    losses = [0.0] * len(model.blocks)
    hits: list[int | None] = [0] * len(model.blocks)
    for x, y in data:
        handles = []
        for name in [b.name for b in model.blocks[:-1]]:
            if name == "stem":  # a bound method: its output is what layer1 gets
                hook = lambda m, inputs, name=name: seen.__setitem__(name, inputs[0].clone())  # noqa: E731
                handles.append(model.backbone.layer1.register_forward_pre_hook(hook))
            else:
                hook = lambda m, inputs, out, name=name: seen.__setitem__(name, out.clone())  # noqa: E731
                handles.append(model.backbone.get_submodule(name).register_forward_hook(hook))
        output = model.backbone(x)
        for handle in handles:
            handle.remove()
        before = None
        for k, block in enumerate(model.blocks):
            if block.head is None:
                loss, logits = nn.functional.cross_entropy(output, y), output
            else:
                loss, _, logits, _ = block.head(seen[block.name], StepContext(y, x, cross_entropy, boundary=before))
                before = seen[block.name]
            losses[k] += loss.item() * len(y)
            hits[k] = None if logits is None else hits[k] + int((logits.argmax(1) == y).sum())
    model.train()
    return losses, hits


@pytest.mark.parametrize(("method", "kind", "options"), METHODS)
def test_every_block_as_computed_by_hand(method: str, kind: str, options: dict[str, Any]) -> None:
    model = make(method, kind, **options)
    data = batches()
    got = evaluate(model, data)
    losses, hits = by_hand(model, data)
    assert got.count == 15 and len(got.losses) == len(model.blocks)
    assert got.losses == pytest.approx([loss / 15 for loss in losses], rel=1e-5)
    assert got.accuracies == [None if h is None else h / 15 for h in hits]
    assert got.loss == got.losses[-1] and got.accuracy == got.accuracies[-1]


@pytest.mark.parametrize(("method", "kind", "options"), METHODS)
def test_nothing_changes(method: str, kind: str, options: dict[str, Any]) -> None:
    model = make(method, kind, **options)
    frozen = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    model(*batches()[0]).loss.backward()
    modes = {m: m.training for m in model.modules()}
    state = {n: v.clone() for n, v in model.state_dict().items()}
    grads = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    loader = DataLoader(TensorDataset(*(torch.cat(p) for p in zip(*batches()))), batch_size=6, shuffle=True)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluate(model, loader)
    early_exit(model, loader)
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[1]
    assert (np.random.get_state()[1] == streams[2]).all()
    assert not frozen.training and {m: m.training for m in model.modules()} == modes
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert p.grad is g is None or torch.equal(p.grad, g)
    assert not any(m._forward_hooks for m in model.modules())


def test_modes_are_put_back_after_an_error() -> None:
    model = make()
    bad = [*batches(), (torch.randn(2, 3, 8, 8), torch.tensor([0, CLASSES]))]
    with pytest.raises(ArgumentError, match="class indices run"):
        evaluate(model, bad)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(("method", "kind", "options"), METHODS)
def test_nothing_waits_for_the_device_before_the_end(method: str, kind: str, options: dict[str, Any]) -> None:
    model = make(method, kind, **options).to("meta")  # where reading a value raises
    read = []

    class Source:
        def epoch(self, number: int) -> Any:
            for batch in batches():
                yield batch
                read.append(len(batch[1]))

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        evaluate(model, Source())
    assert read == [6, 6, 3] and all(m.training for m in model.modules())


@pytest.mark.parametrize("size", [4, 7])
def test_the_last_accuracy_is_that_of_the_trainer(size: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (30, 3, 8, 8), generator=g, dtype=torch.uint8)
    y = torch.randint(CLASSES, (30,), generator=g)
    data = Images(x, y, x, y, CLASSES, torch.full((3,), 0.5), torch.full((3,), 0.25), "noise")
    test = Batches(data, train=False, batch_size=size)
    for kind in ("slices", "hooks"):
        model = make("dgl", kind)
        assert evaluate(model, test).accuracy == accuracy(model, test)
        low = evaluate(model, test, precision="bf16-mixed")
        assert low.accuracy == accuracy(model, test, torch.bfloat16)
        assert low.losses == pytest.approx(evaluate(model, test).losses, rel=0.05)
        assert low.losses != evaluate(model, test).losses


def test_a_source_with_epochs_gives_epoch_zero() -> None:
    asked = []

    class Source:
        def epoch(self, number: int) -> Any:
            asked.append(number)
            return iter(batches())

    model = make()
    assert evaluate(model, Source()) == evaluate(model, batches()) and asked == [0]


def test_limit_channels_last_and_mappings() -> None:
    model = make()
    data = batches()
    assert evaluate(model, data, limit=2) == evaluate(model, data[:2])
    assert evaluate(model, data, channels_last=True).losses == pytest.approx(evaluate(model, data).losses, rel=1e-5)
    named = make("dgl", "hooks")
    as_lists = [list(batch) for batch in data]
    as_mappings = [{"x": x, "labels": y} for x, y in data]
    assert evaluate(named, as_lists) == evaluate(named, data) == evaluate(named, as_mappings)


def test_probabilities_as_targets() -> None:
    model, data = make("predsim"), batches()
    hot = [(x, nn.functional.one_hot(y, CLASSES).float()) for x, y in data]
    a, b = evaluate(model, data), evaluate(model, hot)
    assert b.count == 15 and a.accuracies == b.accuracies and b.losses == pytest.approx(a.losses, rel=1e-5)


def gpt() -> fl.LocalModel:
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=11, n_embd=8, n_layer=3, n_head=2, block_size=6, tie=False)
    return fl.localize(net, "dgl", blocks=3, sample=torch.zeros(2, 6, dtype=torch.int64))


def test_tokens_that_are_ignored_do_not_count() -> None:
    model = gpt()
    tokens = torch.randint(11, (5, 6))
    labels = tokens.clone()
    labels[0, 2:], labels[3, :4] = -100, -100
    data = [(tokens[:3], labels[:3]), (tokens[3:], labels[3:])]
    got = evaluate(model, data)
    model.eval()
    logits, shifted = model.backbone(tokens)[:, :-1], labels[:, 1:]
    keep = shifted != -100
    assert got.count == int(keep.sum()) == 18
    expected = nn.functional.cross_entropy(logits[keep], shifted[keep])
    assert got.loss == pytest.approx(expected.item(), rel=1e-5)
    assert got.accuracy == (logits.argmax(-1) == shifted)[keep].sum().item() / 18
    assert all(a is not None for a in got.accuracies)
    # one batch in which nothing counts changes nothing, a source of such batches is refused
    nothing = (tokens[:2], torch.full_like(tokens[:2], -100))
    assert evaluate(model, [*data, nothing]) == got
    with pytest.raises(ArgumentError, match="all are ignored"):
        evaluate(model, [nothing])


def test_losses_that_are_not_finite_are_reported() -> None:
    model = make()
    with torch.no_grad():
        next(model.heads[1].parameters()).fill_(float("nan"))
    got = evaluate(model, batches())
    assert [loss == loss for loss in got.losses] == [True, False, True, True]


def test_regression_has_no_accuracy() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model = fl.localize(net, "bp", sample=torch.zeros(2, 4), criterion=nn.MSELoss())
    x, y = torch.randn(6, 4), torch.randn(6, 1)
    got = evaluate(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    assert got.accuracy is None and got.to_row() == {"val_loss": got.loss, "val_loss_0": got.loss}
    assert got.loss == pytest.approx(nn.functional.mse_loss(net(x), y).item()) and got.count == 6


@pytest.mark.parametrize("shape", [(5, 5), (4, 4), (6,)])
def test_one_target_per_pixel(shape: tuple[int, ...]) -> None:
    conv = nn.Conv2d if len(shape) == 2 else nn.Conv1d
    net = nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 4, 1))
    model = fl.localize(net, "bp", sample=torch.zeros(2, 3, *shape), num_classes=4, criterion=cross_entropy)
    x, y = torch.randn(3, 3, *shape), torch.randint(4, (3, *shape))
    expected = (net(x).argmax(1) == y).sum().item()
    got = evaluate(model, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert got.accuracy == expected / y.numel() and got.count == y.numel()
    step = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.0)).step(x, y)
    assert step.correct.tolist() == [expected]
    if len(shape) == 2:  # three dimensions of probabilities have the classes last
        hot = nn.functional.one_hot(y, 4).movedim(-1, 1).float()
        soft = evaluate(model, [(x, hot)])
        assert soft.accuracy == got.accuracy and soft.count == got.count and soft.loss == pytest.approx(got.loss)


def test_values_as_targets_count_each() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    model = fl.localize(net, "bp", sample=torch.zeros(2, 4), criterion=nn.MSELoss(), num_classes=1)
    x, y = torch.randn(7, 4), torch.randn(7)
    got = evaluate(model, [(x[:6], y[:6]), (x[6:], y[6:])])
    assert got.accuracy is None and got.count == 7
    assert got.loss == pytest.approx(nn.functional.mse_loss(net(x), y).item())


def test_a_row_for_the_log() -> None:
    got = evaluate(make("infopro", lam=(1.0, 1.0)), batches())
    row = got.to_row("test")
    assert list(row) == [
        "test_loss", "test_accuracy", "test_loss_0", "test_loss_1", "test_loss_2", "test_loss_3", "test_accuracy_3",
    ]  # fmt: skip
    assert row["test_loss"] == row["test_loss_3"] == got.loss and got.to_row("test_") == row
    assert "loss_0" in got.to_row("")


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        ([], {}, "^source: holds no batch"),
        (iter(batches()), {}, "^source: an iterator"),
        (batches()[0], {}, "^source: a tuple is one batch"),
        (batches()[0][0], {}, "^source: a Tensor is one batch"),
        (3, {}, "^source: got int"),
        (batches(), {"limit": 0}, "^limit: got 0"),
        (batches(), {"precision": "8"}, "^precision: got '8'"),
    ],
)
def test_arguments(source: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        evaluate(make(), source, **options)


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^model: expected a LocalModel"):
        evaluate(nn.Linear(2, 2), batches())  # type: ignore[arg-type]


# --- early exit ------------------------------------------------------------------------------------------------------


def test_early_exit_as_computed_sample_by_sample() -> None:
    model = make("auglocal", depth=1)
    data = batches((6, 5, 4))
    levels = [0.0, 0.3, 0.4, 0.6, 2.0]
    found = early_exit(model, data, levels)
    model.eval()
    x, y = (torch.cat(parts) for parts in zip(*data))
    h, all_logits = x, []
    with torch.no_grad():
        for block in model.blocks:
            h = block(h)
            all_logits.append(h if block.head is None else block.head(h, StepContext(y, x, cross_entropy)).logits)
    last = len(model.blocks) - 1
    spread = set()
    for level, result in zip(levels, found, strict=True):
        right, macs, left = 0, 0, [0] * (last + 1)
        for i in range(len(y)):
            k = next(
                (k for k in range(last) if float(all_logits[k][i].softmax(0).max()) >= level),
                last,
            )
            left[k] += 1
            right += int(all_logits[k][i].argmax() == y[i])
            macs += sum(b.cost.macs + b.cost.head_macs for b in model.blocks[: k + 1])
        spread.add(tuple(left))
        assert result.threshold == level and result.accuracy == right / len(y)
        assert result.left == pytest.approx([n / len(y) for n in left]) and result.macs == pytest.approx(macs / len(y))
        assert result.full_macs == sum(b.cost.macs for b in model.blocks)
    assert len(spread) >= 4  # the levels do differ on this data
    assert found[0].left[0] == 1.0 and found[-1].left[last] == 1.0
    assert found[-1].accuracy == evaluate(model, data).accuracy


def test_predict_early_computes_no_further_than_it_must() -> None:
    model = make("auglocal", depth=1).double()
    x, y = (torch.cat(parts) for parts in zip(*batches((6, 5, 4))))
    x = x.double()
    for level in (0.0, 0.3, 0.4, 0.6, 2.0):
        result = early_exit(model, [(x, y)], [level])[0]
        rows: list[int] = []
        handle = model.backbone.get_submodule(model.blocks[-1].units[0]).register_forward_hook(
            lambda m, inputs, out, rows=rows: rows.append(len(inputs[0]))
        )
        early = predict_early(model, x, level)
        handle.remove()
        assert (early.classes == y).double().mean().item() == pytest.approx(result.accuracy)
        counts = torch.bincount(early.blocks, minlength=len(model.blocks))
        assert (counts / len(y)).tolist() == pytest.approx(result.left)
        assert sum(rows) == counts[-1]
        assert model.training
    assert torch.equal(predict_early(model, x, 2.0).classes, model.eval()(x).argmax(1))


def test_heads_without_scores_are_no_exits() -> None:
    model = make("infopro", lam=(1.0, 1.0))
    result = early_exit(model, batches(), [0.0])[0]
    assert result.left == [0.0, 0.0, 0.0, 1.0] and result.macs == result.full_macs
    assert predict_early(model, batches()[0][0], 0.0).blocks.tolist() == [3] * 6
    hooked = make("dgl", "hooks")
    assert early_exit(hooked, batches(), [0.0])[0].left[0] == 1.0


def test_early_exit_refuses() -> None:
    model = make("dgl", "hooks")
    with pytest.raises(ArgumentError, match=r"^model: TorchvisionStyleResNet is cut by hooks"):
        predict_early(model, batches()[0][0], 0.5)
    with pytest.raises(ArgumentError, match=r"^threshold: got -1"):
        early_exit(model, batches(), [-1])
    with pytest.raises(ArgumentError, match=r"^threshold: got nan"):
        predict_early(make(), batches()[0][0], float("nan"))
    with pytest.raises(ArgumentError, match=r"^x: expected"):
        predict_early(make(), torch.zeros(0, 3, 8, 8), 0.5)
    with pytest.raises(ArgumentError, match="one prediction a sample"):
        early_exit(gpt(), [torch.randint(11, (2, 6))])
    one = make("bp")
    x = batches()[0][0]
    assert torch.equal(predict_early(one, x, 0.0).classes, one.eval()(x).argmax(1))


# --- BatchNorm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["slices", "hooks"])
@pytest.mark.parametrize("training", [True, False])
def test_recalibrate_is_update_bn_and_moves_nothing_else(kind: str, training: bool) -> None:
    model, twin = make("dgl", kind).train(training), make("dgl", kind)
    data = batches((6, 6, 5, 4))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    outside = torch.get_rng_state()
    assert recalibrate(model, data, 3) == 3
    assert torch.equal(torch.get_rng_state(), outside)
    update_bn([x for x, _ in data[:3]], twin.backbone)
    expected = {f"backbone.{n}": v for n, v in twin.backbone.state_dict().items()}
    norms = {n for n, _ in model.named_buffers() if not n.endswith("num_batches_tracked")}  # 3 before, 3 after
    changed = set()
    for name, value in model.state_dict().items():
        if name in expected:
            assert torch.equal(value, expected[name]), name
        if not torch.equal(value, before[name]):
            changed.add(name)
    assert {n for n in changed if not n.endswith("num_batches_tracked")} == norms
    assert all(m.training == training for m in model.modules())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {0.1}


def test_recalibrated_heads_hold_the_average_of_their_inputs() -> None:
    model = make("dgl")
    norm = next(m for m in model.heads[1].modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[Tensor] = []
    handle = norm.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0].mean((0, 2, 3))))
    assert recalibrate(model, batches()) == 3  # all there are
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))


def test_frozen_norms_stay_in_a_model_that_trains() -> None:
    model = make("dgl")
    frozen = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before = frozen.running_mean.clone()
    recalibrate(model, batches())
    assert torch.equal(frozen.running_mean, before) and not frozen.training


def test_recalibrate_takes_back_what_it_cannot_finish() -> None:
    model = make("dgl")
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ArgumentError, match="one sample gives"):
        recalibrate(model, batches((6, 1)))
    with pytest.warns(RuntimeWarning, match="not finite; the old ones stay"):
        x, y = batches()[0]
        recalibrate(model, [(x * float("inf"), y)])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    with pytest.raises(ArgumentError, match=r"^batches: got 0"):
        recalibrate(model, batches(), 0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert recalibrate(fl.localize(net, "bp", sample=torch.zeros(2, 4)), []) == 0
