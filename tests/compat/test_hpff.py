"""HPFF's networks against the official code's numbers, by the official names alone."""

from fastlocal.compat import hpff
from tests.compat.official import arguments, check_compat
from tests.methods.oracles import load


def test_oracle():
    oracle = load("hpff_infopro_resnet32_K16")

    def call(network, x, y):
        logits, same, loss = network(img=x, target=y, **oracle["loss_weights"])
        assert logits is same
        return logits, loss

    worst = check_compat("hpff_infopro_resnet32_K16", lambda: hpff.resnet32(**arguments(oracle)), call)
    assert {"loss", "logits", "gradient", "param norm", "param sum", "bn norm", "eval logits"} <= set(worst)
