"""Recipes: each one builds and trains, and its numbers are those of the tables below, which are the papers'."""

import dataclasses

import pytest
import torch

from fastlocal import cli, models
from fastlocal.data import Images
from fastlocal.errors import ArgumentError
from fastlocal.trainer import recipes

SHAPES = {
    "mnist": (1, 28, 10),
    "fashion_mnist": (1, 28, 10),
    "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100),
    "svhn": (3, 32, 10),
    "stl10": (3, 96, 10),
}


def noise(data: str) -> Images:
    channels, size, classes = SHAPES[data]
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (4, channels, size, size), generator=generator, dtype=torch.uint8)
    y = torch.tensor([0, classes - 1, 0, classes - 1])
    return Images(x, y, x[:2], y[:2], classes, torch.full((channels,), 0.5), torch.full((channels,), 0.25), "noise")


def thin(recipe: recipes.Recipe) -> recipes.Recipe:
    """A few channels and batches of two; all else as it is."""
    option = {
        "resnet32": {"width": 4},
        "resnet110": {"width": 4},
        "dgl_cnn": {"feature_size": 8},
        "vgg8b": {"feat_mult": 1 / 16, "num_hidden": 32},
        "vgg11b": {"feat_mult": 1 / 16, "num_hidden": 32},
    }
    # channels_last: PyTorch 2.13 on the CPU corrupts memory in the backward of 4 channels at 96 pixels
    return recipe.with_(batch_size=2, channels_last=False, model_option=option[recipe.settings.model])


def unlike(recipe: recipes.Recipe) -> str:
    """What is left of a recipe when numbers that change no code path are left out."""
    s = thin(recipe).settings
    # ResNets take any size; those of InfoPro whose zero lambdas differ run at 96 pixels too
    shape = "3 channels" if s.model.startswith("resnet") else str(SHAPES[s.data])
    paths = dataclasses.replace(s, data=shape, lr=0.1, epochs=400, seed=0, mean=None, std=None)
    paths = dataclasses.replace(
        paths, crop=min(1, s.crop), flip=False, scheduler=s.scheduler.replace("auglocal", "infopro")
    )
    option = {name: value for name, value in paths.option.items() if name not in ("lam", "dataset", "dim_in_decoder")}
    option["left out"] = [weight == 0 for weight in paths.option.get("lam", ())]
    sized = {name: bool(value) if name == "dropout" else value for name, value in paths.model_option.items()}
    return repr(
        dataclasses.replace(paths, option=option, model_option=sized, scheduler_option={}, cutout=min(1, s.cutout))
    )


DIFFERENT = {unlike(recipes.get(name)): name for name in reversed(recipes.list_recipes())}


@pytest.mark.parametrize("name", DIFFERENT.values())
def test_it_trains(name):
    recipe = thin(recipes.get(name))
    run = recipe.build(noise(recipe.settings.data), progress=False, fast_dev_run=2)
    before = [p.clone() for p in run.trainer.model.parameters()]
    row = run.fit()[-1]
    s = recipe.settings
    depth = s.option["depth"] if s.method == "auglocal" else 0
    assert len(run.trainer.model.blocks) == s.blocks - depth and run.trainer.seen == 2
    assert all(torch.isfinite(torch.tensor(value)) for key, value in row.items() if key.startswith("loss"))
    assert all(torch.isfinite(p).all() for p in run.trainer.model.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(before, run.trainer.model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    lr = run.trainer.engine.optimizer.defaults["lr"]
    assert lr == s.lr and len(run.trainer.engine.optimizer.param_groups) == len(run.trainer.model.blocks)


@pytest.mark.parametrize("name", ["auglocal-cifar10-r32", "predsim-cifar10-vgg8b-pred"])
def test_it_trains_at_full_size(name):
    recipe = recipes.get(name).with_(batch_size=2)
    assert recipe.build(noise("cifar10"), progress=False, fast_dev_run=1).fit()[-1]["loss"] > 0


# Millions of parameters that the authors of local-loss state.
PARAMETERS = {
    "predsim-mnist-vgg8b": 7.3, "predsim-fashion-mnist-vgg8b": 7.3, "predsim-fashion-mnist-vgg8b-x2": 28.2,
    "predsim-cifar10-vgg8b": 8.9, "predsim-cifar10-vgg11b": 11.6, "predsim-cifar10-vgg11b-x2": 42.0,
    "predsim-cifar10-vgg11b-x3": 91.3, "predsim-cifar100-vgg8b": 9.0, "predsim-cifar100-vgg11b": 11.7,
    "predsim-cifar100-vgg11b-x2": 42.1, "predsim-cifar100-vgg11b-x3": 91.4, "predsim-svhn-vgg8b": 8.9,
    "predsim-stl10-vgg8b": 11.5,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_stated_size(name):
    s = recipes.get(name).settings
    channels, size, classes = SHAPES[s.data]
    with torch.device("meta"):
        net = models.create(s.model, num_classes=classes, in_channels=channels, img_size=size, **s.model_option)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.051)


# --------------------------------------------------------------------------------------------------- the papers' numbers

# epochs, batch, learning rate, weight decay, momentum, Nesterov, crop, flip, scheduler
AUGLOCAL = {
    "cifar10": (400, 1024, 0.8, 1e-4, 0.9, True, 4, True, "auglocal"),
    "svhn": (400, 1024, 0.8, 1e-4, 0.9, True, 2, False, "auglocal"),
    "stl10": (400, 128, 0.1, 1e-4, 0.9, True, 4, True, "auglocal"),
}
INFOPRO = {data: (160, *row[1:-1], "infopro") for data, row in AUGLOCAL.items()}
# K: lambda 1 and 2 of the first and the last head, test error in percent
INFOPRO_ROWS = {
    ("cifar10", "r32"): {2: (5, 1, 0, 0, 7.76), 4: (6, 0, 1, 2, 8.58), 8: (5, 0, 0, 2, 11.13), 16: (5, 0.05, 0.2, 0.5, 12.75)},
    ("cifar10", "r110"): {2: (5, 0.5, 0, 0, 6.42), 4: (1, 0, 0, 1, 7.30), 8: (5, 0, 0, 1, 8.93), 16: (5, 0, 0.5, 1, 9.90)},
    ("svhn", "r110"): {2: (1, 0.1, 0, 0, 3.15), 4: (5, 0, 0.5, 1, 3.28), 8: (5, 0, 0.5, 2, 3.62), 16: (5, 0.2, 0.5, 1, 3.91)},
    ("stl10", "r110"): {
        2: (10, 1, 0, 0, 20.99), 4: (20, 0.2, 5, 2, 22.73), 8: (20, 0.2, 5, 1, 25.15), 16: (20, 0.5, 10, 0.1, 26.27),
    },
}  # fmt: skip
BALANCED_ROWS = {
    "cifar10": {2: (5, 0.1, 0, 0, 6.41), 3: (5, 0, 5, 0.1, 6.74), 4: (5, 0, 5, 0.1, 6.93)},
    "stl10": {2: (20, 1, 0, 0, 20.95), 3: (20, 0.5, 5, 2, 21.00), 4: (20, 0.5, 10, 1, 21.22)},
}
END_TO_END = {("cifar10", "r32"): 7.37, ("cifar10", "r110"): 6.50, ("svhn", "r110"): 3.07, ("stl10", "r110"): 22.27}
# epochs, first milestone, dropout, rate, features of the prediction loss, errors: BP, pred, sim, predsim, [cutout, its side]
LOCAL_LOSS = {
    "mnist-vgg8b": (100, 50, 0.2, 5e-4, 1024, 0.26, 0.40, 0.65, 0.31, 0.26, 14),
    "fashion-mnist-vgg8b": (200, 100, 0.1, 5e-4, 1024, 4.53, 5.66, 5.12, 4.65),
    "fashion-mnist-vgg8b-x2": (200, 100, 0.2, 3e-4, 4096, 4.55, 5.11, 4.92, 4.33, 4.14, 14),
    "cifar10-vgg8b": (400, 200, 0.2, 5e-4, 2048, 5.99, 8.40, 7.16, 5.58),
    "cifar10-vgg11b": (400, 200, 0.2, 5e-4, 2048, 5.56, 8.39, 6.70, 5.30),
    "cifar10-vgg11b-x2": (400, 200, 0.25, 3e-4, 4096, 4.91, 7.30, 6.66, 4.42),
    "cifar10-vgg11b-x3": (400, 200, 0.3, 3e-4, 4096, 5.02, 7.37, 9.34, 3.97, 3.60, 16),
    "cifar100-vgg8b": (400, 200, 0.05, 5e-4, 4096, 26.24, 29.32, 32.64, 24.07),
    "cifar100-vgg11b": (400, 200, 0.05, 5e-4, 4096, 25.18, 29.58, 30.82, 24.05),
    "cifar100-vgg11b-x2": (400, 200, 0.1, 3e-4, 4096, 23.44, 26.91, 28.03, 21.20),
    "cifar100-vgg11b-x3": (400, 200, 0.15, 3e-4, 4096, 23.69, 25.90, 28.01, 20.13),
    "svhn-vgg8b": (100, 50, 0.3, 3e-4, 2048, 2.29, 2.12, 1.89, 1.74, 1.65, 16),
    "stl10-vgg8b": (400, 200, 0.1, 5e-4, 2048, 33.08, 26.83, 23.15, 20.51, 19.25, 48),
}


def family(name: str) -> tuple:
    s = recipes.get(name).settings
    assert (
        s.optimizer == "sgd" and s.decay_all and s.model == {"r32": "resnet32", "r110": "resnet110"}[name.split("-")[2]]
    )
    assert s.mean == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255] if s.data == "cifar10" else [0.5] * 3)
    assert s.std == pytest.approx([63.0 / 255, 62.1 / 255, 66.7 / 255] if s.data == "cifar10" else [0.5] * 3)
    return s.epochs, s.batch_size, s.lr, s.weight_decay, s.momentum, s.nesterov, s.crop, s.flip, s.scheduler


def test_numbers_of_auglocal():
    for data, row in AUGLOCAL.items():
        for net, depth, blocks in (("r32", 2, 16), ("r110", 3, 55)):
            name = f"auglocal-{data}-{net}"
            s = recipes.get(name).settings
            assert family(name) == family(f"{name}-bp") == row and s.seed == 1234 and s.blocks == blocks
            assert s.option == {"depth": depth, "pyramid": True, "pyramid_coeff": 0.5}


def test_numbers_of_infopro():
    rows = [(f"{data}-{net}-k{k}", r) for (data, net), many in INFOPRO_ROWS.items() for k, r in many.items()]
    rows += [(f"{data}-r110-k{k}-balanced", r) for data, many in BALANCED_ROWS.items() for k, r in many.items()]
    for name, (*lam, error) in rows:
        recipe = recipes.get(f"infopro-{name}")
        data, _, blocks, *balanced = name.split("-")
        assert family(recipe.name) == INFOPRO[data] and recipe.claim == pytest.approx(100 - error)
        option = recipe.settings.option
        assert list(option["lam"]) == lam and option["dataset"] == data and f"k{recipe.settings.blocks}" == blocks
        assert option.get("balanced_memory", False) is bool(balanced)
        assert (option["config"], option["loss"], option["feature_dim"]) == ("1c2f", "contrast", 128)
    for (data, net), error in END_TO_END.items():
        recipe = recipes.get(f"infopro-{data}-{net}-bp")
        assert family(recipe.name) == INFOPRO[data] and recipe.claim == pytest.approx(100 - error)


def test_numbers_of_dgl():
    s = recipes.get("dgl-cifar10").settings
    found = (s.epochs, s.batch_size, s.lr, s.weight_decay, s.momentum, s.nesterov, s.crop, s.flip, s.scheduler, s.seed)
    assert found == (50, 128, 0.1, 5e-4, 0.9, False, 4, True, "dgl", 1) and s.decay_all
    assert s.mean == (0.4914, 0.4822, 0.4465) and s.std == (0.2023, 0.1994, 0.2010) and s.blocks == 6


@pytest.mark.parametrize("row", LOCAL_LOSS)
def test_numbers_of_local_loss(row):
    epochs, first, dropout, lr, features, *errors = LOCAL_LOSS[row]
    for suffix, error in zip(("-bp", "-pred", "-sim", "", "-cutout"), errors, strict=False):
        recipe = recipes.get(f"predsim-{row}{suffix}")
        s = recipe.settings
        assert (s.epochs, s.lr, s.batch_size, s.optimizer, s.weight_decay, s.seed) == (epochs, lr, 128, "adam", 0, 1)
        assert s.scheduler_option["milestones"][0] == first and s.scheduler_option["decay_rate"] == 0.25
        assert s.cutout == (errors[5] if suffix == "-cutout" else 0) and recipe.claim == pytest.approx(100 - error)
        other = {"svhn-vgg8b-cutout": 0.15}.get(row + suffix, dropout)
        leaky = "leakyrelu" if suffix in ("-sim", "", "-cutout") else "relu"
        assert (s.model_option["dropout"], s.model_option["nonlin"]) == (other, leaky)
        assert s.model_option["feat_mult"] == (int(row[-1]) if row[-2] == "x" else 1)
        if suffix == "-bp":
            assert (s.method, s.blocks) == ("bp", 1)
        else:
            assert s.option["losses"] == (suffix[1:] if suffix in ("-pred", "-sim") else "predsim")
            assert s.option.get("dim_in_decoder", features) == features and ("dim_in_decoder" in s.option) == (
                suffix != "-sim"
            )


# -------------------------------------------------------------------------------------------------------------- its use


def test_every_recipe_can_be_typed_as_flags():
    for name in recipes.list_recipes():
        recipe = recipes.get(name)
        flags = recipe.explain().splitlines()[-1].removeprefix("fastlocal train ").split()
        for typed in (flags, ["--recipe", name]):
            parsed = cli._parser().parse_args(["train", *typed])
            assert cli._settings(parsed) == recipe.settings, name


def test_flags_win(capsys):
    parsed = cli._parser().parse_args(
        [
            "train",
            "--recipe",
            "auglocal-cifar10-r32",
            "--epochs",
            "3",
            "--option",
            "depth=4",
            "--no-flip",
            "--root",
            "here",
        ]
    )
    found, recipe = cli._settings(parsed), recipes.get("auglocal-cifar10-r32").settings
    assert (
        found.option == {"depth": 4, "pyramid": True, "pyramid_coeff": 0.5} and not found.flip and found.root == "here"
    )
    assert dataclasses.replace(found, epochs=400, option=recipe.option, flip=True, root=None) == recipe
    assert cli.main(["train", "--recipe", "auglocal-cifar10-r32", "--root", "nowhere"]) == 2
    assert "the files of 'cifar10' are not all in 'nowhere'" in capsys.readouterr().err


def test_with_drops_what_belonged_to_what_is_replaced():
    recipe = recipes.get("auglocal-cifar10-r32")
    found = recipe.with_(method="bp", optimizer="adamw", scheduler="cosine", data="digits").settings
    assert (found.option, found.blocks, found.lr, found.weight_decay, found.mean) == ({}, None, None, None, None)
    assert recipe.with_(method="auglocal", epochs=1).settings.option == recipe.settings.option
    assert recipe.settings.epochs == 400 and recipe.source.endswith("github.com/ChenxiangMA/AugLocal")
    for change, message in (({"epoch": 1}, r'Did you mean "epochs"'), ({"epochs": 0}, r"^epochs: got 0")):
        with pytest.raises(ArgumentError, match=message):
            recipe.with_(**change)
    with pytest.raises(ArgumentError, match=r"^recipe: there is no 'auglocal'"):
        recipes.get("auglocal")
    assert sum(map(len, recipes.by_paper().values())) == len(recipes.list_recipes())
