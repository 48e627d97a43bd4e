import copy
import functools

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.engine.optimizer import LocalOptimizer
from fastlocal.errors import ArgumentError
from fastlocal.trainer import CheckpointStore
from fastlocal.trainer.optimizers import Factory, adamw, factory, sgd, unit_depths


def resnet(blocks=4, method="dgl"):
    torch.manual_seed(0)
    net = models.create("resnet20", width=4, num_classes=5)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 16, 16))


def vit(blocks=3, method="dgl", **options):
    torch.manual_seed(0)
    net = models.create("vit_t", img_size=8, patch_size=4, dim=8, depth=4, heads=2, num_classes=5, **options)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8))


def settings(model, optimizer):
    """Name -> (lr, weight decay), over all blocks; every parameter exactly once."""
    names = {id(p): n for n, p in model.named_parameters()}
    local = optimizer if isinstance(optimizer, LocalOptimizer) else LocalOptimizer(model, optimizer)
    pairs = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in local.param_groups for p in g["params"]]
    assert len(pairs) == len(dict(pairs)) == sum(p.requires_grad for p in model.parameters())
    assert all(g["params"] for g in local.param_groups)
    return dict(pairs)


def test_weight_decay_of_resnet20():
    model = resnet()
    found = settings(model, sgd(0.1, weight_decay=0.01))
    for name, p in model.named_parameters():
        assert found[name] == (0.1, 0.01 if p.dim() > 1 else 0.0), name
    assert found["backbone.layer1.0.bn1.weight"][1] == found["backbone.fc.bias"][1] == 0.0
    assert found["backbone.conv1.weight"][1] == found["backbone.fc.weight"][1] == 0.01


def test_weight_decay_of_vit():
    model = vit()
    found = settings(model, adamw(0.1))
    plain = {"backbone.cls_token", "backbone.pos_embed"}
    for name, p in model.named_parameters():
        assert found[name][1] == (0.0 if p.dim() <= 1 or name in plain else 0.05), name
    assert plain < found.keys()


def test_position_embeddings_of_gpt():
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8, tie=False)
    model = fl.localize(net, "dgl", blocks=2, sample=torch.zeros(2, 6, dtype=torch.int64))
    found = settings(model, adamw(0.1))
    assert found["backbone.wpe.weight"][1] == 0.0 and found["backbone.wte.weight"][1] == 0.05


class Named(nn.Module):
    """A backbone with timm's ``no_weight_decay``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.special = nn.Linear(4, 4)
        self.bias_table = nn.Parameter(torch.zeros(1, 4))
        self.last = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"bias_table", "special.*"}

    def forward(self, x):
        return self.last(torch.relu(self.special(self.first(x))) + self.bias_table)


def test_what_the_backbone_names_has_no_decay():
    model = fl.localize(Named(), "dgl", blocks=["first"], sample=torch.zeros(2, 4))
    found = settings(model, sgd(0.1).bind(model))
    assert {n for n, p in model.backbone.named_parameters() if p.dim() > 1 and not found[f"backbone.{n}"][1]} == {
        "special.weight",
        "bias_table",
    }
    assert settings(model, sgd(0.1))["backbone.special.weight"][1] == 1e-4  # only a bound one can ask the backbone


def test_decay_for_everything():
    model = resnet()
    local = LocalOptimizer(model, sgd(0.1, no_decay=False))
    assert {g["weight_decay"] for g in local.param_groups} == {1e-4} and len(local.param_groups) == 4
    # without any decay there is nothing to tell apart
    assert len(LocalOptimizer(model, sgd(0.1, weight_decay=0.0)).param_groups) == 4
    assert len(LocalOptimizer(model, sgd(0.1)).param_groups) == 8


@pytest.mark.parametrize("blocks", [3, 1])
def test_layer_decay_of_vit_is_beits(blocks):
    """Embedding 0, transformer block i as i + 1, what follows as depth + 1; the rate is decay ** (depth + 1 - number)."""
    model = vit(blocks, "dgl" if blocks > 1 else "bp")
    found = settings(model, adamw(0.1, layer_decay=0.5).bind(model))

    def number(name):
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 5

    for name, (lr, _) in found.items():
        part, rest = name.split(".", 1)
        if part == "backbone":
            assert lr == pytest.approx(0.1 * 0.5 ** (5 - number(rest)), rel=1e-12), name
        else:
            last = model.blocks[int(rest.split(".")[0])].name  # "blocks.i"
            assert lr == pytest.approx(0.1 * 0.5 ** (5 - number(f"{last}.")), rel=1e-12), name
    assert found["backbone.head.weight"][0] == 0.1


@pytest.mark.parametrize(("blocks", "method"), [(4, "dgl"), (1, "bp"), (10, "predsim")])
def test_layer_decay_of_resnet20(blocks, method):
    model = resnet(blocks, method)
    found = settings(model, sgd(0.1, layer_decay=0.8).bind(model))
    units = ["stem", *(f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3))]
    for name, (lr, _) in found.items():
        if name.startswith("heads."):
            depth = units.index(model.blocks[int(name.split(".")[1])].name)
        elif name.startswith("backbone.layer"):
            depth = units.index(".".join(name.split(".")[1:3]))
        else:
            depth = 10 if name.startswith("backbone.fc") else 0  # conv1 and bn1 of the stem
        assert lr == pytest.approx(0.1 * 0.8 ** (10 - depth), rel=1e-12), name
    assert {"backbone.conv1.weight", "backbone.fc.bias"} < found.keys()


def test_layer_decay_of_a_sequential_and_of_hooks():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model = fl.localize(net, "dgl", blocks=2, sample=torch.zeros(2, 4))
    depths, top = unit_depths(model)
    assert depths["backbone.3.weight"] == top > depths["backbone.2.weight"] > depths["backbone.0.weight"] == 0
    assert settings(model, sgd(0.1, layer_decay=0.5).bind(model))["backbone.3.weight"][0] == 0.1
    hooked = fl.localize(Named(), "dgl", blocks=["first"], sample=torch.zeros(2, 4))
    depths, _ = unit_depths(hooked)
    assert depths["backbone.first.weight"] == 0 < depths["backbone.last.weight"]
    with pytest.raises(ArgumentError, match="units of Named are not known"):
        whole = fl.localize(Named(), "bp", sample=torch.zeros(2, 4))
        sgd(0.1, layer_decay=0.5).bind(whole)


@pytest.mark.parametrize("rates", [[1.0, 0.5, 0.0, 2.0], lambda k: (1.0, 0.5, 0.0, 2.0)[k]])
def test_block_rates(rates):
    model = resnet()
    found = settings(model, sgd(0.1, block_lr=rates, head_lr=0.5).bind(model))
    for block, rate in zip(model.blocks, (1.0, 0.5, 0.0, 2.0), strict=True):
        for name, _ in block.named_parameters():
            assert found[name][0] == pytest.approx(0.1 * rate * (0.5 if name.startswith("heads.") else 1.0)), name


def test_rates_of_backbone_and_heads_need_no_model():
    model = resnet()
    for make in (sgd(0.1, backbone_lr=0.1, head_lr=2.0), sgd(0.1, backbone_lr=0.1, head_lr=2.0).bind(model)):
        for name, (lr, _) in settings(model, make).items():
            assert lr == pytest.approx(0.2 if name.startswith("heads.") else 0.01)


def batch(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 16, 16, generator=gen), torch.randint(5, (6,), generator=gen)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "rmsprop"])
def test_a_step_is_that_of_a_hand_made_optimizer(kind):
    classes = {
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.05),
        "rmsprop": functools.partial(torch.optim.RMSprop, weight_decay=0.02, alpha=0.9),
    }
    ready = {
        "sgd": sgd(0.02, weight_decay=0.01, layer_decay=0.9),
        "adamw": adamw(0.02, layer_decay=0.9),
        "rmsprop": factory(torch.optim.RMSprop, lr=0.02, weight_decay=0.02, alpha=0.9, layer_decay=0.9),
    }
    model = resnet()
    twin = copy.deepcopy(model)
    local = LocalOptimizer(model, ready[kind].bind(model))
    depths, top = unit_depths(twin)
    groups = [
        {"params": [p], "lr": 0.02 * 0.9 ** (top - depths[n]), **({"weight_decay": 0.0} if p.dim() < 2 else {})}
        for n, p in twin.named_parameters()
    ]
    by_hand = classes[kind](groups, lr=0.02)
    for step in range(2):
        for m, opt in ((model, local), (twin, by_hand)):
            opt.zero_grad()
            m(*batch(step)).loss.backward()
            opt.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("make", [sgd(0.05, layer_decay=0.9), adamw(0.01, head_lr=2.0)])
def test_trains_in_the_engine_with_the_fused_step(make, tmp_path):
    model = resnet()
    engine = fl.Engine(model, make.bind(model))
    assert all(g["fused"] for g in engine.optimizer.param_groups)
    first = engine.step(*batch()).loss
    for _ in range(4):
        last = engine.step(*batch()).loss
    assert last < first
    store = CheckpointStore(tmp_path)
    store.save(5, model, engine)
    other = resnet()
    resumed = fl.Engine(other, make.bind(other))
    store.load(other, resumed)
    assert torch.equal(engine.step(*batch(1)).losses, resumed.step(*batch(1)).losses)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_frozen_parameters_make_no_groups():
    model = resnet()
    for _, p in model.blocks[1].named_parameters():
        p.requires_grad_(p.dim() > 1)
    for p in model.blocks[2].parameters():
        p.requires_grad_(False)
    local = LocalOptimizer(model, sgd(0.1).bind(model))
    assert [None if b is None else len(b.param_groups) for b in local.blocks] == [2, 1, None, 2]


def test_classes_without_weight_decay_or_rate():
    class Plain(torch.optim.SGD):
        def __init__(self, params, lr=None):
            super().__init__(params, lr=0.5 if lr is None else lr)

    model = resnet()
    assert {g["lr"] for g in LocalOptimizer(model, factory(Plain)).param_groups} == {0.5}
    with pytest.raises(ArgumentError, match=r"^lr: multiples of it"):
        LocalOptimizer(model, factory(Plain, head_lr=0.5))
    assert LocalOptimizer(model, factory(Plain, lr=0.2, head_lr=0.5)).param_groups[1]["lr"] == pytest.approx(0.1)


def test_plain_sgd_and_repr():
    assert sgd(0.1, momentum=0).options["nesterov"] is False
    text = repr(adamw(0.1, layer_decay=0.75))
    assert text.startswith("AdamW(lr=0.1") and "layer_decay=0.75" in text
    assert isinstance(sgd(0.1), Factory)


def test_bound_to_another_model():
    bound = sgd(0.1, layer_decay=0.5).bind(vit())
    with pytest.raises(ArgumentError, match=r"^optimizer: is bound to a model without backbone\."):
        LocalOptimizer(resnet(), bound)
    model = resnet()
    assert settings(model, bound.bind(model))["backbone.fc.weight"][0] == 0.1


@pytest.mark.parametrize("option", [{"layer_decay": 0.5}, {"block_lr": [1.0, 1.0, 1.0, 1.0]}])
def test_unbound_with_options_that_need_the_model(option):
    with pytest.raises(ArgumentError, match=f"^{next(iter(option))}: needs to know the model"):
        LocalOptimizer(resnet(), sgd(0.1, **option))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lr", {"lr": -0.1}),
        ("lr", {"lr": "0.1"}),
        ("no_decay", {"no_decay": 1}),
        ("layer_decay", {"layer_decay": 0.0}),
        ("layer_decay", {"layer_decay": 1.5}),
        ("head_lr", {"head_lr": -1.0}),
        ("backbone_lr", {"backbone_lr": None}),
        ("block_lr", {"block_lr": 0.5}),
        ("momentun", {"momentun": 0.5}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(ArgumentError, match=f"^{name}: "):
        sgd(**{"lr": 0.1, **options})


@pytest.mark.parametrize("rates", [[1.0], [1.0, 1.0, -1.0, 1.0], lambda k: None])
def test_bad_block_rates(rates):
    with pytest.raises(ArgumentError, match=r"^block_lr: "):
        sgd(0.1, block_lr=rates).bind(resnet())


def test_no_optimizer_class():
    with pytest.raises(ArgumentError, match=r"^optimizer: expected a class"):
        factory(torch.optim.lr_scheduler.StepLR)
