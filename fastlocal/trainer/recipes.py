"""Settings of published experiments, by name, with where every number comes from and what the paper claims.

Numbers are those of the authors' code, which is named in ``Recipe.source``; claims are not reproduced here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastlocal.data import Images
from fastlocal.errors import ArgumentError, did_you_mean
from fastlocal.trainer.settings import Run, Settings, build

AUGLOCAL = "AugLocal: Ma, Wu, Si, Tan, ICLR 2024, arXiv 2402.17318"
INFOPRO = "InfoPro: Wang et al., ICLR 2021, arXiv 2101.10832"
DGL = "DGL: Belilovsky, Eickenberg, Oyallon, ICML 2020, arXiv 1901.08164"
PREDSIM = "PredSim: Nøkland, Eidnes, ICML 2019, arXiv 1901.06656"
_SOURCES = {
    AUGLOCAL: "train.py, run.sh and README of github.com/ChenxiangMA/AugLocal",
    INFOPRO: "train.py and comand.sh of github.com/blackfeather-wang/InfoPro-Pytorch, Experiments on CIFAR-SVHN-STL10",
    DGL: "auxiliary_nets_study/cifar_dgl.py of github.com/eugenium/DGL",
    PREDSIM: "train.py, run_experiments.sh and README of github.com/anokland/local-loss",
}

# What these authors do and fastlocal does not.
CLASSES_100 = "the output layer there has 100 classes, by a slip of the pen ('sl10'); here 10"
EXTRA = "trained there on the sets train and extra; here on train (give both in one .npz as --data for the same)"
FEW_CLASSES = "in the first 200 epochs each batch there is drawn from 20 classes; here from all"


@dataclass(frozen=True)
class Recipe:
    """One published experiment.

    Attributes:
        name: such as "auglocal-cifar10-r32".
        settings: everything that decides the run; see `Settings`.
        paper: authors, year, number in arXiv.
        claim: test accuracy in percent that the paper or its repository states, or None where none is known to us.
        differs: what is not as in the authors' code.
    """

    name: str
    settings: Settings
    paper: str
    claim: float | None = None
    differs: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The files that its numbers are from."""
        return _SOURCES[self.paper]

    def with_(self, **changes: Any) -> Recipe:
        """The same with other settings, such as ``epochs=20``. Raises ArgumentError; see `Settings.with_`."""
        return dataclasses.replace(self, settings=self.settings.with_(**changes))

    def build(self, images: Images | None = None, **options: Any) -> Run:
        """Trainer and data, of ``images`` or of the recipe's own set; ``options`` as for `fastlocal.trainer.settings.build`."""
        return build(self.settings, images, **options)

    def claim_text(self) -> str:
        """The claim, for a table."""
        return "no number known to us" if self.claim is None else f"paper: {self.claim:.2f} %"

    def explain(self) -> str:
        """Name, paper, source, claim, differences and the flags that give the same."""
        lines = [
            self.name,
            self.paper,
            f"numbers of {self.source}",
            f"{self.claim_text()} (a claim, not reproduced here)",
        ]
        lines += [f"differs: {text}" for text in self.differs]
        return "\n".join([*lines, f"fastlocal train {' '.join(_flags(self.settings))}"])


def get(name: str) -> Recipe:
    """The recipe of that name. Raises ArgumentError where there is none."""
    if name not in _RECIPES:
        raise ArgumentError(f"recipe: there is no {name!r}. {did_you_mean(name, _RECIPES)}")
    return _RECIPES[name]


def list_recipes() -> list[str]:
    """All names."""
    return list(_RECIPES)


def by_paper() -> dict[str, list[Recipe]]:
    """All recipes under their papers."""
    found: dict[str, list[Recipe]] = {}
    for recipe in _RECIPES.values():
        found.setdefault(recipe.paper, []).append(recipe)
    return found


def _flags(settings: Settings) -> list[str]:
    flags = []
    for name, value in settings.changed().items():
        flag = f"--{name.replace('_', '-')}"
        if name == "decay_all":
            flags.append("--no-decay")
        elif isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            flags += [f"{flag} {key}={_text(part)}" for key, part in value.items()]
        else:
            flags.append(f"{flag} {_text(value)}")
    return flags


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ------------------------------------------------------------------------------------------------ AugLocal and InfoPro

_CIFAR10: dict[str, Any] = {
    "data": "cifar10", "crop": 4, "flip": True, "batch_size": 1024, "lr": 0.8,
    "mean": tuple(x / 255 for x in (125.3, 123.0, 113.9)), "std": tuple(x / 255 for x in (63.0, 62.1, 66.7)),
}  # fmt: skip
_GREY: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_SVHN: dict[str, Any] = {"data": "svhn", "crop": 2, "border": "black", "batch_size": 1024, "lr": 0.8, **_GREY}
_STL10: dict[str, Any] = {
    "data": "stl10",
    "crop": 4,
    "border": "black",
    "flip": True,
    "batch_size": 128,
    "lr": 0.1,
    **_GREY,
}
_FAMILY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "cifar10": (_CIFAR10, ()),
    "svhn": (_SVHN, ()),
    "stl10": (_STL10, (CLASSES_100,)),
}  # of the code that InfoPro and AugLocal share
_NETS = {"r32": ("resnet32", 16), "r110": ("resnet110", 55)}


def _family(
    paper: str, name: str, data: str, net: str, claim: float | None, *, epochs: int, scheduler: str, **more: Any
) -> Recipe:
    base, differs = _FAMILY[data]
    model, _ = _NETS[net]
    settings = Settings(
        model=model, epochs=epochs, scheduler=scheduler, optimizer="sgd", momentum=0.9, nesterov=True, weight_decay=1e-4,
        **base, **more,
    )  # fmt: skip
    return Recipe(name, settings, paper, claim, differs)


def _auglocal() -> list[Recipe]:
    found = []
    seed: dict[str, Any] = {"epochs": 400, "scheduler": "auglocal", "seed": 1234}
    for data in _FAMILY:
        for net, depth in (("r32", 2), ("r110", 3)):
            blocks = _NETS[net][1]
            option = {"depth": depth, "pyramid": True, "pyramid_coeff": 0.5}
            name = f"auglocal-{data}-{net}"
            found.append(
                _family(AUGLOCAL, name, data, net, None, method="auglocal", option=option, blocks=blocks, **seed)
            )
            found.append(_family(AUGLOCAL, f"{name}-bp", data, net, None, method="bp", blocks=1, **seed))
    return found


# (net, data): accuracy of K = 2, 4, 8, 16 blocks, and of end-to-end training; in percent
_INFOPRO = {
    ("r32", "cifar10"): ((92.24, 91.42, 88.87, 87.25), 92.63),
    ("r110", "cifar10"): ((93.58, 92.70, 91.07, 90.10), 93.50),
    ("r110", "svhn"): ((96.85, 96.72, 96.38, 96.09), 96.93),
    ("r110", "stl10"): ((79.01, 77.27, 74.85, 73.73), 77.73),
}
# lambda 1 and 2 at the first and the last head
_LAMBDAS: dict[tuple[str, str], tuple[tuple[float, ...], ...]] = {
    ("r32", "cifar10"): ((5, 1, 0, 0), (6, 0, 1, 2), (5, 0, 0, 2), (5, 0.05, 0.2, 0.5)),
    ("r110", "cifar10"): ((5, 0.5, 0, 0), (1, 0, 0, 1), (5, 0, 0, 1), (5, 0, 0.5, 1)),
    ("r110", "svhn"): ((1, 0.1, 0, 0), (5, 0, 0.5, 1), (5, 0, 0.5, 2), (5, 0.2, 0.5, 1)),
    ("r110", "stl10"): ((10, 1, 0, 0), (20, 0.2, 5, 2), (20, 0.2, 5, 1), (20, 0.5, 10, 0.1)),
}
# InfoPro*: cut where the blocks take equal memory. K: lambdas, accuracy
_BALANCED: dict[str, dict[int, tuple[tuple[float, ...], float]]] = {
    "cifar10": {2: ((5, 0.1, 0, 0), 93.59), 3: ((5, 0, 5, 0.1), 93.26), 4: ((5, 0, 5, 0.1), 93.07)},
    "stl10": {2: ((20, 1, 0, 0), 79.05), 3: ((20, 0.5, 5, 2), 79.00), 4: ((20, 0.5, 10, 1), 78.78)},
}


def _infopro() -> list[Recipe]:
    found = []
    own: dict[str, Any] = {"epochs": 160, "scheduler": "infopro"}
    for (net, data), (claims, end_to_end) in _INFOPRO.items():
        name = f"infopro-{data}-{net}"
        for blocks, lam, claim in zip((2, 4, 8, 16), _LAMBDAS[net, data], claims, strict=True):
            option = _heads(data, lam)
            found.append(
                _family(
                    INFOPRO,
                    f"{name}-k{blocks}",
                    data,
                    net,
                    claim,
                    method="infopro",
                    option=option,
                    blocks=blocks,
                    **own,
                )
            )
        if net == "r110":
            for blocks, (lam, claim) in _BALANCED.get(data, {}).items():
                option = _heads(data, lam) | {"balanced_memory": True}
                label = f"{name}-k{blocks}-balanced"
                found.append(
                    _family(INFOPRO, label, data, net, claim, method="infopro", option=option, blocks=blocks, **own)
                )
        found.append(_family(INFOPRO, f"{name}-bp", data, net, end_to_end, method="bp", blocks=1, **own))
    return found


def _heads(data: str, lam: tuple[float, ...]) -> dict[str, Any]:
    return {"lam": lam, "dataset": data, "config": "1c2f", "loss": "contrast", "widen": 1.0, "feature_dim": 128}


# ----------------------------------------------------------------------------------------------------------------- DGL


def _dgl() -> list[Recipe]:
    settings = Settings(
        data="cifar10", crop=4, border="black", flip=True, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), batch_size=128,
        model="dgl_cnn", method="dgl", option={"head": "dgl"}, blocks=6,
        epochs=50, optimizer="sgd", lr=0.1, momentum=0.9, nesterov=False, weight_decay=5e-4, scheduler="dgl", seed=1,
    )  # fmt: skip
    return [Recipe("dgl-cifar10", settings, DGL, None, ())]


# ------------------------------------------------------------------------------------------------------------- PredSim

# crop, flip, mean, std, epochs, differences
_LOCAL_LOSS: dict[str, tuple[int, bool, tuple[float, ...], tuple[float, ...], int, tuple[str, ...]]] = {
    "mnist": (2, False, (0.1307,), (0.3081,), 100, ()),
    "fashion_mnist": (2, True, (0.286,), (0.353,), 200, ()),
    "cifar10": (4, True, (0.424, 0.415, 0.384), (0.283, 0.278, 0.284), 400, ()),
    "cifar100": (4, True, (0.438, 0.418, 0.377), (0.300, 0.287, 0.294), 400, (FEW_CLASSES,)),
    "svhn": (0, False, (0.431, 0.430, 0.446), (0.197, 0.198, 0.199), 100, (EXTRA,)),
    "stl10": (0, False, (0.447, 0.440, 0.407), (0.260, 0.257, 0.271), 400, ()),
}
_MILESTONES = {100: (50, 75, 89, 94), 200: (100, 150, 175, 188), 400: (200, 300, 350, 375)}
# net, factor of its width, data: dropout, rate, dim_in_decoder, test errors of bp, pred, sim, predsim in percent
_VGG: dict[tuple[str, int, str], tuple[float, float, int, tuple[float, float, float, float]]] = {
    ("vgg8b", 1, "mnist"): (0.2, 5e-4, 1024, (0.26, 0.40, 0.65, 0.31)),
    ("vgg8b", 1, "fashion_mnist"): (0.1, 5e-4, 1024, (4.53, 5.66, 5.12, 4.65)),
    ("vgg8b", 2, "fashion_mnist"): (0.2, 3e-4, 4096, (4.55, 5.11, 4.92, 4.33)),
    ("vgg8b", 1, "cifar10"): (0.2, 5e-4, 2048, (5.99, 8.40, 7.16, 5.58)),
    ("vgg11b", 1, "cifar10"): (0.2, 5e-4, 2048, (5.56, 8.39, 6.70, 5.30)),
    ("vgg11b", 2, "cifar10"): (0.25, 3e-4, 4096, (4.91, 7.30, 6.66, 4.42)),
    ("vgg11b", 3, "cifar10"): (0.3, 3e-4, 4096, (5.02, 7.37, 9.34, 3.97)),
    ("vgg8b", 1, "cifar100"): (0.05, 5e-4, 4096, (26.24, 29.32, 32.64, 24.07)),
    ("vgg11b", 1, "cifar100"): (0.05, 5e-4, 4096, (25.18, 29.58, 30.82, 24.05)),
    ("vgg11b", 2, "cifar100"): (0.1, 3e-4, 4096, (23.44, 26.91, 28.03, 21.20)),
    ("vgg11b", 3, "cifar100"): (0.15, 3e-4, 4096, (23.69, 25.90, 28.01, 20.13)),
    ("vgg8b", 1, "svhn"): (0.3, 3e-4, 2048, (2.29, 2.12, 1.89, 1.74)),
    ("vgg8b", 1, "stl10"): (0.1, 5e-4, 2048, (33.08, 26.83, 23.15, 20.51)),
}
# the same with cutout: side of the square, dropout, test error of predsim
_CUTOUT: dict[tuple[str, int, str], tuple[int, float, float]] = {
    ("vgg8b", 1, "mnist"): (14, 0.2, 0.26),
    ("vgg8b", 2, "fashion_mnist"): (14, 0.2, 4.14),
    ("vgg11b", 3, "cifar10"): (16, 0.3, 3.60),
    ("vgg8b", 1, "svhn"): (16, 0.15, 1.65),
    ("vgg8b", 1, "stl10"): (48, 0.1, 19.25),
}


def _predsim() -> list[Recipe]:
    found = []
    for (net, width, data), (dropout, lr, decoder, errors) in _VGG.items():
        crop, flip, mean, std, epochs, differs = _LOCAL_LOSS[data]
        name = f"predsim-{data.replace('_', '-')}-{net}{f'-x{width}' * (width > 1)}"
        for losses, error in zip(("bp", "pred", "sim", "predsim"), errors, strict=True):
            similar = losses in ("sim", "predsim")  # with the similarity loss they use leaky ReLU
            heads: dict[str, Any] = {"method": "bp", "blocks": 1}
            if losses != "bp":
                option: dict[str, Any] = {"variant": "local-loss", "losses": losses, "beta": 0.99}
                if losses != "sim":
                    option["dim_in_decoder"] = decoder
                heads = {"method": "predsim", "option": option, "blocks": 8 if net == "vgg8b" else 11}
            settings = Settings(
                data=data, crop=crop, border="black", flip=flip, mean=mean, std=std, batch_size=128,
                model=net, model_option={
                    "feat_mult": float(width), "dropout": dropout, "nonlin": "leakyrelu" if similar else "relu",
                },
                epochs=epochs, optimizer="adam", lr=lr, weight_decay=0.0,
                scheduler="multistep", scheduler_option={"milestones": _MILESTONES[epochs], "decay_rate": 0.25}, seed=1,
                **heads,
            )  # fmt: skip
            left = tuple(text for text in differs if similar or text != FEW_CLASSES)
            suffix = "" if losses == "predsim" else f"-{losses}"
            found.append(Recipe(name + suffix, settings, PREDSIM, round(100 - error, 2), left))
        if (net, width, data) in _CUTOUT:
            side, dropout, error = _CUTOUT[net, width, data]
            cut = found[-1].settings.with_(cutout=side, model_option={"dropout": dropout})
            found.append(Recipe(f"{name}-cutout", cut, PREDSIM, round(100 - error, 2), differs))
    return found


_RECIPES = {recipe.name: recipe for recipe in (*_auglocal(), *_infopro(), *_dgl(), *_predsim())}
