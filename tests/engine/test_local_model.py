"""`LocalModel` as an ordinary module: copies, averages, state, precision, hooks, export; and networks as found in the wild."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import IsolationError, PartitionError
from fastlocal.models import ResNetCIFAR
from tests.engine.baseline import SumOfLosses, assert_equal, gradients, relative_error
from tests.engine.nets import DenseNetStyle, TorchvisionStyleResNet


def sliced() -> fl.LocalModel:
    return fl.localize(
        ResNetCIFAR(1, width=4, num_classes=5), "auglocal", blocks=4, depth=1, sample=torch.randn(2, 3, 8, 8)
    )


def hooked() -> fl.LocalModel:
    return fl.localize(
        TorchvisionStyleResNet(), "dgl", blocks=["layer1", "layer2", "layer3"], sample=torch.randn(2, 3, 8, 8)
    )


def sequential() -> fl.LocalModel:
    layers = [
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 5),
    ]
    return fl.localize(nn.Sequential(*layers), "predsim", blocks=3, sample=torch.randn(2, 3, 8, 8))


def bound_methods() -> fl.LocalModel:
    net = models.create("vit_tiny", num_classes=5, img_size=8, patch_size=4, dim=8, depth=3, heads=2)
    return fl.localize(net, "dgl", blocks=["embed", "blocks.1"], sample=torch.randn(2, 3, 8, 8))


KINDS = pytest.mark.parametrize("make", [sliced, hooked, sequential, bound_methods])


def images(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 8, 8), torch.randint(5, (rows,))


def train(model: nn.Module, steps: int = 3, seed: int = 7) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*images()).loss.backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@KINDS
def test_a_copy_trains_the_same_and_apart(make: Callable[[], fl.LocalModel], duplicate: Callable[[Any], Any]) -> None:
    model = make()
    model(*images()).loss.backward()  # a model in use: gradients, statistics
    model.zero_grad()
    twin, before = duplicate(model), state(model)
    ours = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    assert not ours & {p.data_ptr() for p in [*twin.parameters(), *twin.buffers()]}
    assert all(
        a is b for block in twin.blocks for a, b in zip(block.parameters(), _registered(twin, block), strict=True)
    )
    train(twin)
    assert_equal(state(model), before)
    train(model)
    assert_equal(state(twin), state(model))
    assert repr(twin) == repr(model) and twin.summary() == model.summary()
    fl.Engine(twin, lambda named: torch.optim.SGD(named, lr=0.1)).step(*images())


def _registered(model: fl.LocalModel, block: Any) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name, _ in block.named_parameters()]


@KINDS
def test_averaged_model(make: Callable[[], fl.LocalModel]) -> None:
    model = make()
    average = AveragedModel(model)
    snapshots = []
    for seed in range(3):
        train(model, steps=1, seed=seed)
        average.update_parameters(model)
        snapshots.append(state(model))
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p.data, torch.stack([s[name] for s in snapshots]).mean(0), rtol=1e-5, atol=1e-6)
    loader = [images() for _ in range(3)]
    update_bn(loader, average)  # calls it in training mode, without targets
    average.eval()
    x, _ = images()
    assert torch.equal(average(x), average.module.export()(x))
    assert relative_error(dict(average.module.named_parameters()), dict(model.named_parameters())) > 1e-4


def test_exponential_average_with_buffers() -> None:
    model = hooked()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    before = state(model)
    train(model, steps=1)
    ema.update_parameters(model)  # the first update copies
    train(model, steps=1, seed=8)
    ema.update_parameters(model)
    changed = relative_error(dict(ema.module.named_parameters()), {n: before[n] for n, _ in model.named_parameters()})
    assert changed > 1e-4 and not any(m._forward_hooks for m in ema.modules())
    train(ema.module, steps=1)  # what it averages over is a whole LocalModel


# --- state -----------------------------------------------------------------------------------------------------------


@KINDS
def test_state_dict_round_trip(make: Callable[[], fl.LocalModel]) -> None:
    model = make()
    train(model)
    saved = state(model)
    assert all(name.startswith(("backbone.", "heads.")) for name in saved)
    assert {n.split(".")[1] for n in saved if n.startswith("heads.")} == {str(k) for k in range(len(model.blocks) - 1)}
    torch.manual_seed(99)
    other = make()
    assert relative_error(dict(other.named_parameters()), dict(model.named_parameters())) > 1e-2
    assert str(other.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    train(model)
    train(other)
    assert_equal(state(other), state(model))


@KINDS
def test_parameters_of_blocks_are_all_and_disjoint(make: Callable[[], fl.LocalModel]) -> None:
    model = make()
    named = [item for block in model.blocks for item in block.named_parameters()]
    assert len({name for name, _ in named}) == len({id(p) for _, p in named}) == len(named)
    assert {n: id(p) for n, p in named} == {n: id(p) for n, p in model.named_parameters()}
    buffers = [id(b) for block in model.blocks for b in block.all_buffers()]
    assert sorted(buffers) == sorted(id(b) for b in model.buffers())


@KINDS
def test_export_is_the_network_that_came(make: Callable[[], fl.LocalModel]) -> None:
    torch.manual_seed(3)
    keys = list(make().backbone.state_dict())
    torch.manual_seed(3)
    model = make()
    net, before = model.backbone, state(model.backbone)
    train(model)
    exported = model.export()
    assert exported is net and type(exported) is type(make().backbone)
    assert list(exported.state_dict()) == list(model.backbone_state_dict()) == keys
    assert (
        relative_error(
            {n: p for n, p in exported.named_parameters()}, {n: before[n] for n, _ in net.named_parameters()}
        )
        > 1e-3
    )
    assert model.export(readout=True) is net
    fresh: Any = make().backbone
    fresh.load_state_dict(model.backbone_state_dict())
    x, _ = images()
    assert torch.equal(fresh.eval()(x), exported.eval()(x))


@KINDS
def test_eval_is_the_plain_backbone(make: Callable[[], fl.LocalModel]) -> None:
    model = make()
    train(model)
    plain = copy.deepcopy(model.export()).eval()
    before = state(model)
    x, y = images()
    assert model.eval() is model
    for out in (model(x), model(x, y), model(x, labels=y)):
        assert torch.equal(out, plain(x))
    assert_equal(state(model), before)
    model.train()
    assert isinstance(model(x, y), fl.LocalOutput) and isinstance(model(x, labels=y), fl.LocalOutput)


@KINDS
def test_localize_leaves_the_network_as_it_was(make: Callable[[], fl.LocalModel]) -> None:
    net = make().export()
    net.eval()
    frozen = next(net.parameters()).requires_grad_(False)
    before, hooks = state(net), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    model = fl.localize(net, "dgl", blocks=2, sample=torch.randn(2, 3, 8, 8))
    assert_equal(state(net), before)
    assert hooks == 0 == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert not frozen.requires_grad and not net.training and all(p.grad is None for p in model.parameters())


def test_summary() -> None:
    model = hooked()
    text = model.summary()
    lines = text.splitlines()
    assert lines[0] == "DGL(mode='paper', head='dgl', init='torch') on TorchvisionStyleResNet, 4 blocks, cut by hooks"
    assert [line.split()[0] for line in lines[1:-1]] == ["block", "0", "1", "2", "3"]
    for k, name, boundary in (
        (0, "layer1", "4x4x4"),
        (1, "layer2", "8x2x2"),
        (2, "layer3", "8x2x2"),
        (3, "output", "5"),
    ):
        row = lines[2 + k].split()
        assert row[1] == name and boundary in row
        assert f"{sum(p.numel() for _, p in model.blocks[k].backbone_parameters()):,}" in row
    heads = sum(p.numel() for p in model.heads.parameters())
    assert f"backbone {sum(p.numel() for p in model.backbone.parameters()):,} parameters, heads {heads:,}" in lines[-1]
    assert "4 blocks by hooks on layer1, layer2, layer3" in model.explain()
    assert "3 blocks as slices" in sliced().explain()


# --- precision and replaced parameters -------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_the_model(make: Callable[[], fl.LocalModel], dtype: torch.dtype) -> None:
    model = make()
    other = copy.deepcopy(model).double()
    x, y = images()
    model.to(dtype)
    out = model(x.to(dtype), y)
    out.loss.backward()
    exact = other(x.double(), y)
    exact.loss.backward()
    assert all(p.dtype == dtype and p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
    assert out.losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        out.losses.double(), exact.losses, rtol=0.1 if dtype == torch.bfloat16 else 0.02, atol=0.0
    )
    if dtype == torch.float64:
        assert_equal(gradients(model), gradients(other))
        engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
        assert engine.step(x.double(), y).losses.dtype == torch.float64


@KINDS
def test_replaced_parameters_are_the_ones_trained(make: Callable[[], fl.LocalModel]) -> None:
    """FSDP, weight swaps and ``.to()`` on some devices put new Parameter objects in place of the old ones."""
    model = make()
    old = list(model.parameters())
    flag = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(flag)
    assert not {id(p) for p in old} & {id(p) for p in model.parameters()}
    x, y = images()
    model(x.double(), y).loss.backward()
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in old)
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
    before = state(model)
    engine.step(x.double(), y)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.startswith("backbone"))


def test_parametrized_weights_are_found() -> None:
    net = TorchvisionStyleResNet()
    for layer in (net.conv1, net.layer3[0].conv1, net.fc):
        nn.utils.parametrizations.weight_norm(layer)
    model = fl.localize(net, "dgl", blocks=["layer1", "layer3"], sample=torch.randn(2, 3, 8, 8))
    model(*images()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert "backbone.layer3.0.conv1.parametrizations.weight.original0" in dict(model.blocks[1].named_parameters())


# --- hooks -----------------------------------------------------------------------------------------------------------


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_hooks_stand_only_while_a_training_forward_runs() -> None:
    model = hooked()
    x, y = images()
    during: list[int] = []
    handle = model.backbone.fc.register_forward_pre_hook(lambda m, i: during.append(hook_count(model)))  # type: ignore[union-attr]
    model(x, y)
    model(x)  # training without a target: the plain backbone
    model.eval()(x)
    assert during == [4, 1, 1]  # three cuts and the probe itself
    handle.remove()
    assert hook_count(model) == 0


@pytest.mark.parametrize("where", ["layer2", "fc"])
def test_hooks_are_gone_after_an_error(where: str) -> None:
    model = hooked()
    x, y = images()
    probe = model.backbone.get_submodule(where)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise KeyError("broken layer")

    handle = probe.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken layer"):
        model(x, y)
    with pytest.raises(KeyError, match="broken layer"):
        fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1)).step(x, y)
    handle.remove()
    assert hook_count(model) == 0 and not gradients(model)
    assert torch.isfinite(model(x, y).loss)


def test_users_hooks_stay_and_run() -> None:
    model = hooked()
    seen: list[tuple[int, ...]] = []
    model.backbone.layer2.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape)))  # type: ignore[union-attr]
    train(model, steps=2)
    assert seen == [(6, 8, 2, 2)] * 2 and hook_count(model) == 1


# --- networks as found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [["layer1", "layer2", "layer3"], ["layer2.0"], 4, 8])
def test_torchvision_style_resnet_equals_the_sum_of_losses(blocks: Any) -> None:
    model = fl.localize(TorchvisionStyleResNet(), "dgl", blocks=blocks, sample=torch.randn(2, 3, 8, 8))
    assert len(model.blocks) == (blocks if isinstance(blocks, int) else len(blocks) + 1)
    plain = SumOfLosses(copy.deepcopy(model))
    levels = [model, copy.deepcopy(model)]
    make = lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9)  # noqa: E731
    optimizers = [make(plain.parameters()), make(model.parameters())]
    engine = fl.Engine(levels[1], make, backend="reference")
    for _ in range(4):
        x, y = images()
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            net(x, y)["loss"].backward()
            optimizer.step()
        engine.step(x, y)
    assert_equal(state(model), state(plain))
    assert_equal(state(levels[1]), state(plain))


def test_more_blocks_than_units_of_a_hooked_network() -> None:
    with pytest.raises(PartitionError, match="blocks: 9 asked for, but TorchvisionStyleResNet has 8 units; use 1 to 8"):
        fl.localize(TorchvisionStyleResNet(), "dgl", blocks=9, sample=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("blocks", [["block1.1"], ["transition", "block2.0"], 3])
def test_a_skip_across_the_cut_is_refused(blocks: Any) -> None:
    net = DenseNetStyle()
    before = state(net)
    with pytest.raises(IsolationError, match=r"^blocks: .*block 0 \('.+'\).* block \d.*[cC]ut elsewhere"):
        fl.localize(net, "dgl", blocks=blocks, sample=torch.randn(2, 3, 8, 8))
    assert_equal(state(net), before)
    assert hook_count(net) == 0


def test_densenet_style_cut_where_only_one_value_passes() -> None:
    model = fl.localize(DenseNetStyle(), "dgl", blocks=["stem", "transition"], sample=torch.randn(2, 3, 8, 8))
    plain = SumOfLosses(copy.deepcopy(model))
    x, y = images()
    model(x, y).loss.backward()
    plain(x, y)["loss"].backward()
    assert_equal(gradients(model), gradients(plain))


class InPlaceBehindTheCut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


def test_an_in_place_operator_right_behind_a_cut() -> None:
    """It overwrites the boundary activation after the block before it is done with it, so nothing is lost."""
    model = fl.localize(InPlaceBehindTheCut(), "dgl", blocks=["first"], sample=torch.randn(2, 6))
    safe = copy.deepcopy(model)
    safe.backbone.act.inplace = False  # type: ignore[union-attr]
    x, y = torch.randn(4, 6), torch.randint(5, (4,))
    out = model(x, y, return_logits=True)
    out.loss.backward()
    other = safe(x, y, return_logits=True)
    other.loss.backward()
    assert_equal(gradients(model), gradients(safe))
    assert torch.equal(out.logits, other.logits) and torch.equal(out.correct, other.correct)
