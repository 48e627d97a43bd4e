import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError
from fastlocal.methods.infopro import CONFIGS, InfoPro
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
        {"shape": (8, 4, 4), "dense": True},
        {"shape": (8, 4, 4), "input_shape": (64,)},
    ],
)
def test_networks_that_are_not_image_classifiers_are_refused(changes):
    with pytest.raises(ArgumentError, match=r"'infopro' reconstructs an image.*use method='dgl' or 'auglocal'"):
        InfoPro(lam=(1, 1)).head(site(**changes))
