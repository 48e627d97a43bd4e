import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.engine.optimizer import LocalOptimizer
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import CheckpointStore, save
from fastlocal.trainer.finetune import freeze, load_pretrained, unfreeze


def net(seed=0, num_classes=4):
    torch.manual_seed(seed)
    made = models.create("resnet20", width=4, num_classes=num_classes)
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):
            t.add_(torch.rand(t.shape)) if t.is_floating_point() else t.fill_(seed)
    return made


def local(backbone=None, method="dgl", blocks=4):
    torch.manual_seed(7)
    return fl.localize(backbone or net(), method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8))


def gpt(seed):
    torch.manual_seed(seed)
    return models.create("gpt", vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)


def batch(seed, rows=6):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 8, 8, generator=gen), torch.randint(4, (rows,), generator=gen)


def sgd(named):
    return torch.optim.SGD(named, lr=0.1, momentum=0.9, weight_decay=0.01)


def everything(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def changed(before, model):
    return {n for n, t in everything(model).items() if not torch.equal(t, before[n])}


def names_of(block):
    return {s.name for s in (*block.parameter_slots(), *block.buffer_slots())}


def level_a(model):
    optimizer = LocalOptimizer(model, sgd)

    def step(x, y):
        optimizer.zero_grad()
        out = model(x, y)
        out.loss.backward()
        optimizer.step()
        return out.losses

    return step


def level_b(model):
    engine = fl.Engine(model, sgd)
    return lambda x, y: engine.step(x, y).losses


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [level_a, level_b])
@pytest.mark.parametrize("blocks", [(0,), (0, 1), (1,), (-1,), (0, 1, 2)])
def test_frozen_blocks_stay_bitwise_and_the_others_train(blocks, make):
    model = local()
    frozen = set().union(*(names_of(model.blocks[k]) for k in blocks))
    freeze(model, *blocks)
    before = everything(model)
    step = make(model)
    for n in range(5):
        model.train()
        losses = step(*batch(n))
        assert losses.shape == (4,) and losses.isfinite().all()
    assert changed(before, model) == before.keys() - frozen
    assert not any(p.grad is not None for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("method", ["auglocal", "predsim", "bp"])
def test_frozen_stem_of_other_methods(method):
    model = local(method=method, blocks=1 if method == "bp" else 6)
    frozen = freeze(model, "conv1", "bn1", "layer1")
    assert "backbone.conv1.weight" in frozen and "backbone.layer1.2.bn2.bias" in frozen
    assert not any(n.startswith(("heads", "backbone.layer2", "backbone.fc")) for n in frozen)
    before = everything(model)
    step = level_b(model)
    for n in range(5):
        model.eval()
        model.train()
        step(*batch(n))
    stay = {n for n in before if n.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert changed(before, model) == before.keys() - stay


def test_frozen_before_localize_is_frozen_after():
    backbone = net()
    names = freeze(backbone, "conv1", "bn1", "layer1.*")
    assert "layer1.0.conv1.weight" in names and "conv1.weight" in names
    model = local(backbone)
    before = everything(model)
    step = level_b(model)
    for n in range(3):
        step(*batch(n))
    stay = {n for n in before if n.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert changed(before, model) == before.keys() - stay
    unfreeze(model)
    level_b(model)(*batch(3))
    assert changed(before, model) == before.keys()


def training_norms(model):
    return {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}


def test_norms_stay_in_eval_through_everything():
    model = local()
    every = training_norms(model)
    freeze(model, "layer1", "heads.0")
    some = training_norms(model)
    left = {n for n in every if n.startswith(("backbone.layer1.", "heads.0."))}
    assert left and some == every - left
    for again in (
        model.train(),
        model.eval().train(),
        copy.deepcopy(model).train(),
        pickle.loads(pickle.dumps(model)).train(),
    ):
        assert training_norms(again) == some
        assert again.state_dict().keys() == model.state_dict().keys()
    twin = copy.deepcopy(model)
    unfreeze(twin)
    assert training_norms(twin) == every and training_norms(model.train()) == some  # the copies are apart
    model.eval()
    assert not training_norms(model)
    unfreeze(model, "layer1")
    assert not training_norms(model) and training_norms(model.train()) == every - {n for n in left if "heads" in n}


def test_norms_may_go_on():
    model = local()
    every = training_norms(model)
    freeze(model, 0, norm="train")
    assert training_norms(model.train()) == every
    before = everything(model)
    level_b(model)(*batch(0))
    block = model.blocks[0]
    assert changed(before, model) >= {s.name for s in block.buffer_slots()}
    assert not changed(before, model) & {s.name for s in block.parameter_slots()}


def test_norms_without_parameters_follow_their_module():
    backbone = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)), nn.Linear(4, 2))
    freeze(backbone, "0")
    assert not backbone.train()[0][1].training
    unfreeze(backbone, "0")
    assert backbone[0][1].training


def test_patterns_and_single_parameters():
    model = local()
    names = freeze(model, "*.bias", "layer2.0.conv1.weight")
    assert set(names) == {
        n for n, p in model.named_parameters() if n.endswith(".bias") or n == "backbone.layer2.0.conv1.weight"
    }
    assert training_norms(model) == training_norms(copy.deepcopy(model).train())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(names)
    assert len(training_norms(model)) == len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])


def test_a_prefix_ends_at_a_dot():
    torch.manual_seed(0)
    vit = models.create("vit_t", img_size=8, patch_size=4, dim=8, depth=12, heads=2, num_classes=4)
    model = fl.localize(vit, "dgl", blocks=3, sample=torch.zeros(2, 3, 8, 8))
    assert freeze(model, "head") == ["backbone.head.weight", "backbone.head.bias"]
    assert {n.split(".")[2] for n in freeze(model, "blocks.1")} == {"1"}


def test_unfreeze_trains_again():
    model = local()
    before = everything(model)
    assert unfreeze(model) == []
    assert unfreeze(model, 0) == []
    frozen = freeze(model, 0, 2)
    assert unfreeze(model, 0) == [n for n in frozen if n in names_of(model.blocks[0])]
    step = level_b(model)
    step(*batch(0))
    assert changed(before, model) == before.keys() - names_of(model.blocks[2])


def test_unfreeze_leaves_linked_copies_alone():
    model = fl.localize(gpt(0), "dgl", blocks=2, sample=torch.zeros(2, 6, dtype=torch.int64), tied="link")
    copies = [link.copy.value for link in model.links]
    freeze(model, 0)
    unfreeze(model)
    assert copies and not any(p.requires_grad for p in copies)
    assert all(p.requires_grad for block in model.blocks for p in block.parameters())


def test_one_row_is_enough_where_no_norm_trains():
    model = local()
    freeze(model, *range(3))
    freeze(model, "layer3", "fc.weight")
    assert level_b(model)(*batch(0, rows=1)).isfinite().all()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "none given"),
        (("layer9",), "nothing in the model is called 'layer9'. Did you mean"),
        (("layer*x",), "nothing in the model"),
        ((4,), "there is no block 4; the model has 4"),
        ((-5,), "there is no block -5"),
        ((1.5,), "got 1.5; give names of modules or parameters, or indices"),
        ((True,), "got True"),
    ],
)
def test_names_that_are_not_there(names, message):
    model = local()
    with pytest.raises(ArgumentError, match=f"^names: {message}"):
        freeze(model, *names)
    assert all(p.requires_grad for p in model.parameters())


def test_blocks_of_a_plain_network_and_a_bad_norm():
    with pytest.raises(ArgumentError, match=r"^names: got 0; give names of modules or parameters$"):
        freeze(net(), 0)
    with pytest.raises(ArgumentError, match=r"^norm: got 'off'"):
        freeze(net(), "fc", norm="off")


# --- pretrained weights ----------------------------------------------------------------------------------------------


def files(tmp_path, trained):
    """A pretrained network in every form in which one is found."""
    state = trained.state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "weights.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    wrapped = {f"module._orig_mod.{n}": t for n, t in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "lr": 0.1}, tmp_path / "whole.pth.tar")
    model = local(trained)
    save(tmp_path / "own.safetensors", model)
    folder = CheckpointStore(tmp_path / "store").save(1, model)
    return {
        "dict": state,
        "wrapped": wrapped,
        "local": model.state_dict(),
        **{p.name: p for p in tmp_path.iterdir() if p.is_file()},
        "folder": folder,
        "text": str(tmp_path / "weights.pt"),
    }


FORMS = ["dict", "wrapped", "local", "weights.safetensors", "weights.pt", "old.pth", "whole.pth.tar",
         "own.safetensors", "folder", "text"]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_before_and_after_localize(form, tmp_path):
    trained = net(3)
    expected = {n: t.clone() for n, t in trained.state_dict().items()}
    source = files(tmp_path, trained)[form]
    strict = form != "local" or "shapes"  # a local model's own state_dict has heads besides

    first = net(1)
    report = load_pretrained(first, source, strict=strict)
    assert report.loaded == list(expected) and not report.missing
    assert all(n.startswith("heads.") for n in report.left_out) and bool(report.left_out) == (form == "local")
    before = local(first)

    after = local(net(1))
    heads = {n: p.clone() for n, p in after.heads.named_parameters()}
    assert load_pretrained(after, source, strict=strict) == report
    assert all(torch.equal(p, heads[n]) for n, p in after.heads.named_parameters())

    for model in (before, after):
        assert all(torch.equal(t, expected[n]) for n, t in model.backbone.state_dict().items())
    assert all(torch.equal(t, after.state_dict()[n]) for n, t in before.state_dict().items())
    assert torch.equal(level_b(before)(*batch(0)), level_b(after)(*batch(0)))


def test_another_number_of_classes():
    trained, other = net(3, 10), local(net(1))
    before = everything(other)
    report = load_pretrained(other, trained.state_dict())
    assert report.left_out == {
        "fc.weight": "is [10, 16], the network's [4, 16]",
        "fc.bias": "is [10], the network's [4]",
    }
    assert report.missing == ["fc.weight", "fc.bias"]
    assert changed(before, other) == {f"backbone.{n}" for n in report.loaded}
    again = everything(other)
    with pytest.raises(CheckpointError, match=r"it lacks fc\.weight, fc\.bias; fc\.weight is \[10, 16\]"):
        load_pretrained(other, net(4, 10).state_dict(), strict=True)
    assert not changed(again, other)


def test_what_is_missing_and_too_much():
    state = net(3).state_dict()
    removed = state.pop("layer1.0.conv1.weight")
    state["extra"], state["bn1.weight"] = removed, "text"
    report = load_pretrained(net(1), state)
    assert report.missing == ["bn1.weight", "layer1.0.conv1.weight"]
    assert report.left_out == {"extra": "the network has no such name", "bn1.weight": "is str, not a tensor"}
    with pytest.raises(CheckpointError, match="extra the network has no such name"):
        load_pretrained(net(1), state, strict=True)


def test_a_name_of_the_network_itself_is_no_prefix():
    inner = nn.Module()
    inner.model, inner.head = nn.Linear(2, 2), nn.Linear(2, 2)
    state = {n: torch.full_like(t, 5) for n, t in inner.state_dict().items()}
    assert load_pretrained(inner, {f"module.{n}": t for n, t in state.items()}, strict=True).loaded == list(state)
    assert bool((inner.model.weight == 5).all())


@pytest.mark.parametrize("given", ["both", "embedding", "output"])
@pytest.mark.parametrize("tied", ["error", "link"])
def test_tied_weights(given, tied):
    """A source may hold a tied weight under one of its names; a model that reads it from a copy gets both."""
    trained, sample = gpt(3), torch.zeros(2, 6, dtype=torch.int64)
    state = {n: t.clone() for n, t in trained.state_dict().items()}
    if given != "both":
        del state["lm_head.weight" if given == "embedding" else "wte.weight"]
    if tied == "error":
        model = gpt(1)
        assert load_pretrained(model, state, strict=True).missing == []
    else:
        model = fl.localize(gpt(1), "dgl", blocks=2, sample=sample, tied="link")
        assert load_pretrained(model, state, strict=True).missing == [] and model.links
        model = model.export()
    for n, t in trained.state_dict().items():
        assert torch.equal(model.state_dict()[n], t), n


def test_frozen_stay_frozen_and_dtype_is_the_networks():
    model = local()
    freeze(model, 0)
    flags = [p.requires_grad for p in model.parameters()]
    load_pretrained(model, {n: t.double() for n, t in net(3).state_dict().items()})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Evil:
    def __reduce__(self):
        return (print, ("loaded code",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_cannot_be_used(tmp_path, capsys):
    other = net(1)
    before = everything(other)
    whole = io.BytesIO()
    torch.save(net(3).state_dict(), whole)
    contents = {
        "code.pt": pickle.dumps({"a": Evil()}),
        "text.safetensors": b"no weights at all, but long enough to be read",
        "cut.pt": whole.getvalue()[:2000],
        "empty.pt": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"^source: .*{name} is damaged"):
            load_pretrained(other, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds list"):
        load_pretrained(other, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="there is no file"):
        load_pretrained(other, tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="has nothing that fits ResNetCIFAR; other: the network has no such name"):
        load_pretrained(other, {"other": torch.zeros(1)})
    assert not changed(before, other) and "loaded code" not in capsys.readouterr().out


def test_bad_arguments():
    with pytest.raises(ArgumentError, match=r"^strict: got False"):
        load_pretrained(net(), {}, strict=False)
    with pytest.raises(ArgumentError, match=r"^source: got int"):
        load_pretrained(net(), 3)
    with pytest.raises(ArgumentError, match=r"^net: expected an nn.Module"):
        load_pretrained(None, {})
