"""Bad input: every refusal names the argument and the remedy, and leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.errors import ArgumentError, BackendError, IsolationError, NonFiniteError, PartitionError
from tests.engine.untouched import assert_same, state_of, untouched

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 3, 9, 1])


def resnet(**options: Any) -> nn.Module:
    return models.ResNetCIFAR(1, width=4, **options)


def localized(blocks: Any = 4, **options: Any) -> fl.LocalModel:
    return fl.localize(resnet(), "dgl", blocks=blocks, sample=X[:2], **options)


def momentum(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


@contextmanager
def refused(
    message: str, *modules: nn.Module, optimizer: Any = None, error: type[Exception] = ArgumentError
) -> Iterator[None]:
    """The body must raise ``error`` with this message and change nothing."""
    with untouched(*modules, optimizer=optimizer), pytest.raises(error, match=message):
        yield


# ------------------------------------------------------------------------------------------------------------- localize


@pytest.mark.parametrize("blocks", [5, 0, -2])
def test_more_blocks_than_units(blocks: int) -> None:
    net = resnet()
    with refused(rf"^blocks: {blocks} asked for, but ResNetCIFAR has 4 units; use 1 to 4", net, error=PartitionError):
        fl.localize(net, "dgl", blocks=blocks, sample=X[:2])


@pytest.mark.parametrize(
    "names, message",
    [
        (["layr2.0"], r"the backbone has no module 'layr2.0'; near names: layer\d.0"),
        (["layer2.0", "layer1.0"], r"\['layer2.0', 'layer1.0'\] is not in the order.*use \['layer1.0', 'layer2.0'\]"),
        (["layer1.0", "layer1.0"], r"\['layer1.0', 'layer1.0'\] is not in the order.*or names one twice; use \['layer1.0'\]"),
        (["layer3.0"], r"'layer3.0' is the last unit; the last block ends there anyway, leave it out"),
        (["readout"], r"the backbone has no module 'readout'"),
    ],
)  # fmt: skip
def test_cut_names(names: list[str], message: str) -> None:
    net = resnet()
    with refused("^blocks: .*" + message, net, error=PartitionError):
        fl.localize(net, "dgl", blocks=names, sample=X[:2])


@pytest.mark.parametrize(
    "blocks, message",
    [
        (None, r"^blocks: say how many blocks, which modules to cut after, or 'auto' with memory_budget="),
        (2.0, r"^blocks: expected an int, a list of module names or 'auto', got 2.0"),
        (True, r"^blocks: expected an int, a list of module names or 'auto', got True"),
        ("all", r"^blocks: expected an int, a list of module names or 'auto', got 'all'"),
        (["layer1.0", 2], r"^blocks: the list names modules to cut after, got \['layer1.0', 2\]"),
        ("auto", r"^memory_budget: blocks='auto' needs it, such as memory_budget='4GiB'"),
    ],
)
def test_what_blocks_takes(blocks: Any, message: str) -> None:
    net = resnet()
    with refused(message, net):
        fl.localize(net, "dgl", blocks=blocks, sample=X[:2])


class Chain(nn.Module):
    """Layers run in the order of ``order``; 'fc' last."""

    def __init__(self, order: str = "abc") -> None:
        super().__init__()
        self.order = order
        for name in "abc":
            setattr(self, name, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return self.fc(x)


ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "order, names, message",
    [
        ("abac", ["a"], r"module 'a' runs 2 times in a forward, so a cut after it is not one place; cut after a module that runs once"),
        ("ac", ["b"], r"module 'b' runs 0 times in a forward.*cut after a module that runs once"),
        ("abc", ["fc"], r"'fc' is the last module with parameters, so nothing is left to train after it; leave it out"),
    ],
)  # fmt: skip
def test_cuts_that_are_no_place(order: str, names: list[str], message: str) -> None:
    net = Chain(order)
    with refused("^blocks: " + message, net, error=PartitionError):
        fl.localize(net, "dgl", blocks=names, sample=ROWS)


def test_a_skip_connection_that_jumps_a_cut() -> None:
    net = resnet()
    message = (
        r"^blocks: a value computed in block 0 \('layer1.0.conv2'\) reaches block 1 \('output'\) around.*cut elsewhere"
    )
    with refused(message, net, error=IsolationError):
        fl.localize(net, "dgl", blocks=["layer1.0.conv2"], sample=X[:2])


class Tied(nn.Module):
    def __init__(self, shared: str = "weight") -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.shared = shared
        if shared == "weight":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
            if self.shared == "module":
                h = self.norm(h)
        return self.head(h)


IDS = torch.arange(10).reshape(2, 5)


def test_tied_weights_across_a_cut() -> None:
    net = Tied()
    message = (
        r"^tied: parameters are used on both sides of a cut: embed.weight = head.weight \(blocks 0, 1\); use tied='untie'"
        r".*tied='link'.*or other cuts"
    )
    with refused(message, net, error=IsolationError):
        fl.localize(net, "dgl", blocks=2, sample=IDS)
    with refused(r"^tied: got 'yes'; valid are 'error', 'untie', 'link'", net):
        fl.localize(net, "dgl", blocks=2, sample=IDS, tied="yes")  # type: ignore[arg-type]
    for tied in ("untie", "link"):
        model = fl.localize(Tied(), "dgl", blocks=2, sample=IDS, tied=tied)  # type: ignore[arg-type]
        assert torch.isfinite(model(IDS, IDS).losses).all()


@pytest.mark.parametrize("tied", ["untie", "link"])
def test_one_module_used_in_two_blocks_cannot_be_untied(tied: Any) -> None:
    net = Tied("module")
    with refused(r"^tied: norm.weight \(blocks 0, 1\); norm.bias.*is used by two blocks through one module.*cut elsewhere", net,
                 error=IsolationError):  # fmt: skip
        fl.localize(net, "dgl", blocks=2, sample=IDS, tied=tied)


def test_a_refusal_after_untying_ties_again() -> None:
    net = Tied()
    with refused(r"^method: 'auglocal' builds its heads from units", net):
        fl.localize(net, "auglocal", blocks=3, depth=1, sample=IDS, tied="untie")
    assert net.head.weight is net.embed.weight


def test_a_refusal_in_a_later_head_draws_no_random_numbers() -> None:
    class Fussy(fl.Method):
        name = "fussy"

        def head(self, site: Any) -> nn.Module:
            if site.index == 1:
                raise ArgumentError("site: not here")
            return nn.Linear(4, 4)

    net = resnet()
    with refused("^site: not here", net):
        fl.localize(net, Fussy(), blocks=3, sample=X[:2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "dlg"}, r"^method: no method 'dlg'. Did you mean \"dgl\"\?.* Valid: .*auglocal.*dgl"),
        ({"method": 3}, r"^method: expected a name or a Method, got int"),
        ({"mode": "fast"}, r"^mode: got 'fast'. Valid: 'paper', 'official'"),
        ({"depth": 2}, r"^depth: not an option of method 'dgl'.*Its options: head='dgl'"),
        ({"head": "big"}, r"^head: got 'big'. Valid: 'dgl'"),
        ({"method": "auglocal", "depth": 4}, r"^depth: 4 is too much for blocks=4.*use depth up to 3, more blocks"),
        ({"method": "bp"}, r"^blocks: method 'bp' is end-to-end backprop in one block, got 4; use blocks=1 or another"),
        ({"method": "bp", "blocks": "auto"}, r"^blocks: method 'bp' is .*got 'auto'; use blocks=1"),
        ({"memory_budget": "1GiB"}, r"^memory_budget: is used with blocks='auto' only, got blocks=4"),
        ({"budget_batch": 32}, r"^budget_batch: is used with blocks='auto' only, got blocks=4"),
        ({"net": "resnet20"}, r"^net: expected an nn.Module, got str"),
        ({"net": nn.ReLU()}, r"^net: ReLU has no parameters to train"),
        ({"sample": X[:1]}, r"^sample: 1 row\(s\) give BatchNorm2d no statistics; give at least 2, such as x\[:2\]"),
        ({"sample": X[:0]}, r"^sample: 0 row\(s\) give .* no statistics; give at least 2"),
        ({"sample": torch.zeros(())}, r"^sample: holds no batch; give a small one, such as x\[:2\]"),
        ({"sample": "images"}, r"^batch: cannot tell input from target in a str; give \(x, y\).*batch=lambda b"),
    ],
)
def test_arguments_of_localize(options: dict[str, Any], message: str) -> None:
    net = options.pop("net", None) or resnet()
    arguments = {"method": "dgl", "blocks": 4, "sample": X[:2], **options}
    with refused(message, *([net] if isinstance(net, nn.Module) else [])):
        fl.localize(net, **arguments)


def test_a_model_is_not_localized_twice() -> None:
    model = localized()
    with refused(r"^net: is a LocalModel already; pass its .export\(\) to cut it anew", model):
        fl.localize(model, "dgl", blocks=2, sample=X[:2])


@pytest.mark.parametrize("budget", ["four GiB", "", "4 XB", "1.2.3GiB", None, -1, 0, True, float("nan"), [4]])
def test_unreadable_memory_budget(budget: Any) -> None:
    net = resnet()
    message = r"^memory_budget: " + (
        "blocks='auto' needs it" if budget is None else r"cannot read .*; write bytes, '500MB' or '4GiB'"
    )
    with refused(message, net):
        fl.localize(net, "dgl", blocks="auto", memory_budget=budget, sample=X[:2])


def test_too_small_memory_budget_says_what_would_do() -> None:
    net = resnet()
    with pytest.raises(ArgumentError) as error, untouched(net):
        fl.localize(net, "dgl", blocks="auto", memory_budget="10kB".upper(), budget_batch=64, sample=X[:2])
    message = str(error.value)
    assert message.startswith("memory_budget: 10,000 bytes are too few for 64 rows; the smallest step found takes")
    enough = int(message.partition("takes ")[2].partition(" bytes")[0].replace(",", ""))
    blocks = int(message.partition("blocks=")[2].partition(".")[0])
    model = fl.localize(net, "dgl", blocks="auto", memory_budget=enough, budget_batch=64, sample=X[:2])
    assert len(model.blocks) == blocks
    for rows in (0, -3, 2.5):
        with refused(rf"^budget_batch: expected a number of rows of at least 1, got {rows}", net):
            fl.localize(net, "dgl", blocks="auto", memory_budget=enough, budget_batch=rows, sample=X[:2])  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- engine


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"schedule": "pipeline", "update": "end"}, BackendError, r"^schedule: 'pipeline' .* holds every update back.*; use 'overlap'"),
        ({"schedule": "overlap", "graph": "on"}, BackendError, r"^graph: 'on' needs a CUDA device, the model is on cpu; move it"),
        ({"workers": 0}, ArgumentError, r"^workers: got 0; give an integer of at least 1, or None"),
        ({"in_flight": True}, ArgumentError, r"^in_flight: got True; give an integer of at least 1"),
        ({"memory_budget": "much"}, ArgumentError, r"^memory_budget"),
        ({"schedule": "fast"}, ArgumentError, r"^schedule: got 'fast'; valid are 'auto', 'sequential', 'overlap', 'pipeline'"),
        ({"graph": "on"}, BackendError, r"^graph: 'on' needs a CUDA device, the model is on cpu; move it there"),
        ({"graph": True}, ArgumentError, r"^graph: got True; valid are 'auto', 'on', 'off'"),
        ({"backend": "triton"}, BackendError, r"^backend: 'triton' cannot serve this model: .*Or use 'auto'"),
        ({"backend": "cuda"}, ArgumentError, r"^backend: got 'cuda'; valid are 'auto', 'reference', 'triton', 'native'"),
        ({"precision": "fp8"}, ArgumentError, r"^precision: got 'fp8'; valid are '32-true'.*'bf16-mixed'"),
        ({"update": "later"}, ArgumentError, r"^update: got 'later'; valid are 'immediate', 'end'"),
        ({"memory_format": "nhwc"}, ArgumentError, r"^memory_format: got 'nhwc'; valid are 'preserve', 'channels_last'"),
        ({"nonfinite": "ignore"}, ArgumentError, r"^nonfinite: got 'ignore'; valid are 'raise', 'skip', 'stop'"),
    ],
)  # fmt: skip
def test_arguments_of_engine(options: dict[str, Any], error: type, message: str) -> None:
    model = localized()
    with refused(message, model, error=error):
        fl.Engine(model, momentum, **{"memory_format": "channels_last", **options})


def test_the_model_of_an_engine() -> None:
    net = resnet()
    with refused(r"^model: expected a LocalModel from fastlocal.localize, got ResNetCIFAR", net):
        fl.Engine(net, momentum)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "optimizer, message",
    [
        (0.1, r"expected a function from a block's \[\(name, param\)\] to an optimizer, got float; write lambda named"),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))]), r"expected a function.*got SGD; write lambda named: torch.optim.SGD"),
        (lambda named: None, r"returned NoneType for block 0; return a torch.optim.Optimizer"),
        (lambda named: [torch.optim.SGD(named)], r"returned list for block 0; return a torch.optim.Optimizer"),
        (lambda named: torch.optim.SGD(named[:1]), r"optimizer of block 0 holds 1 parameters, but the block.*build it from exactly"),
        (lambda named: torch.optim.SGD([*named, ("x", nn.Parameter(torch.ones(1)))]), r"optimizer of block 0 holds .*build it from"),
    ],
)  # fmt: skip
def test_optimizers_that_are_no_factory_or_make_something_else(optimizer: Any, message: str) -> None:
    model = localized()
    with refused("^optimizer: .*" + message, model):
        fl.Engine(model, optimizer, memory_format="channels_last")


def test_the_local_optimizer_of_another_model() -> None:
    model, other = localized(3), fl.LocalOptimizer(localized(), momentum)
    with refused(r"^optimizer: has 4 blocks, the model 3; make it from this model", model):
        fl.Engine(model, other)
    twin = fl.LocalOptimizer(copy.deepcopy(model), momentum)
    with refused(
        r"^optimizer: block 0 of the model trains backbone.conv1.weight, which this LocalOptimizer does not hold.*make it",
        model,
    ):
        fl.Engine(model, twin)
    assert fl.Engine(model, fl.LocalOptimizer(model, momentum)).step(X, Y).step == 0


def test_nothing_to_train() -> None:
    model = localized().requires_grad_(False)
    with refused(r"^optimizer: no parameter of the model requires a gradient", model):
        fl.Engine(model, momentum)


# -------------------------------------------------------------------------------------------------------------- batches

PROBABILITIES = torch.full((4, 10), 0.1)
BAD_BATCHES: dict[str, tuple[tuple[Any, ...], str]] = {
    "out of range": ((X, Y + 1), r"^target: class indices run from 1 to 10 but the model has 10 classes \(0 to 9; -100 is ignored\)"),
    "negative": ((X, Y - 1), r"^target: class indices run from -1 to 8 but the model has 10 classes"),
    "int32": ((X, Y.int()), r"^target: class indices must be int64, got torch.int32; use target.long\(\)"),
    "float": ((X, Y.float()), r"^target: floating-point targets are class probabilities \[N, 10\], got \[4\].*target.long\(\)"),
    "length": ((X, Y[:3]), r"^target: holds 3 rows but the input holds 4; give one target per input"),
    "column": ((X, Y[:, None]), r"^target: expected shape \[N\] for this network, got \[4, 1\]"),
    "width": ((X, PROBABILITIES[:, :9]), r"^target: floating-point targets are class probabilities \[N, 10\], got \[4, 9\]"),
    "one row": ((X[:1], Y[:1]), r"^batch: one sample gives BatchNorm2d no statistics in training; use at least 2, drop_last=True, or"),
    "empty": ((X[:0], Y[:0]), r"^batch: the input holds no rows; leave out empty batches"),
}  # fmt: skip
ONLY_AT_B: dict[str, tuple[tuple[Any, ...], str]] = {
    "no target": (((X,),), r"^batch: cannot tell input from target in a tuple; give \(x, y\)"),
    "text": (("text",), r"^batch: cannot tell input from target in a str; give \(x, y\)"),
    "nothing": ((), r"^batch: cannot tell input from target in a tuple; give \(x, y\)"),
    "no labels": (({"x": X},), r"^batch: the mapping has keys \['x'\] but none of labels, label"),
    "no tensor": ((("text", Y),), r"^batch: holds no tensor; give \(x, y\)"),
    "two inputs": (
        (X, X, Y),
        r"^batch: ResNetCIFAR is cut into slices and takes one tensor, got 2 inputs.*batch=lambda b",
    ),
}


@pytest.mark.parametrize("later", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("name", [*BAD_BATCHES, *ONLY_AT_B])
def test_bad_batches_at_level_b(name: str, later: bool) -> None:
    batch, message = {**BAD_BATCHES, **ONLY_AT_B}[name]
    model = localized()
    engine = fl.Engine(model, momentum)
    if later:
        engine.step(X, Y)
    with refused(message, model, optimizer=engine.optimizer):
        engine.step(*batch)
    assert engine.steps == int(later)
    assert engine.step(X, Y).losses.shape == (4,) and engine.steps == int(later) + 1  # and the next one works


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_at_level_a(name: str) -> None:
    batch, message = BAD_BATCHES[name]
    model = localized()
    with refused(message, model):
        model(*batch)
    with refused(message, model):
        model(batch[0], labels=batch[1])
    model(X, Y).loss.backward()


def test_keywords_beside_positional_inputs() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    assert engine.step(X, labels=Y).losses.shape == (4,)
    with refused(r"^batch: the mapping has keys \['mask'\] but none of labels", model, optimizer=engine.optimizer):
        engine.step(X, mask=X)


def test_one_row_is_fine_where_no_norm_needs_more() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert torch.isfinite(engine.step(X[:1], Y[:1]).losses).all()


def test_a_step_in_eval_mode() -> None:
    model = localized()
    engine = fl.Engine(model, momentum)
    model.eval()
    with refused(
        r"^model: is in eval mode; call model.train\(\) before engine.step", model, optimizer=engine.optimizer
    ):
        engine.step(X, Y)


def test_sharded_parameters_by_the_name_of_their_type() -> None:
    class DTensor(nn.Parameter):  # what torch.distributed.tensor's is called
        pass

    model = localized()
    engine = fl.Engine(model, momentum)
    conv = model.backbone.conv1
    conv.weight = DTensor(conv.weight.detach())  # type: ignore[union-attr]
    message = r"^model: its parameters are sharded \(FSDP2 or DTensor\).*use DistributedDataParallel, or leave the model unsharded"
    with refused(message, model, optimizer=engine.optimizer):
        engine.step(X, Y)
    with refused(message, model):
        model(X, Y)


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    distributed.destroy_process_group()


def test_fsdp2_at_level_a(one_rank: None) -> None:
    """`fully_shard` swaps parameters and class of a module, and gathers only around that module's own forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    message = r"^model: its parameters are sharded \(FSDP2 or DTensor\)"
    whole, inner, layer = localized(), localized(), localized()
    fully_shard(whole, mesh=mesh)
    fully_shard(inner.backbone, mesh=mesh)
    fully_shard(layer.backbone.layer2[0], mesh=mesh)  # type: ignore[union-attr, index, arg-type]
    for model in (whole, inner, layer):
        with pytest.raises(ArgumentError, match=message):
            model(X, Y)
        assert all(p.grad is None for p in model.parameters())


# -------------------------------------------------------------------------------------------------------- engine states


def test_engine_states_that_do_not_fit() -> None:
    model = localized()
    engine = fl.Engine(model, momentum, precision="16-mixed")
    engine.step(X, Y)
    good = copy.deepcopy(engine.state_dict())
    other_k = fl.Engine(localized(3), momentum, precision="16-mixed")
    bf16 = fl.Engine(localized(), momentum, precision="bf16-mixed")
    plain = fl.Engine(localized(), momentum)
    adam = fl.Engine(localized(), lambda named: torch.optim.AdamW(named, lr=1e-3), precision="16-mixed")
    dropped = {key: value for key, value in good.items() if key != "streams"}
    cases = [
        (other_k.state_dict(), r"^state_dict: comes from 3 blocks, this engine has 4; localize with that many"),
        (bf16.state_dict(), r"^state_dict: comes from precision 'bf16-mixed', this engine has '16-mixed'; make it with the one"),
        (plain.state_dict(), r"^state_dict: comes from precision '32-true', this engine has '16-mixed'"),
        (adam.state_dict(), r"^state_dict: its groups have no 'momentum', which SGD needs; it comes from another optimizer"),
        (dropped, r"^state_dict: lacks streams; pass what Engine.state_dict\(\) returned"),
        ({}, r"^state_dict: lacks steps, precision, optimizer"),
        ({**good, "optimizer": {"state": {}, "param_groups": []}}, r"^state_dict: has 0 parameter groups, this optimizer 4"),
    ]  # fmt: skip
    for state, message in cases:
        with refused(message, model, optimizer=engine.optimizer):
            engine.load_state_dict(copy.deepcopy(state))
        assert_same(good, copy.deepcopy(engine.state_dict()))
    engine.load_state_dict(good)
    engine.step(X, Y)


def test_an_alias_of_a_precision_is_the_same_precision() -> None:
    state = fl.Engine(localized(), momentum, precision="bf16").state_dict()
    fl.Engine(localized(), momentum, precision="bf16-mixed").load_state_dict(state)


# ----------------------------------------------------------------------------------------------- values, not arguments


class Planted(nn.Module):
    """The head of a block, whose loss is spoilt when ``bad`` says so."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.bad = head, ""

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        if self.bad == "error":
            raise ZeroDivisionError("planted")
        local = self.head(h, ctx)
        if self.bad == "gradient":
            h.register_hook(lambda g: g * float("nan"))
        spoil = {"nan": float("nan"), "inf": float("inf")}.get(self.bad)
        # a constant: the loss is not finite, its gradient is
        return local if spoil is None else local._replace(loss=local.loss + spoil)


def planted(block: int = 3, **options: Any) -> tuple[fl.LocalModel, Planted]:
    torch.manual_seed(0)
    net = models.ResNetCIFAR(2, width=4, dropout=0.2)
    model = fl.localize(net, "dgl", blocks=5, sample=X[:2], **options)
    head = Planted(model.heads[block])
    model.heads[block] = head
    model.blocks[block].head = head
    return model, head


def owned(model: fl.LocalModel, engine: fl.Engine) -> list[dict[str, Any]]:
    """Per block: parameters, buffers and optimizer state."""
    result = []
    for block, inner in zip(model.blocks, engine.optimizer.blocks, strict=True):
        assert inner is not None
        state = {"parameters": [p.detach().clone() for p in block.parameters()]}
        state["buffers"] = [b.clone() for b in block.all_buffers()]
        state["optimizer"] = copy.deepcopy(list(inner.state.values()))
        result.append(state)
    return result


def changed(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[int]:
    """Blocks that were updated; every block must be whole or untouched."""
    result = []
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        try:
            assert_same(old, new)
        except AssertionError:
            result.append(k)
            for part in ("parameters", "buffers"):
                same = [torch.equal(a, b) for a, b in zip(old[part], new[part], strict=True)]
                assert not same or not all(same), f"block {k} is updated in part, not its {part}"
    return result


@pytest.mark.parametrize("bad", ["gradient", "nan", "inf"])
@pytest.mark.parametrize("update", ["immediate", "end"])
def test_a_non_finite_block_at_step_seven(bad: str, update: Any) -> None:
    model, head = planted()
    engine = fl.Engine(model, momentum, update=update)
    for _ in range(7):
        engine.step(X, Y)
    before = owned(model, engine)
    head.bad = bad
    with pytest.raises(NonFiniteError) as error:
        engine.step(X, Y)
    head.bad = ""
    after = owned(model, engine)
    assert all(p.grad is None for p in model.parameters())
    name = model.blocks[3].name
    assert (error.value.block, error.value.step, error.value.name) == (3, 7, name)
    assert f"block 3 ('{name}') was not finite at step 7" in str(error.value)
    assert "Lower the learning rate, look at the batch, or use nonfinite='skip'" in str(error.value)
    if update == "immediate":
        assert changed(before, after) == [0, 1, 2, 4] and error.value.updated == (0, 1, 2, 4)
        assert "block 3 was not updated at that step, the others were" in str(error.value)
    else:
        assert changed(before, after) == [] and error.value.updated == ()
        assert "no block was updated" in str(error.value)
    out = engine.step(X, Y)
    assert out.step == 8 and torch.isfinite(out.losses).all()
    assert changed(after, owned(model, engine)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_policies_for_a_non_finite_block(policy: Any, update: Any) -> None:
    model, head = planted()
    engine = fl.Engine(model, momentum, update=update, nonfinite=policy)
    engine.step(X, Y)
    before = owned(model, engine)
    head.bad = "gradient"
    out = engine.step(X, Y)
    head.bad = ""
    assert out.step == 1 and out.losses.shape == (5,)
    assert changed(before, owned(model, engine)) == ([0, 1, 2, 4] if update == "immediate" else [])
    assert engine.should_stop == (policy == "stop")
    assert engine.flush() == []


def test_a_poisoned_boundary_stops_every_block_behind_it() -> None:
    model, _ = planted()
    engine = fl.Engine(model, momentum, nonfinite="stop")
    engine.step(X, Y)
    before = owned(model, engine)
    weight = model.blocks[2].parameters()[0]
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("inf"))
    engine.step(X, Y)
    with torch.no_grad():
        weight.copy_(kept)
    assert changed(before, owned(model, engine)) == [0, 1] and engine.should_stop


def test_a_non_finite_last_block() -> None:
    model, _ = planted()
    engine = fl.Engine(model, momentum)
    engine.step(X, Y)
    before = owned(model, engine)
    criterion = model.criterion

    def spoilt(logits: Tensor, target: Tensor) -> Tensor:
        loss = criterion(logits, target)
        return loss * float("nan") if logits is not None and logits.requires_grad and _is_last(logits, model) else loss

    model.criterion = spoilt
    with pytest.raises(NonFiniteError, match=r"block 4 .* at step 1"):
        engine.step(X, Y)
    assert changed(before, owned(model, engine)) == [0, 1, 2, 3]


def _is_last(logits: Tensor, model: fl.LocalModel) -> bool:
    """Whether these are the backbone's own scores: their node saved the readout's weight."""
    return any(id(getattr(fn, "variable", None)) == id(model.backbone.fc.weight) for fn in _leaves(logits.grad_fn))  # type: ignore[union-attr]


def _leaves(node: Any) -> Iterator[Any]:
    for parent, _ in node.next_functions if node is not None else ():
        yield parent
        yield from _leaves(parent)


# ------------------------------------------------------------------------------------------- an exception inside a step


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("update", ["immediate", "end"])
@pytest.mark.parametrize("block", [0, 3])
def test_a_head_that_raises(block: int, update: Any, deterministic: bool) -> None:
    model, head = planted(block)
    engine = fl.Engine(model, momentum, update=update, deterministic=deterministic)
    engine.step(X, Y)
    before, whole = owned(model, engine), state_of(model, random=False)
    streams = copy.deepcopy(engine.state_dict()["streams"])
    random = torch.get_rng_state()
    head.bad = "error"
    with pytest.raises(ZeroDivisionError, match="planted"):
        engine.step(X, Y)
    head.bad = ""
    assert all(p.grad is None for p in model.parameters()) and engine.steps == 1
    done = list(range(block)) if update == "immediate" else []
    assert changed(before, owned(model, engine)) == done
    if not done:
        assert_same(whole, state_of(model, random=False))
    else:  # hooks, modes and flags at least
        after = state_of(model, random=False)
        assert {k: v for k, v in whole.items() if "mode" in k or "hooks" in k or "attributes" in k} == {
            k: v for k, v in after.items() if "mode" in k or "hooks" in k or "attributes" in k
        }
    if deterministic:
        assert torch.equal(random, torch.get_rng_state())  # the caller's stream is not the blocks'
        moved = [
            k
            for k, (a, b) in enumerate(zip(streams, engine.state_dict()["streams"], strict=True))
            if not torch.equal(a[0], b[0])
        ]
        assert moved == [k for k in done if model.blocks[k].random]  # a stream moves with its block, or not at all
    out = engine.step(X, Y)
    assert out.step == 1 and torch.isfinite(out.losses).all()
    assert changed(before, owned(model, engine)) == [0, 1, 2, 3, 4]


def test_a_failed_step_under_end_repeats_as_if_it_had_not_been() -> None:
    runs = []
    for fail in (False, True):
        model, head = planted(3)
        engine = fl.Engine(model, momentum, update="end", deterministic=True, seed=3)
        engine.step(X, Y)
        if fail:
            head.bad = "error"
            with pytest.raises(ZeroDivisionError):
                engine.step(X, Y)
            head.bad = ""
        engine.step(X, Y)
        runs.append(owned(model, engine))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_an_error_in_the_backward_of_a_block(update: Any) -> None:
    """The block's loss is there already, its update is not."""
    model, _ = planted()
    engine = fl.Engine(model, momentum, update=update)
    engine.step(X, Y)

    def fail(grad: Tensor) -> None:
        raise ZeroDivisionError("in backward")

    for k in (2, 4):  # the last block too
        before = owned(model, engine)
        handle = model.blocks[k].parameters()[0].register_hook(fail)
        with pytest.raises(ZeroDivisionError, match="in backward"):
            engine.step(X, Y)
        handle.remove()
        assert all(p.grad is None for p in model.parameters())
        assert changed(before, owned(model, engine)) == (list(range(k)) if update == "immediate" else [])
    engine.step(X, Y)


def test_an_error_in_the_task_loss() -> None:
    model, _ = planted()
    engine = fl.Engine(model, momentum, update="end")
    engine.step(X, Y)
    before, criterion = owned(model, engine), model.criterion

    def fail(logits: Tensor, target: Tensor) -> Tensor:
        if _is_last(logits, model):
            raise ZeroDivisionError
        return criterion(logits, target)

    model.criterion = fail
    with pytest.raises(ZeroDivisionError):
        engine.step(X, Y)
    assert changed(before, owned(model, engine)) == []


def test_a_boundary_that_does_not_run_in_a_later_forward() -> None:
    """Only a forward can show it, so blocks before it are done under update='immediate', and none under 'end'."""

    class Moody(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(x) if self.order == "a" else self.b(self.a(x)))

    for update in ("immediate", "end"):
        net = Moody()
        model = fl.localize(net, "dgl", blocks=["a", "b"], sample=ROWS)
        engine = fl.Engine(model, momentum, update=update)  # type: ignore[arg-type]
        target = torch.tensor([0, 1, 2, 0, 1, 2])
        engine.step(ROWS, target)
        before = owned(model, engine)
        net.order = "a"
        with pytest.raises(
            PartitionError, match=r"^blocks: b did not run in this forward; cut after modules that always run"
        ):
            engine.step(ROWS, target)
        net.order = "ab"
        assert changed(before, owned(model, engine)) == ([0] if update == "immediate" else [])
        assert not any(m._forward_hooks for m in net.modules()) and all(p.grad is None for p in model.parameters())
        engine.step(ROWS, target)


def test_an_error_at_level_a_leaves_no_gradient_and_no_hook() -> None:
    net = Chain()
    model = fl.localize(net, "dgl", blocks=["a", "b"], sample=ROWS)

    def fail(logits: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    model.criterion = fail
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        model(ROWS, torch.zeros(6, dtype=torch.int64))
    assert_same(before, [p.detach().clone() for p in model.parameters()])
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in net.modules())
