import functools
import itertools

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal import models
from fastlocal.blocks.heads import Upsample
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.types import StepContext
from fastlocal.errors import ArgumentError
from fastlocal.methods.infopro import CONFIGS, InfoPro
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.reference import train_step
from tests.methods.sites import run_head, site, sites_of

CIFAR = torch.zeros(2, 3, 32, 32)


def unit_names(net):
    return [name for name, _ in net.units()]


@pytest.mark.parametrize(
    ("net", "blocks", "options", "expected"),
    [
        (models.resnet32, 2, {}, ["layer2.1"]),
        (models.resnet32, 4, {}, ["layer1.2", "layer2.1", "layer3.0"]),
        (models.resnet32, 8, {}, ["layer1.0", "layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"]),
        (models.resnet32, 16, {}, None),
        (models.resnet110, 2, {}, ["layer2.8"]),
        (models.resnet110, 3, {}, ["layer1.17", "layer2.17"]),
        (models.resnet110, 2, {"balanced_memory": True}, ["layer1.14"]),
        (models.resnet110, 3, {"balanced_memory": True}, ["layer1.9", "layer2.2"]),
        (models.resnet110, 3, {"balanced_memory": True, "dataset": "stl10"}, ["layer1.8", "layer2.1"]),
        (models.resnet110, 55, {}, None),
        (models.resnet20, 2, {}, None),
        (models.resnet101, 2, {"form": "imagenet"}, ["layer2.0"]),
        (models.resnet152, 2, {"form": "imagenet"}, ["layer2.5"]),
        (models.resnet101, 4, {"form": "imagenet"}, None),
        (models.resnext101_32x8d, 2, {"form": "imagenet"}, ["layer2.2"]),
        (models.resnext101_32x8d, 2, {"form": "imagenet", "balanced_memory": True}, ["layer2.2"]),
        (models.resnet101, 2, {"form": "cityscapes"}, ["layer3.12"]),
        (models.resnet101, 3, {"form": "cityscapes"}, None),
        (models.resnet152, 2, {"form": "cityscapes"}, None),
        (models.resnet50, 2, {"form": "cityscapes"}, None),
    ],
)
def test_published_cuts(net, blocks, options, expected):
    with torch.device("meta"):
        net = net()
    names = unit_names(net)
    cuts = InfoPro(**options).cuts(blocks, names, net)
    assert (None if cuts is None else [names[c] for c in cuts]) == expected


def test_published_cuts_make_as_many_blocks_as_asked_for():
    for net, counts in ((models.resnet32(), (2, 3, 4, 8)), (models.resnet110(), (2, 3, 4, 8, 16))):
        for blocks in counts:
            cuts = InfoPro().cuts(blocks, unit_names(net), net)
            assert len(cuts) == blocks - 1 and cuts == sorted(set(cuts)) and cuts[-1] < len(unit_names(net)) - 1


def test_unpublished_balanced_cuts_are_refused():
    for blocks, options in ((5, {}), (2, {"dataset": "svhn"})):
        with pytest.raises(ArgumentError, match=r"balanced_memory: no published cuts.*pass blocks=\[names"):
            InfoPro(balanced_memory=True, **options).cuts(blocks, unit_names(models.resnet110()), None)


def at(index, blocks, units):
    return site((16, 32, 32), index=index, blocks=blocks, units=units)


@pytest.mark.parametrize(
    ("options", "units", "blocks", "index", "expected"),
    [
        ({}, 16, 2, 0, (5, 1)),
        ({}, 16, 4, 1, (3.5, 1)),
        ({}, 16, 16, 0, (5, 0.05)),
        ({}, 16, 16, 7, (2.6, 0.275)),
        ({}, 16, 16, 14, (0.2, 0.5)),
        ({}, 55, 16, 14, (0.5, 1)),
        ({}, 55, 55, 53, (0.5, 1)),
        ({"dataset": "stl10"}, 55, 4, 2, (5, 2)),
        ({"dataset": "svhn"}, 55, 16, 0, (5, 0.2)),
        ({"balanced_memory": True}, 55, 3, 1, (5, 0.1)),
        ({"balanced_memory": True, "dataset": "stl10"}, 55, 4, 1, (15, 0.75)),
        ({"form": "imagenet"}, 34, 2, 0, (5, 0.75)),
        ({"form": "imagenet"}, 51, 2, 0, (5, 1)),
        ({"form": "imagenet", "balanced_memory": True}, 51, 2, 0, (5, 1)),
        ({"form": "cityscapes"}, 36, 2, 0, (1.5, 1)),
        ({"lam": (3, 1)}, 7, 5, 2, (3, 1)),
        ({"lam": (4, 0, 0, 2)}, 7, 5, 0, (4, 0)),
        ({"lam": (4, 0, 0, 2)}, 7, 5, 3, (0, 2)),
        ({"lam": (4, 1, 0, 2)}, 7, 2, 0, (4, 1)),
    ],
)
def test_lambdas(options, units, blocks, index, expected):
    assert InfoPro(**options).weights(at(index, blocks, units)) == pytest.approx(expected)


def test_unpublished_lambdas_must_be_given():
    for options in ({}, {"dataset": "stl10"}, {"balanced_memory": True, "dataset": "svhn"}):
        with pytest.raises(ArgumentError, match=r"lam: no published values for 5 blocks of 10 units.*give lam="):
            InfoPro(**options).head(at(0, 5, 10))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("loss", ["contrast", "cross_entropy"])
def test_second_head_has_the_layers_its_name_says(config, loss):
    torch.manual_seed(0)
    where = site((16, 32, 32), widths=[16, 32, 64])
    head = InfoPro(lam=(5, 0.5), config=config, loss=loss, feature_dim=24).head(where)
    convs = [m for m in head.classifier if isinstance(m, nn.Conv2d)]
    linears = [m for m in head.classifier if isinstance(m, nn.Linear)]
    assert (len(convs), len(linears)) == CONFIGS[config]
    assert all(m.out_features == 24 for m in linears[:-1])
    assert linears[-1].out_features == (24 if loss == "contrast" else 5)
    assert [c.stride[0] for c in convs] == [2, 1][: len(convs)]
    local = run_head(head, where)
    assert set(local.terms) == {"reconstruction", "contrast" if loss == "contrast" else "task"}


def test_second_head_doubles_the_width_until_the_last_stage():
    method = InfoPro(lam=(5, 0.5))
    for k, (channels, out, stride) in {0: (16, 32, 2), 6: (32, 64, 2), 12: (64, 64, 1)}.items():
        conv = method.head(sites_of(models.resnet32(), CIFAR)[k]).classifier[0]
        assert (conv.in_channels, conv.out_channels, conv.stride) == (channels, out, (stride, stride))
    for size, out, stride in ((16, 24, 2), (8, 12, 1)):
        conv = method.head(site((12, size, size))).classifier[0]
        assert (conv.out_channels, conv.stride) == (out, (stride, stride))


def test_widen_decoder_and_initialisation():
    torch.manual_seed(0)
    head = InfoPro(lam=(5, 0.5), decoder="4c", widen=2).head(site((16, 16, 16)))
    convs = [m for m in head.decoder if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [24, 24, 24, 3]
    assert all(c.bias is not None for c in convs)
    assert convs[1].weight.std().item() == pytest.approx((2 / (9 * 24)) ** 0.5, rel=0.05)
    first = head.classifier[0]
    assert first.out_channels == 64 and first.bias is None


def test_a_term_of_weight_zero_is_left_out_in_paper_mode_only():
    first, last = at(0, 8, 16), at(6, 8, 16)  # (5, 0) and (0, 2)
    torch.manual_seed(0)
    assert InfoPro().head(first).classifier is None and InfoPro().head(last).decoder is None
    assert set(run_head(InfoPro().head(first), first).terms) == {"reconstruction"}
    local = run_head(InfoPro("official").head(first), first)
    assert local.terms["contrast"][1] == 0.0 and local.terms["contrast"][0] > 0
    with pytest.raises(ArgumentError, match="lam: both weights of block 0 are 0"):
        InfoPro(lam=(0, 0)).head(first)


def test_imagenet_form():
    torch.manual_seed(0)
    where = site((16, 8, 8), input_shape=(3, 32, 32), units=34, blocks=2)
    head = InfoPro(form="imagenet").head(where)
    local = run_head(head, where)
    assert {name: weight for name, (_, weight) in local.terms.items()} == {"reconstruction": 5.0, "task": 0.75}
    assert head.mean.flatten().tolist() == [0.485, 0.456, 0.406]
    assert head.decoder[0].out_channels == 128 and head.classifier[-1].in_features == 2048


def test_normalisation_follows_the_data_set_or_is_given():
    where = site((16, 16, 16))
    assert InfoPro(lam=(1, 1)).head(where).mean.flatten().tolist() == [125.3 / 255, 123.0 / 255, 113.9 / 255]
    assert InfoPro(lam=(1, 1), dataset="svhn").head(where).std.flatten().tolist() == [0.5] * 3
    grey = site((16, 8, 8), input_shape=(1, 8, 8))
    with pytest.raises(ArgumentError, match=r"mean, std: the image has 1 channels.*give mean="):
        InfoPro(lam=(1, 1)).head(grey)
    local = run_head(InfoPro(lam=(1, 1), mean=[0.3], std=[0.4]).head(grey), grey)
    assert local.loss.isfinite()


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (6, 8)},
        {"shape": (8,)},
        {"shape": (6, 8), "dense": True},
        {"shape": (8, 4, 4), "input_shape": (64,)},
    ],
)
def test_networks_that_are_not_image_classifiers_are_refused(changes):
    with pytest.raises(ArgumentError, match=r"'infopro' reconstructs an image.*use method='dgl' or 'auglocal'"):
        InfoPro(lam=(1, 1)).head(site(**changes))


class Segmenter(nn.Module):
    """A fully convolutional network of four units, its last map at a quarter of the image."""

    def __init__(self, channels=3, num_classes=4):
        super().__init__()
        widths = [channels, 4, 8, 8, 8]
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2 if i < 2 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for i, (a, b) in enumerate(itertools.pairwise(widths))
            )
        )
        self.classes = nn.Conv2d(8, num_classes, 1)

    def units(self):
        return [(f"body.{i}", unit) for i, unit in enumerate(self.body)]

    def readout(self, h):
        return nn.functional.interpolate(self.classes(h), scale_factor=4, mode="bilinear", align_corners=False)

    def forward(self, x):
        return self.readout(self.body(x))


def pixels(rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(rows, 3, 16, 24, generator=g), torch.randint(0, 4, (rows, 16, 24), generator=g)
    y[:, :5, :7] = 255
    return x, y


VOID = functools.partial(cross_entropy, ignore_index=255)


def test_the_segmentation_heads_have_the_published_layers():
    torch.manual_seed(0)
    where = site((1024, 8, 8), input_shape=(3, 64, 64), num_classes=19, dense=True, blocks=2)
    head = InfoPro(form="cityscapes").head(where)
    assert head.weights == (1.5, 1.0) and not head.contrast and head.mean.flatten().tolist() == [0.485, 0.456, 0.406]
    conv, norm, act, drop, scores, up = head.classifier
    assert conv.weight.shape == (512, 1024, 3, 3) and conv.bias is not None and norm.num_features == 512
    assert (type(act), type(drop), drop.p) == (nn.ReLU, nn.Dropout2d, 0.1)
    assert scores.weight.shape == (19, 512, 1, 1) and scores.bias is not None and up.size == (64, 64)
    # As torch draws them, not as in ResNets: uniform with bound 1 / sqrt(inputs).
    assert conv.weight.abs().max() <= (9 * 1024) ** -0.5
    convs = [m for m in head.decoder if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convs] == [(128, 1024, 1, 1), (32, 128, 3, 3), (12, 32, 3, 3), (3, 12, 3, 3)]
    assert [m.size for m in head.decoder if isinstance(m, Upsample)] == [(16, 16), (32, 32), (64, 64)]
    # The same in every form, and for a boundary that is larger than a quarter of the image.
    again = InfoPro(lam=(1, 1)).head(site((8, 24, 24), input_shape=(3, 32, 32), dense=True))
    assert [m.size for m in again.decoder if isinstance(m, Upsample)] == [(24, 24), (24, 24), (32, 32)]


def test_the_losses_of_a_segmentation_head_are_these():
    """Step by step, from the published formulas; the image is restored with ImageNet's mean and deviation."""
    torch.manual_seed(0)
    x, y = pixels()
    model = fl.localize(Segmenter(), "infopro", blocks=2, sample=x[:2], criterion=VOID)
    (head,) = model.heads
    assert type(head.classifier[3]) is nn.Dropout2d
    head.classifier[3].p = 0.0
    h = torch.randn(3, *model.blocks[0].cost.boundary)
    local = head(h, StepContext(target=y, input=x, criterion=VOID))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = (x * std + mean).clamp(0, 1)
    reconstruction = nn.functional.binary_cross_entropy(torch.sigmoid(head.decoder(h)), image)
    small = nn.functional.relu(head.classifier[1](head.classifier[0](h)))
    scores = nn.functional.interpolate(head.classifier[4](small), size=(16, 24), mode="bilinear", align_corners=True)
    task = nn.functional.cross_entropy(scores, y, ignore_index=255)
    assert list(local.terms) == ["reconstruction", "task"]
    assert torch.allclose(local.terms["reconstruction"][0], reconstruction) and torch.allclose(
        local.terms["task"][0], task
    )
    assert torch.allclose(local.loss, 1.5 * reconstruction + task)
    assert local.logits.shape == (3, 4, 16, 24)


@pytest.mark.parametrize("blocks", [2, 3])
def test_a_segmentation_network_trains_by_all_three_ways(blocks):
    x, y = pixels(6)
    options = {} if blocks == 2 else {"lam": (1.5, 1)}

    def make():
        torch.manual_seed(0)
        model = fl.localize(Segmenter(), "infopro", blocks=blocks, sample=x[:2], criterion=VOID, **options)
        for head in model.heads:
            head.classifier[3].p = 0.0  # one stream of random numbers per block would differ between the ways
        return model

    sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, foreach=False, fused=False)
    plain, a, b, fused = (make() for _ in range(4))
    optimizers = sgd(plain.parameters()), sgd(a.parameters())
    engines = fl.Engine(b, lambda named: sgd(named)), fl.Engine(fused, lambda named: sgd(named))
    for _ in range(3):
        first = train_step(plain, (x, y), optimizers[0])
        out = a(x, y, return_logits=True)
        assert out.logits.shape == (6, 4, 16, 24)
        out.loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        done = engines[0].step(x, y)
        with as_on_gpu():
            there = engines[1].step(x, y)
        assert torch.equal(out.losses, done.losses) and torch.allclose(torch.stack(list(first)), done.losses)
        assert torch.allclose(there.losses, done.losses, rtol=1e-4) and torch.equal(out.correct, done.correct)
        assert 0 < done.correct[-1] < (y != 255).sum()
    for p, q, r, s in zip(a.parameters(), b.parameters(), plain.parameters(), fused.parameters()):
        assert torch.equal(p, q) and torch.allclose(r, q, atol=1e-6) and torch.allclose(s, q, atol=1e-4)
    assert torch.equal(b.eval()(x), b.export().eval()(x)) and b(x).shape == (6, 4, 16, 24)


def test_the_last_layers_of_a_segmenter_do_not_train_its_first_block():
    x, y = pixels()
    model = fl.localize(Segmenter(), "infopro", blocks=2, sample=x[:2], criterion=VOID)
    with torch.no_grad():
        model.backbone.classes.weight.mul_(1000)
    before = [p.grad for p in model.blocks[0].parameters()]
    assert before == [None] * len(before)
    torch.manual_seed(1)
    model(x, y).loss.backward()
    one = [p.grad.clone() for p in model.blocks[0].parameters()]
    model.zero_grad()
    with torch.no_grad():
        model.backbone.classes.weight.mul_(0)
    torch.manual_seed(1)
    model(x, y).loss.backward()
    # Not the same statistics of BatchNorm: they are of the batch, so the gradients are bitwise equal.
    assert all(torch.equal(p.grad, g) for p, g in zip(model.blocks[0].parameters(), one))


def test_the_cityscapes_form_needs_a_label_per_pixel():
    with pytest.raises(ArgumentError, match=r"form: 'cityscapes' has one label per pixel.*use form='imagenet'"):
        InfoPro(form="cityscapes").head(site((8, 4, 4), blocks=2))
    with pytest.raises(
        ArgumentError, match=r"lam: no published values for 3 blocks.*on cityscapes \(there are: 2 blocks\)"
    ):
        InfoPro().head(site((8, 4, 4), dense=True))
