import copy
import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.methods.localmim import LocalMIM
from fastlocal.models import MaskedViT
from tests.methods.three_ways import in_bf16, never_waits, resumes, sgd, three_ways

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "models" / "localmim_vit.json").read_text())
TINY = {"img_size": 32, "patch_size": 8, "dim": 16, "depth": 7, "heads": 2, "decoder_dim": 16, "decoder_heads": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def localize(net=None, images=None, **options):
    net = net or MaskedViT(**TINY)
    images = torch.rand(2, 3, net.img_size, net.img_size) if images is None else images
    return fl.localize(net, "localmim", blocks=4, sample=images, criterion=net.criterion, **options)


def data(count=3, rows=4, size=32):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(rows, 3, size, size, generator=g, dtype=torch.float64) for _ in range(count)]


def official_name(name, depth):
    """Of a parameter of the localized model in the official network."""
    if name.startswith("backbone.decoder."):
        k, rest = 3, name.removeprefix("backbone.decoder.")
    elif name.startswith("heads."):
        k, rest = int(name.split(".")[1]), name.split(".", 3)[3]
    else:
        return name.removeprefix("backbone.")
    if rest.startswith("input_norm."):
        return f"norm.{k}.{rest.removeprefix('input_norm.')}"
    return f"decoder.{k}.{rest}"


def official():
    """The model that the golden numbers come from, its parameters filled by their rule, and their images and noise."""
    g = torch.Generator().manual_seed(1234)
    images = torch.rand(3, 3, 64, 64, generator=g, dtype=torch.float64)
    noise = torch.rand(3, 16, generator=g, dtype=torch.float64)
    model = localize(MaskedViT(**GOLDEN["net"])).double()
    names = {}
    for name, p in model.named_parameters():
        theirs = official_name(name, 8)
        r = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(theirs.encode())), dtype=p.dtype)
        p.data.copy_(0.2 * r if p.ndim >= 2 else 0.1 * r + (1.0 if theirs.endswith("weight") else 0.0))
        names[theirs] = p
    model.backbone.masking.noise = lambda rows, device: noise
    return model, names, images


def check_gradients(names, scale=1.0):
    assert set(names) == set(GOLDEN["grad_norm"])
    for name, p in names.items():
        assert p.grad.norm().item() * scale == pytest.approx(GOLDEN["grad_norm"][name], rel=1e-10, abs=1e-12), name


def test_official_losses_and_gradients_at_level_a():
    model, names, images = official()
    out = model(images, images)
    assert out.losses.tolist() == pytest.approx(GOLDEN["losses"], rel=1e-12)
    assert out.loss.item() == pytest.approx(GOLDEN["loss"], rel=1e-12)
    out.loss.backward()
    check_gradients(names)
    assert model.backbone.masking.mask(1.0, torch.float64).sum(1).tolist() == GOLDEN["mask_sum"]


def test_official_gradients_through_engine_and_reference():
    def keep(params):
        return torch.optim.SGD(params, lr=1.0)

    for step in (fl.reference.train_step, None):
        model, names, images = official()
        before = {name: p.detach().clone() for name, p in names.items()}
        if step is None:
            losses = fl.Engine(model, keep).step(images).losses
        else:
            losses = torch.stack(step(model, images, keep(model.parameters())))
        assert losses.tolist() == pytest.approx(GOLDEN["losses"], rel=1e-12)
        for name, p in names.items():
            norm = (before[name] - p.detach()).norm().item()
            assert norm == pytest.approx(GOLDEN["grad_norm"][name], rel=1e-9, abs=1e-12), name


def test_official_predictions():
    model, _, images = official()
    net, found = model.backbone, []
    h = images
    for name, fn in net.units():
        h = fn(h)
        for head, block in zip(model.heads, model.blocks):
            if block.name == name:
                found.append(head.decoder(h, net.masking.restore))
    found.append(net.readout(h))
    for predicted, (first, norm) in zip(found, GOLDEN["predicted"], strict=True):
        assert predicted[0, 0, :5].tolist() == pytest.approx(first, rel=1e-10)
        assert predicted.norm().item() == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("target", ["hog", "pixels"])
def test_every_way_is_equal_and_resumes(target):
    model = localize(MaskedViT(**TINY, target=target)).double()
    _, losses = three_ways(model, data())
    assert all(x.isfinite().all() and (x > 0).all() for x in losses)
    resumes(model, data(4))


def test_deterministic_masks_do_not_depend_on_the_caller_s_random_stream():
    runs = []
    for seed in (1, 2):
        model = localize(copy.deepcopy(NET)).double()
        torch.manual_seed(seed)
        engine = fl.Engine(model, sgd, deterministic=True, seed=7)
        engine.step(data(1)[0])
        runs.append(model.backbone.masking.restore)
    assert torch.equal(*runs)
    engine.step(data(1)[0])
    assert not torch.equal(runs[0], model.backbone.masking.restore)


NET = MaskedViT(**TINY)


def test_cuts_are_the_published_ones():
    with torch.device("meta"):
        names = [name for name, _ in MaskedViT(depth=12, dim=48, heads=2).units()]
    assert [names[c] for c in LocalMIM().cuts(4, names, None)] == ["blocks.1", "blocks.3", "blocks.9"]
    assert LocalMIM().cuts(3, names, None) is None and LocalMIM().cuts(4, names[:7], None) is None
    model = localize()
    assert [block.name for block in model.blocks] == ["blocks.1", "blocks.3", "blocks.4", "blocks.6"]
    assert [head.scale for head in model.heads] == [4.0, 2.0, 1.0] and model.backbone.criterion.scale == 0.5


def test_other_cuts_and_scales():
    net = MaskedViT(**TINY, scale=1)
    model = fl.localize(
        net, "localmim", blocks=["blocks.2"], sample=data(1)[0].float(), criterion=net.criterion, scales=(2,)
    )
    x = data(1)[0].float()
    out = model(x, x)
    assert out.losses.shape == (2,) and out.correct.tolist() == [-1, -1]


def test_all_losses_reach_the_first_block():
    """No border: the gradient of the first block is that of the sum of all four losses in plain PyTorch."""
    model, x = localize().double(), data(1)[0]
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    model(x, x).loss.backward()
    net = plain.backbone
    torch.manual_seed(1)
    h, total, k = x, 0.0, 0
    for name, fn in net.units():
        h = fn(h)
        if k < 3 and name == plain.blocks[k].name:
            scale = (4.0, 2.0, 1.0)[k]
            total = total + net.masking.loss(plain.heads[k].decoder(h, net.masking.restore), x, scale)
            k += 1
    total = total + net.criterion(net.readout(h), x)
    total.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14, msg=name)


def test_accumulation_is_the_mean_over_images():
    model = localize().double()
    whole = copy.deepcopy(model)
    x = data(1, rows=4)[0]
    noise = torch.rand(4, 16)
    rows = iter([slice(0, 3), slice(3, 4)])
    whole.backbone.masking.noise = lambda n, device: noise
    model.backbone.masking.noise = lambda n, device: noise[next(rows)]
    fl.Engine(whole, sgd).step(x)
    engine = fl.Engine(model, sgd)
    engine.accumulate(x[:3])
    engine.step(x[3:])
    for (name, a), (_, b) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        # a micro-batch's weight, here a third of the first one's, is a float32 number
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


def test_batches_with_labels_and_the_trained_encoder():
    net = MaskedViT(**TINY)
    model = fl.localize(
        net, "localmim", blocks=4, sample=torch.rand(2, 3, 32, 32), criterion=net.criterion,
        batch=lambda b: ((b[0],), {}, b[0]),
    )  # fmt: skip
    engine = fl.Engine(model, sgd)
    losses = [engine.step(data(1)[0].float(), torch.arange(4)).loss.item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert isinstance(model.export().to_vit(10), models.ViT)
    assert model.eval()(data(1)[0].float()).shape == (4, 4, 27)


def test_it_learns_what_the_patches_share():
    """Images of one orientation: hidden patches can be predicted from those that are seen."""
    torch.manual_seed(0)
    model = localize()
    x = torch.linspace(0, 6, 32).sin().expand(8, 3, 32, 32).contiguous()
    engine = fl.Engine(model, lambda p: torch.optim.AdamW(p, lr=3e-3))
    first = engine.step(x).losses
    for _ in range(20):
        last = engine.step(x).losses
    assert (last < 0.6 * first).all()


def test_refusals():
    with pytest.raises(ArgumentError, match=r"give a fastlocal\.models\.MaskedViT"):
        fl.localize(models.ResNetCIFAR(1, width=4), "localmim", blocks=4, sample=torch.rand(2, 3, 8, 8))
    net = MaskedViT(**TINY)
    with pytest.raises(
        ArgumentError, match="scales: 3 numbers for 3 blocks; give one for every block but the last, or"
    ):
        fl.localize(net, "localmim", blocks=3, sample=torch.rand(2, 3, 32, 32), criterion=net.criterion)
    for scales, message in (
        ((), r"scales: got \(\); give 4, 2"),
        (4, "scales: got 4; give 4, 2"),
        ((0,), "scales: got 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            LocalMIM(scales=scales)
    with pytest.raises(ArgumentError, match=r"scale must be one of 4, 2, 1, 0\.5, got 3"):
        localize(scales=(4, 3, 1))
    entry = next(m for m in fl.list_methods() if m["name"] == "localmim")
    assert entry["isolated"] is False and "not isolated" in entry["summary"]
    assert isinstance(localize().heads[0], nn.Module)


def test_on_an_accelerator_it_never_waits_and_in_bf16_it_is_much_the_same():
    in_bf16(localize(), data(1)[0])
    never_waits(localize(), data(1)[0].float())
