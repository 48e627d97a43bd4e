import re

import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError

SMALL = {"dim": 8, "depths": (2, 2), "heads": (2, 4), "img_size": 32, "window": 4, "num_classes": 10}

# Parameter names of transformers (before and since its version 5) -> ours.
THEIR_NAMES = {
    r"^swin\.": "",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.norm": "patch_embed.norm",
    r"^encoder\.": "",
    r"attention\.(\w+\.)?(?=relative_position_bias_table)": "attn.",
    r"attention\.(self\.)?(query|key|value|q_proj|k_proj|v_proj)\.": "attn.qkv.",
    r"attention\.(output\.dense|o_proj)\.": "attn.proj.",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"(intermediate\.dense|mlp\.up_proj)": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
    r"^layernorm": "norm",
    r"^classifier": "head",
}


# The counts of torchvision's swin_t, swin_s and swin_b.
@pytest.mark.parametrize(
    ("name", "parameters", "units"),
    [("swin_tiny", 28_288_354, 16), ("swin_small", 49_606_258, 28), ("swin_base", 87_768_224, 28)],
)
def test_parameter_counts(name, parameters, units, count):
    with torch.device("meta"):
        net = models.create(name)
        logits = net(torch.empty(2, 3, 224, 224))
    assert count(net) == parameters and len(net.units()) == len(net.widths) == units
    assert logits.shape == (2, 1000)


def test_names_are_the_authors():
    block = ["norm1.weight", "norm1.bias", "attn.relative_position_bias_table", "attn.qkv.weight", "attn.qkv.bias"]
    block += ["attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias"]
    block += ["mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    assert list(models.swin_tiny(**{**SMALL, "depths": (1, 1)}).state_dict()) == [
        *(f"patch_embed.{name}" for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")),
        *(f"layers.0.blocks.0.{name}" for name in block),
        *(f"layers.0.downsample.{name}" for name in ("norm.weight", "norm.bias", "reduction.weight")),
        *(f"layers.1.blocks.0.{name}" for name in block),
        *(f"{name}.{kind}" for name in ("norm", "head") for kind in ("weight", "bias")),
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"img_size": 32, "window": 4},  # 8 and 4 tokens a side: shifted, then one window
        {"img_size": 48, "patch_size": 2, "window": 3, "depths": (2, 2, 2), "heads": (2, 2, 4)},  # 24, 12, 6
        {"window": 8, "depths": (2,), "heads": (2,)},  # one window covers the map: no shift
    ],
)
def test_equals_the_transformers_library(sizes):
    """The same weights in an independent implementation give the same logits."""
    transformers = pytest.importorskip("transformers")
    options = {**SMALL, **sizes}
    config = transformers.SwinConfig(
        image_size=options["img_size"],
        patch_size=options.get("patch_size", 4),
        embed_dim=8,
        depths=list(options["depths"]),
        num_heads=list(options["heads"]),
        window_size=options["window"],
        num_labels=10,
        drop_path_rate=0.0,
    )
    theirs = transformers.SwinForImageClassification(config).double().eval()
    net = models.swin_tiny(**options).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)  # norms and biases start equal and would hide a swap
    parts: dict[str, list[torch.Tensor]] = {}
    for name, p in theirs.named_parameters():
        for old, new in THEIR_NAMES.items():
            name = re.sub(old, new, name)
        parts.setdefault(name, []).append(p)
    state = {name: torch.cat(found) if ".qkv." in name else found[0] for name, found in parts.items()}
    net.load_state_dict(state)
    x = torch.randn(2, 3, options["img_size"], options["img_size"], dtype=torch.float64)
    torch.testing.assert_close(net(x), theirs(x).logits)


def test_shifted_windows_by_hand():
    """A token of a shifted block depends on the tokens of its window, and on no other."""
    net = models.swin_tiny(**SMALL)
    plain, shifted = net.layers[0].blocks  # 8x8 tokens, windows of 4x4
    for block, at, window in (
        (plain, (0, 0), {(r, c) for r in range(4) for c in range(4)}),
        (shifted, (0, 0), {(r, c) for r in range(2) for c in range(2)}),  # the corner: 2x2 are left of its window
        (shifted, (3, 3), {(r, c) for r in range(2, 6) for c in range(2, 6)}),
        (shifted, (0, 7), {(r, c) for r in range(2) for c in (6, 7)}),
        (shifted, (7, 4), {(r, c) for r in (6, 7) for c in range(2, 6)}),
    ):
        x = torch.randn(1, 64, 8, requires_grad=True)
        block(x)[0, 8 * at[0] + at[1]].sum().backward()
        seen = x.grad[0].abs().sum(1).view(8, 8) > 1e-12
        assert {(int(r), int(c)) for r, c in seen.nonzero()} == window


def test_relative_position_index():
    index = models.swin_tiny(**SMALL).layers[0].blocks[0].attn.relative_position_index.view(16, 16)
    for a in range(16):
        for b in range(16):
            rows, columns = a // 4 - b // 4 + 3, a % 4 - b % 4 + 3
            assert index[a, b] == 7 * rows + columns


def test_merging_takes_2x2_tokens():
    net = models.swin_tiny(**SMALL)
    x = torch.randn(2, 64, 8)
    out = net.layers[0].downsample(x)
    assert out.shape == (2, 16, 16)
    m, grid = net.layers[0].downsample, x.view(2, 8, 8, 8)
    four = torch.cat((grid[:, 2, 4], grid[:, 3, 4], grid[:, 2, 5], grid[:, 3, 5]), dim=1)
    torch.testing.assert_close(out[:, 1 * 4 + 2], m.reduction(m.norm(four)))


def test_initialisation():
    net = models.swin_tiny(num_classes=10, depths=(1,), heads=(3,), img_size=28)
    for m in net.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.06) and (m.bias == 0).all()
    table = net.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (169, 3) and table.std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_leaves_out_whole_branches():
    net = models.swin_tiny(**SMALL, drop_path=0.6)
    rates = [block.drop_path.rate if block.drop_path else 0.0 for stage in net.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
    drop, x = net.layers[1].blocks[1].drop_path, torch.ones(4000, 2, 3)
    out = drop(x)
    assert ((out == 0) | ((out - 1 / 0.4).abs() < 1e-6)).all() and (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(drop.eval()(x), x)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(net.train()(images), net(images))
    assert torch.equal(net.eval()(images), net(images))


def test_make_unit():
    net = models.swin_tiny(**SMALL, drop_path=0.2)
    for i, (name, fn) in enumerate(net.units()):
        unit = net.make_unit(i, 16, 1)  # at the second stage: 4x4 tokens
        x = torch.randn(2, 16, 16)
        assert unit(x).shape == x.shape and unit.drop_path is None and (unit.attn.qkv.bias == 0).all(), name
        early = net.make_unit(i, 8, 1)
        assert bool(early.shift) == (name.endswith("blocks.1")), name
        assert not isinstance(fn, type(unit)) or {id(p) for p in unit.parameters()}.isdisjoint(map(id, fn.parameters()))
    with pytest.raises(ArgumentError, match=r"in_channels must be the width of a stage, one of \[8, 16\], got 12"):
        net.make_unit(1, 12, 1)
    with pytest.raises(ArgumentError, match="stride must be 1"):
        net.make_unit(1, 8, 2)
    with pytest.raises(ArgumentError, match=r"x must hold 4x4 tokens for this block, got \(2, 64, 16\)"):
        unit(torch.randn(2, 64, 16))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 3}, "window must divide the map of every stage, got 3 for 8x8 tokens at stage 0; use 1 or"),
        ({"heads": (2,)}, "depths and heads must have one number per stage"),
        ({"heads": (3, 4)}, "heads must divide the width of a stage, got 3 for 8 at stage 0"),
        ({"img_size": 34}, "img_size must be a multiple of patch_size=4"),
        ({"depths": (1, 1, 1), "heads": (2, 2, 2), "img_size": 24, "window": 3}, "stage 2 would merge a map of 3x3"),
        ({"depths": (1, 0)}, "depths must be"),
        ({"window": 0}, "window must be"),
        ({"drop_path": 1.0}, "drop_path must be"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ArgumentError, match=match):
        models.create("swin_tiny", **{**SMALL, **options})


def test_images_of_another_size_are_refused():
    with pytest.raises(ArgumentError, match=r"x must hold images of img_size=32, got \(2, 3, 16, 16\)"):
        models.swin_tiny(**SMALL)(torch.randn(2, 3, 16, 16))
