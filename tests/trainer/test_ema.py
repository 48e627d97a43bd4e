import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.trainer import CheckpointStore
from fastlocal.trainer.ema import EMA


def resnet(method="dgl", blocks=3, **options):
    torch.manual_seed(0)
    net = models.create("resnet20", width=4, num_classes=4)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def gpt(tied):
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=11, block_size=6, n_layer=2, n_head=2, n_embd=8)
    return fl.localize(net, "dgl", blocks=2, sample=torch.zeros(2, 6, dtype=torch.int64), tied=tied)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def hooked():
    torch.manual_seed(0)
    return fl.localize(Hooked(), "dgl", blocks=["norm"], sample=torch.zeros(2, 4))


def image(seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 8, 8, generator=gen), torch.randint(4, (6,), generator=gen)


def vector(seed):
    x, y = image(seed)
    return x.flatten(1)[:, :4], y


def tokens(seed):
    ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
    return ids, ids


def sgd(named):
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


def everything(model):
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


CASES = {
    "dgl": (resnet, image),
    "auglocal": (lambda: resnet("auglocal", 4), image),
    "hooks": (hooked, vector),
    "link": (lambda: gpt("link"), tokens),
}


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_hand_loop(case, warmup):
    make, batch = CASES[case]
    model = make()
    engine = fl.Engine(model, sgd)
    ema = EMA(model, 0.8, warmup=warmup)
    copies = {f"backbone.{link.copy.name.removeprefix('backbone.')}" for link in model.links}
    expected = None
    for n in range(6):
        engine.step(*batch(n))
        ema.update()
        now = everything(model)
        decay = min(0.8, 1 - (1 + n) ** (-2 / 3)) if warmup else 0.8
        if expected is None:
            expected = {name: t.double() if t.is_floating_point() else t for name, t in now.items()}
        for name, t in now.items():
            if t.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * t.double() if n else t.double()
            else:
                expected[name] = t
    average = everything(ema.model)
    assert average.keys() == expected.keys()
    for name, t in average.items():
        if name in copies:
            continue  # the owner's average, see below
        if t.is_floating_point():
            assert torch.allclose(t.double(), expected[name], rtol=1e-4, atol=1e-6), name
        else:
            assert torch.equal(t, expected[name]), name
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, average[n])]
    assert len(moved) > 0.9 * len(list(model.parameters()))


def test_torchs_average_bitwise_but_for_counters():
    model = resnet()
    engine = fl.Engine(model, sgd)
    ema = EMA(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for n in range(5):
        engine.step(*image(n))
        ema.update()
        theirs.update_parameters(model)
    ours, counters = everything(ema.model), 0
    for name, t in everything(theirs.module).items():
        if t.is_floating_point():
            assert torch.equal(ours[name], t), name
        else:
            counters += 1
            assert ours[name].item() == 5 != t.item(), name
    assert counters


def test_the_average_is_a_whole_model():
    model = resnet("auglocal", 4)
    engine = fl.Engine(model, sgd)
    ema = EMA(model, 0.5)
    before = everything(model)
    for n in range(3):
        engine.step(*image(n))
        ema.update()
    average = ema.model
    assert not average.training and model.training and not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in model.parameters())
    owned = {id(p) for p in average.parameters()}
    assert {id(p) for block in average.blocks for p in block.parameters()} == owned
    assert not owned & {id(p) for p in model.parameters()}
    # each block's head runs on the average's own activations
    x, y = image(9)
    ctx = average.context((x,), {}, y)
    losses = []

    def head(k, h):
        losses.append(average.blocks[k].local_loss(h, ctx).loss.item())
        return h

    with torch.no_grad():
        average.run((x,), {}, head)
        assert not torch.equal(average(x), copy.deepcopy(model).eval()(x))
    assert len(losses) == len(average.blocks) - 1 and all(0 < loss < 10 for loss in losses)
    assert any(not torch.equal(t, before[n]) for n, t in everything(average).items())


def test_links_do_not_depend_on_evaluation():
    runs = []
    for evaluate in (False, True):
        model = gpt("link")
        engine = fl.Engine(model, sgd)
        ema = EMA(model, 0.7)
        for n in range(3):
            engine.step(*tokens(n))
            ema.update()
            if evaluate:
                ema.model(tokens(9)[0])
        assert all(torch.equal(link.copy.value, link.owner.value) for link in ema.model.links)
        runs.append(everything(ema.model))
    assert model.links and all(torch.equal(t, runs[1][n]) for n, t in runs[0].items())


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_skipped_steps_leave_the_average_finite(update):
    model = resnet()
    engine = fl.Engine(model, sgd, nonfinite="skip", update=update)
    ema = EMA(model, 0.5)
    engine.step(*image(0))
    ema.update()
    before = everything(ema.model)
    x, y = image(1)
    x[0, 0, 0, 0] = float("nan")
    engine.step(x, y)
    ema.update()
    after = everything(ema.model)
    # nothing was updated, so the average of equal weights stays what it was
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    engine.step(*image(2))
    ema.update()
    moved = everything(ema.model)
    assert all(t.isfinite().all() for t in moved.values())
    assert not torch.equal(moved["backbone.fc.weight"], before["backbone.fc.weight"])


def test_saved_and_loaded_bitwise(tmp_path):
    model = resnet()
    engine = fl.Engine(model, sgd)
    ema = EMA(model, 0.9, warmup=True)
    for n in range(3):
        engine.step(*image(n))
        ema.update()
    store = CheckpointStore(tmp_path)
    store.save(3, model, engine, extra={"ema": ema.state_dict()})

    other = resnet()
    resumed_engine = fl.Engine(other, sgd)
    resumed = EMA(other, 0.9, warmup=True)
    resumed.load_state_dict(store.load(other, resumed_engine).extra["ema"])
    for n in range(3, 6):
        for e, average in ((engine, ema), (resumed_engine, resumed)):
            e.step(*image(n))
            average.update()
    assert resumed.updates == ema.updates == 6
    ours, theirs = everything(ema.model), everything(resumed.model)
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_deepcopy_continues_alone():
    model = resnet()
    both = copy.deepcopy((model, EMA(model, 0.5)))
    twin, ema = both
    fl.Engine(twin, sgd).step(*image(0))
    ema.update()
    assert torch.equal(ema.model.backbone.fc.weight, twin.backbone.fc.weight)
    assert not torch.equal(ema.model.backbone.fc.weight, model.backbone.fc.weight)


def test_a_model_that_was_converted_since():
    model = resnet()
    ema = EMA(model, 0.5)
    model.double()
    with torch.no_grad():
        model.backbone.fc.bias.fill_(2.0)
    ema.update()
    assert ema.model.backbone.fc.bias.dtype == torch.float32 and bool((ema.model.backbone.fc.bias == 2).all())


def test_the_state_of_another_model():
    ema = EMA(resnet(), 0.5)
    before = everything(ema.model)
    with pytest.raises(ArgumentError, match=r"^state_dict: (lacks|has) "):
        ema.load_state_dict(EMA(hooked(), 0.5).state_dict())
    state = ema.state_dict()
    state["tensors"]["backbone.fc.bias"] = torch.zeros(7)
    with pytest.raises(ArgumentError, match=r"backbone\.fc\.bias is \[7\], the model's \[4\]"):
        ema.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in everything(ema.model).items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decay", {"decay": 1.0}),
        ("decay", {"decay": -0.1}),
        ("decay", {"decay": float("nan")}),
        ("decay", {"decay": True}),
        ("warmup", {"warmup": 10}),
        ("warmup_gamma", {"warmup_gamma": 0}),
        ("warmup_power", {"warmup_power": -1}),
    ],
)
def test_bad_values(name, options):
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        EMA(hooked(), **options)


def test_not_a_local_model():
    with pytest.raises(ArgumentError, match=r"^model: expected a LocalModel"):
        EMA(nn.Linear(2, 2))
