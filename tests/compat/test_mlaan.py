"""MLAAN's networks against the official code's numbers, by the official names alone."""

from fastlocal.compat import mlaan
from tests.compat.official import arguments, check_compat
from tests.methods.oracles import load


def test_oracle():
    oracle = load("mlaan_resnet32_K15")
    worst = check_compat("mlaan_resnet32_K15", lambda: mlaan.resnet32(**arguments(oracle)))
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)
