"""fastlocal.models: create, list_models, options."""

import subprocess
import sys

import pytest

from fastlocal import models
from fastlocal.errors import ArgumentError

NAMES = [
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet1202",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "vgg13",
    "vgg19",
    "vgg8b",
    "vgg11b",
    "dgl_cnn",
    "vit_tiny",
    "vit_small",
    "vit_base",
    "vit_large",
    "vit_huge",
    "swin_tiny",
    "swin_small",
    "swin_base",
    "mlp",
    "gpt",
]


def test_list_models_names_every_constructor():
    assert models.list_models() == NAMES
    assert all(callable(getattr(models, name)) and name in models.__all__ for name in NAMES)


def test_create_passes_options_on():
    net = models.create("resnet20", num_classes=7, width=4, in_channels=1)
    assert net.fc.out_features == 7 and net.conv1.in_channels == 1 and net.conv1.out_channels == 4


@pytest.mark.parametrize(
    ("alias", "dim"),
    [("vit_t", 192), ("vit_ti", 192), ("vit_s", 384), ("vit_b", 768), ("vit_l", 1024), ("vit_h", 1280)],
)
def test_aliases(alias, dim):
    assert models.create(alias, depth=1).dim == dim


@pytest.mark.parametrize(("alias", "dim", "blocks"), [("swin_t", 96, 12), ("swin_s", 96, 24), ("swin_b", 128, 24)])
def test_aliases_of_swin(alias, dim, blocks):
    options = models.options(alias)
    assert (options["dim"], sum(options["depths"])) == (dim, blocks)


@pytest.mark.parametrize("name", NAMES)
def test_options_are_what_the_constructor_takes(name):
    accepted = models.options(name)
    assert ("vocab_size" if name == "gpt" else "num_classes") in accepted
    large = (
        "resnet1202",
        "resnet152",
        "vgg13",
        "vgg19",
        "vit_base",
        "vit_large",
        "vit_huge",
        "swin_small",
        "swin_base",
        "gpt",
        "resnet101",
        "vgg11b",
        "vgg8b",
    )
    if name not in large:
        assert models.create(name, **accepted).num_classes == accepted["num_classes"]


def test_options_show_the_defaults_of_that_size():
    assert models.options("vit_small")["dim"] == 384 and models.options("vit_small")["heads"] == 6
    assert models.options("vit_t")["dim"] == 192


@pytest.mark.parametrize(
    ("given", "offered"), [("resnet33", "resnet32"), ("ResNet20", "resnet20"), ("vit_smal", "vit_small")]
)
def test_unknown_name_offers_near_ones(given, offered):
    with pytest.raises(ArgumentError, match=offered) as caught:
        models.create(given)
    assert given in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("given", ["zzzzz", "", None, 20])
def test_unknown_name_without_neighbours_lists_all(given):
    with pytest.raises(ArgumentError, match="Available: resnet20"):
        models.create(given)


def test_unknown_option_offers_near_ones():
    with pytest.raises(ArgumentError, match=r"resnet20 has no option 'num_clases'.*num_classes"):
        models.create("resnet20", num_clases=10)
    with pytest.raises(ArgumentError, match=r"Available: .*heads"):
        models.create("vit_tiny", zzz=1)


BAD = [
    ("resnet20", {"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
    ("resnet20", {"num_classes": 2.5}, "num_classes must be an integer of at least 1, got 2.5"),
    ("resnet20", {"in_channels": True}, "in_channels must be"),
    ("resnet20", {"width": 0.5}, "width must be at least 1.*usually 16.*got 0.5"),
    ("resnet18", {"width": "wide"}, "width must be at least 1.*usually 64.*got 'wide'"),
    ("resnet18", {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
    ("vgg13", {"hidden": -1}, "hidden must be"),
    ("vgg8b", {"nonlin": "gelu"}, "nonlin must be one of relu, leakyrelu, got 'gelu'"),
    ("vgg8b", {"feat_mult": 0.001}, "feat_mult must leave at least one channel"),
    ("vgg8b", {"img_size": 8}, "img_size must be large enough.*got 8"),
    ("vgg8b", {"num_layers": -1}, "num_layers must be"),
    ("dgl_cnn", {"downsample": (0,)}, "downsample must hold indices of convolutions, 1 to 5"),
    ("vit_tiny", {"img_size": 30}, "img_size must be a multiple of patch_size=16, got 30"),
    ("vit_tiny", {"heads": 5}, "dim must be a multiple of heads=5, got 192"),
    ("vit_tiny", {"pool": "max"}, "pool must be one of cls, mean, got 'max'"),
    ("vit_tiny", {"depth": 0}, "depth must be"),
    ("mlp", {"hidden": ()}, "hidden must be a sequence"),
    ("mlp", {"hidden": 64}, "hidden must be a sequence"),
    ("mlp", {"hidden": (64, 0)}, "hidden must be an integer of at least 1, got 0"),
    ("gpt", {"n_head": 5}, "n_embd must be a multiple of n_head=5, got 768"),
    ("gpt", {"dropout": -0.1}, "dropout must be"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=[f"{n}-{next(iter(o))}" for n, o, _ in BAD])
def test_bad_values_are_named(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        models.create(name, **options)


def test_import_needs_no_optional_package():
    code = (
        "import sys, torch\n"
        "for name in ('torchvision', 'timm', 'transformers', 'lightning', 'triton', 'matplotlib', 'sklearn'):\n"
        "    sys.modules[name] = None\n"  # whoever imports one of these fails
        "import fastlocal.models"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
