"""Every oracle of these repositories in float64, by the official names alone."""

import pytest

from fastlocal.compat import auglocal, infopro
from tests.compat.official import arguments, check_compat
from tests.methods.oracles import load

AUGLOCAL = (
    *(f"auglocal_resnet32_K16_d{d}" for d in (1, 2, 3)),
    *(f"auglocalrepo_{rule}_resnet32_K16" for rule in ("dgl", "predsim", "infoproce")),
)


@pytest.mark.parametrize("name", AUGLOCAL)
def test_auglocal(name):
    oracle = load(name)
    worst = check_compat(name, lambda: auglocal.resnet32(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)


@pytest.mark.parametrize("name", ["infopro_resnet32_K4_contrast", "infopro_resnet32_K16_contrast"])
def test_infopro(name):
    oracle = load(name)
    worst = check_compat(name, lambda: infopro.resnet32(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)
