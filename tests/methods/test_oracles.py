"""Every method against the official implementation's numbers, through a plain loop that uses the heads alone."""

import pytest
import torch

from tests.methods.oracles import CASCADES, CASES, FULL_SIZE, check, load, plain_localize, plain_step


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*FULL_SIZE, *CASCADES)])
def test_heads_reproduce_the_official_numbers(name):
    worst = check(name, plain_localize, plain_step)
    assert {"loss", "term", "logits", "gradient", "parameter norm", "parameter sum", "eval logits"} <= set(worst)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("infopro_resnet32_K4_contrast", {"temperature": 0.07000001}),
        ("infopro_resnet32_K4_contrast", {"mean": (0.4914, 0.4824, 0.4466)}),
        ("auglocalrepo_predsim_resnet32_K16", {"beta": 0.9900001}),
        ("auglocal_resnet32_K16_d3", {"pyramid": False}),
    ],
)
def test_a_slightly_wrong_recipe_is_noticed(name, change):
    def wrong(net, method, **options):
        return plain_localize(net, method, **{**options, **change})

    with pytest.raises(AssertionError):
        check(name, wrong, plain_step)


def test_a_slightly_wrong_step_is_noticed():
    def wrong(model, optimizer):
        def twice(params):
            opt = optimizer(params)
            for group in opt.param_groups:
                group["weight_decay"] *= 1.001
            return opt

        return plain_step(model, twice)

    with pytest.raises(AssertionError, match=r"parameter (norm|sum)"):
        check("dglrepo_cnn_mlpsr_f16", plain_localize, wrong)


def test_paper_mode_leaves_the_output_layer_of_predsim_at_full_weight():
    def paper(net, method, *, mode, **options):
        return plain_localize(net, method, mode="paper", **options)

    with pytest.raises(AssertionError, match="block 7"):
        check("localloss_predsim_vgg8b_small", paper, plain_step)


def test_files_say_where_they_come_from():
    for name in CASES:
        oracle = load(name)
        assert oracle["source"]["repository"].count("/") == 1
        assert len(oracle["source"]["commit"]) == 40
        assert oracle["environment"]["threads"] == 1
        assert torch.tensor(oracle["eval"]["logits"]).isfinite().all()
