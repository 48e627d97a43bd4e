import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.lakd import LAKD, Teacher, Walk, attention_map
from tests.methods.sites import site, sites_of
from tests.methods.three_ways import in_bf16, never_waits, resumes, sgd, three_ways


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def student():
    return models.ResNetCIFAR(1, width=4)


def data(count=3, rows=6):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (rows,), generator=g))
        for _ in range(count)
    ]


def localize(teacher=None, blocks=4, net=None, **options):
    teacher = teacher if teacher is not None else models.ResNetCIFAR(2, width=8)
    net = net or student()
    return fl.localize(net, "lakd", blocks=blocks, sample=torch.randn(2, 3, 8, 8), teacher=teacher, **options).double()


def teacher_of(model):
    return model.heads[0].teacher.network


def test_attention_maps_by_hand():
    x = torch.tensor([[[[1.0, -2.0], [0.0, 3.0]], [[1.0, 2.0], [0.0, -4.0]]]])
    torch.testing.assert_close(attention_map(x), torch.tensor([[[[2.0, 8.0], [0.0, 25.0]]]]))
    torch.testing.assert_close(attention_map(x, 1), torch.tensor([[[[2.0, 4.0], [0.0, 7.0]]]]))
    assert torch.equal(attention_map(-x), attention_map(x)) and torch.equal(attention_map(x.flip(1)), attention_map(x))
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention_map(tokens).flatten(), attention_map(x).flatten())
    assert attention_map(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("net", "teacher", "expected"),
    [
        # stages end with stages; the stem counts to the first one
        (models.resnet20, models.resnet32, {0: 1, 3: 5, 4: 7, 6: 10, 7: 12, 8: 13}),
        (models.resnet32, models.resnet32, {k: k for k in range(15)}),
        (models.resnet32, models.resnet20, {5: 3, 10: 6}),
    ],
)
def test_blocks_are_aligned_by_stage(net, teacher, expected):
    net, teacher = net(), teacher()
    at = sites_of(net, torch.zeros(1, 3, 32, 32))
    method = LAKD(teacher=teacher)
    method.resolve(at)
    assert {k: method._taps[k] for k in expected} == expected
    assert method._taps == sorted(method._taps) and method._taps[-1] < len(teacher.units())


def test_units_of_a_teacher_without_stages_are_aligned_by_depth():
    at = [site((4, 4, 4), index=k, unit=k, units=4, blocks=4, net=nn.Linear(1, 1)) for k in range(3)]
    layers = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()) for _ in range(8)]
    method = LAKD(teacher=nn.Sequential(*layers))
    method.resolve(at)
    assert method._taps == [1, 3, 5]


def maps(features, power):
    strength = features.abs().pow(power).sum(1).flatten(1)
    return strength / strength.norm(dim=1, keepdim=True)


def by_hand(model, teacher, batches, taps, alpha, beta, power, distance):
    """Isolated blocks and a teacher with hooks in plain PyTorch."""
    model, teacher = copy.deepcopy(model), copy.deepcopy(teacher).double().eval()
    net, heads, seen = model.backbone, model.heads, {}
    for i, (name, _) in enumerate(teacher.units()):
        if name != "stem":
            teacher.get_submodule(name).register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out))
    teacher.stem, stem = lambda x: seen.setdefault(0, stem(x)), teacher.stem
    optimizer, found = sgd(model.parameters()), []
    cuts = [block.name for block in model.blocks[:-1]]
    for x, y in batches:
        seen.clear()
        with torch.no_grad():
            teacher(x)
        optimizer.zero_grad()
        h, losses = x, []
        for name, fn in net.units():
            h = fn(h)
            if name in cuts:
                head, theirs = heads[len(losses)], seen[taps[len(losses)]]
                total = 0.0
                if alpha:
                    total = total + alpha * F.cross_entropy(head.net[1](h.mean((2, 3))), y)
                if alpha < 1:
                    apart = maps(h, power) - maps(theirs, power)
                    total = total + (1 - alpha) * (
                        apart.pow(2).sum(1).sqrt().mean() if distance == "l2" else apart.pow(2).mean()
                    )
                if beta:
                    own = h if head.adapter is None else F.conv2d(h, head.adapter.weight)
                    total = total + beta * (own - theirs).pow(2).mean()
                total.backward()
                losses.append(total.detach())
                h = h.detach()
        loss = F.cross_entropy(net.readout(h), y)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        found.append(torch.stack(losses))
    return model, found


@pytest.mark.parametrize(
    ("alpha", "beta", "power", "distance"),
    [(0.5, 1.0, 2.0, "l2"), (0.3, 0.0, 1.0, "mse"), (0.0, 2.0, 3.0, "l2"), (1.0, 0.0, 2.0, "l2")],
)
def test_every_way_equals_a_loop_written_by_hand(alpha, beta, power, distance):
    teacher = models.ResNetCIFAR(2, width=8)
    for p in teacher.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    model = localize(teacher, alpha=alpha, beta=beta, power=power, distance=distance)
    before = copy.deepcopy(teacher.state_dict())
    taps = [head.tap for head in model.heads]
    assert taps == [1, 2, 4]  # student: stem, one unit a stage; teacher: stem, two a stage
    expected, losses = by_hand(model, teacher, data(), taps, alpha, beta, power, distance)
    spec, got = three_ways(model, data())
    torch.testing.assert_close(got, losses, rtol=1e-11, atol=1e-12)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(spec.state_dict()[name], value, rtol=1e-10, atol=1e-11, msg=name)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name].to(value.dtype)), name
    wanted = {"task": alpha, "attention": 1 - alpha, "feature": beta}
    x, y = data(1)[0]
    local = model.heads[0](model.backbone.units()[0][1](x), StepContext(y, x, F.cross_entropy))
    assert {name: weight for name, (_, weight) in local.terms.items()} == {n: w for n, w in wanted.items() if w}


def test_a_teacher_equal_to_the_student_costs_nothing():
    net = student()
    model = localize(copy.deepcopy(net), net=net, alpha=0.0)
    teacher = teacher_of(model)
    x, y = data(1)[0]
    for p, q in zip(teacher.buffers(), net.buffers()):
        p.copy_(q)
    net.eval()
    ctx = StepContext(y, x, F.cross_entropy)
    for head, (_, fn) in zip(model.heads, net.units()):
        x = fn(x)
        h = x.detach().requires_grad_()
        local = head(h, ctx)
        local.loss.backward()
        assert local.loss < 1e-12 and h.grad.isfinite().all()


def test_the_teacher_runs_once_a_step_and_no_further_than_needed():
    model = localize()
    calls = []
    for name, module in teacher_of(model).named_modules():
        if name.startswith("layer") and name.count(".") == 1:
            module.register_forward_pre_hook(lambda m, a, name=name: calls.append((name, torch.is_grad_enabled())))
    engine = fl.Engine(model, sgd)
    for batch in data(2):
        engine.step(*batch)
    # block 2 ends with the second stage, which is the teacher's unit 4: layer2.1
    once = [("layer1.0", False), ("layer1.1", False), ("layer2.0", False), ("layer2.1", False)]
    assert calls == once * 2


def test_a_walk_goes_back_where_units_are_asked_for_out_of_order():
    teacher = Teacher(models.ResNetCIFAR(1, width=4))
    x = torch.randn(2, 3, 8, 8)
    walk = Walk(teacher, x)
    late, early, again = walk.at(3), walk.at(1), walk.at(1)
    assert early is again and torch.equal(walk.at(3), late)
    assert torch.equal(early, Walk(teacher, x).at(1)) and not early.requires_grad


def test_the_teacher_is_not_trained_saved_or_switched_but_moved():
    teacher = models.ResNetCIFAR(2, width=8).train()
    model = localize(teacher)
    assert not any("teacher" in name for name in (*dict(model.named_parameters()), *model.state_dict()))
    assert len({id(head.teacher) for head in model.heads}) == 1 and not teacher.training
    model.train()
    assert not teacher.training
    teacher.train()  # by somebody else
    x, y = data(1)[0]
    before = copy.deepcopy(teacher.state_dict())
    out = model(x, y)
    out.loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert next(teacher.parameters()).dtype == torch.float64
    model.float()
    assert next(teacher.parameters()).dtype == torch.float32
    model.to("meta")
    assert next(teacher.parameters()).device.type == "meta"


def test_copies_have_a_teacher_of_their_own_once():
    model = localize()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({id(head.teacher.network) for head in other.heads}) == 1
        assert other.heads[0].teacher is other.method.options.teacher
        assert teacher_of(other) is not teacher_of(model)
        torch.manual_seed(0)
        assert torch.equal(other(*data(1)[0]).losses, model(*data(1)[0]).losses)
    assert "Teacher(ResNetCIFAR)" in repr(model.method)


def test_resumes_and_plans():
    model = localize()
    resumes(model, data(4))
    assert fl.plan(model, data(1)[0]).peak_bytes > 0


def test_blocks_for_a_budget():
    """The search plans with a teacher without contents, and leaves the real one as it was."""
    teacher = student()
    before = copy.deepcopy(teacher.state_dict())
    sample = torch.randn(256, 3, 16, 16)
    model = fl.localize(
        student(), "lakd", blocks="auto", sample=sample, memory_budget="11MB", teacher=teacher, beta=0.0
    )
    assert len(model.blocks) > 1 and teacher_of(model) is teacher
    assert model(sample[:4], torch.arange(4)).loss.isfinite()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_named_taps_and_maps_of_another_size():
    # half the student's height and width, and other widths
    layers = {"a": nn.Conv2d(3, 5, 3, stride=2, padding=1), "b": nn.Conv2d(5, 6, 3, padding=1)}
    teacher = nn.Sequential()
    for name, layer in layers.items():
        teacher.add_module(name, layer)
    model = localize(teacher, blocks=["stem", "layer1.0"], taps=["a", "a"], alpha=0.0)
    x, y = data(1)[0]
    h = model.backbone.units()[0][1](x)
    local = model.heads[0](h, StepContext(y, x, F.cross_entropy))
    theirs = F.interpolate(teacher.double()[0](x), size=(8, 8), mode="nearest")
    own = F.conv2d(h, model.heads[0].adapter.weight)
    torch.testing.assert_close(local.terms["feature"][0], (own - theirs).pow(2).mean())
    torch.testing.assert_close(local.terms["attention"][0], (maps(h, 2) - maps(theirs, 2)).norm(dim=1).mean())
    assert [head.tap for head in model.heads] == [0, 0]
    # a finer map is averaged: here the teacher has four positions for each of the student's
    ctx = StepContext(y, x, F.cross_entropy)
    local = model.heads[0](h[:, :, :2, :2], ctx)
    torch.testing.assert_close(
        local.terms["feature"][0], (own[:, :, :2, :2] - F.avg_pool2d(teacher[0](x), 2)).pow(2).mean()
    )
    mean = F.avg_pool2d(teacher[0](x).square().sum(1, keepdim=True), 2).flatten(1)
    apart = maps(h[:, :, :2, :2], 2) - F.normalize(mean, dim=1)
    torch.testing.assert_close(local.terms["attention"][0], apart.norm(dim=1).mean())


def test_a_teacher_of_another_dtype_takes_the_student_s():
    teacher = models.ResNetCIFAR(2, width=8).double()
    model = fl.localize(student(), "lakd", blocks=3, sample=torch.randn(2, 3, 8, 8), teacher=teacher)
    assert next(teacher.parameters()).dtype == torch.float32
    assert model(torch.randn(4, 3, 8, 8), torch.arange(4)).loss.isfinite()


def test_tokens():
    def vit(depth):
        return models.vit_tiny(num_classes=10, img_size=8, patch_size=4, dim=16, depth=depth, heads=2)

    model = localize(vit(5), blocks=3, net=vit(3))
    three_ways(model, data(2))
    wide = models.vit_tiny(num_classes=10, img_size=8, patch_size=4, dim=24, depth=3, heads=2)
    model = localize(wide, blocks=3, net=vit(3))
    assert isinstance(model.heads[0].adapter, nn.Linear)
    three_ways(model, data(2))


def test_refusals():
    with pytest.raises(ArgumentError, match="teacher: 'lakd' distils from a trained network; give teacher=net"):
        fl.localize(student(), "lakd", blocks=3, sample=torch.randn(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match="teacher: Linear does not say what its units are"):
        LAKD(teacher=nn.Linear(1, 1))
    net = student()
    with pytest.raises(ArgumentError, match=r"teacher: shares parameters with the network.*copy\.deepcopy"):
        localize(net, net=net)
    with pytest.raises(ArgumentError, match=r"taps: the teacher has no unit 'layer9\.0'"):
        localize(taps=["stem", "layer1.0", "layer9.0"])
    with pytest.raises(ArgumentError, match="taps: 2 names for 3 blocks with a head"):
        localize(taps=["stem", "layer1.0"])
    with pytest.raises(ArgumentError, match=r"teacher: Teacher\(ViT\) does not take an input of shape \(3, 8, 8\)"):
        localize(models.vit_tiny(img_size=32, patch_size=8, dim=16, heads=2, depth=4), taps=["blocks.0"] * 3)
    with pytest.raises(ArgumentError, match=r"taps: the teacher's unit 'blocks.0' gives \(5, 16\), which block 0 with"):
        localize(models.vit_tiny(img_size=8, patch_size=4, dim=16, heads=2, depth=4), taps=["blocks.0"] * 3)
    for shape, dense in (((8,), False), ((6, 8), True)):
        with pytest.raises(ArgumentError, match="compares maps of one sample's positions"):
            LAKD(teacher=student()).head(site(shape, dense=dense))
    for options, message in (
        ({"alpha": 2}, "alpha: got 2"),
        ({"beta": -1}, "beta: got -1"),
        ({"power": 0}, "power: got 0"),
        ({"distance": "kl"}, "distance: got 'kl'. Valid: 'l2', 'mse'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            LAKD(**options)


def test_on_an_accelerator_it_never_waits_and_in_bf16_it_is_much_the_same():
    in_bf16(localize(), *data(1)[0])
    never_waits(localize().float(), data(1)[0][0].float(), data(1)[0][1])
