import re

import pytest
import torch
from torch import nn

from fastlocal import models
from fastlocal.errors import ArgumentError

SMALL = {"dim": 24, "depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 10}

# Parameter names of transformers (before and since its version 5) -> ours.
THEIR_NAMES = {
    r"^vit\.(encoder\.)?": "",
    r"^embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"^embeddings\.position_embeddings": "pos_embed",
    r"^embeddings\.": "",
    r"^layers?\.": "blocks.",
    r"attention\.(attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.": "attn.qkv.",
    r"attention\.(output\.dense|o_proj)\.": "attn.proj.",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"intermediate\.dense": "mlp.fc1",
    r"(?<!attention\.)output\.dense": "mlp.fc2",
    r"^layernorm": "norm",
    r"^classifier": "head",
}


# The counts of timm's vit_{tiny,small,base,large}_patch16_224 and vit_huge_patch14_224.
@pytest.mark.parametrize(
    ("name", "parameters", "units"),
    [
        ("vit_tiny", 5_717_416, 13),
        ("vit_small", 22_050_664, 13),
        ("vit_base", 86_567_656, 13),
        ("vit_large", 304_326_632, 25),
        ("vit_huge", 632_045_800, 33),
    ],
)
def test_parameter_counts(name, parameters, units, count):
    with torch.device("meta"):
        net = models.create(name)
        logits = net(torch.empty(2, 3, 224, 224))
    assert count(net) == parameters and len(net.units()) == len(net.widths) == units
    assert logits.shape == (2, 1000)


def test_names_are_timms():
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    block += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    assert list(models.vit_tiny(**{**SMALL, "depth": 1}).state_dict()) == [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        *(f"blocks.0.{name}" for name in block),
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    ]


def test_embed_puts_the_class_token_first():
    net = models.vit_tiny(**SMALL)
    x = torch.randn(2, 3, 32, 32)
    h = net.embed(x)
    assert h.shape == (2, 17, 24)
    torch.testing.assert_close(h[:, 0], (net.cls_token + net.pos_embed[:, :1]).expand(2, -1, -1)[:, 0])
    patch = x[:, :, :8, 8:16].flatten(1)  # second patch of the first row
    by_hand = patch @ net.patch_embed.proj.weight.flatten(1).T + net.patch_embed.proj.bias + net.pos_embed[:, 2]
    torch.testing.assert_close(h[:, 2], by_hand)


def test_equals_the_transformers_library():
    """The same weights in an independent implementation give the same logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
        layer_norm_eps=1e-6,
    )
    theirs = transformers.ViTForImageClassification(config).double().eval()
    net = models.vit_tiny(**SMALL).double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)  # norms and biases start equal and would hide a swap
    state: dict[str, torch.Tensor] = {}
    for name, p in theirs.state_dict().items():
        for old, new in THEIR_NAMES.items():
            name = re.sub(old, new, name)
        state[name] = torch.cat((state[name], p)) if name in state else p  # query, key and value become one
    net.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x), theirs(x).logits)


def test_initialisation():
    net = models.vit_tiny(num_classes=10, depth=1)
    for m in net.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.06) and (m.bias == 0).all()
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.cls_token.abs().max() < 1e-5


def test_mean_pool_has_no_class_token():
    net = models.vit_tiny(**SMALL, pool="mean")
    assert net.cls_token is None and net.pos_embed.shape == (1, 16, 24)
    h = torch.randn(2, 16, 24)
    torch.testing.assert_close(net.readout(h), net.head(net.norm(h).mean(1)))


def test_positions_and_blocks_drop():
    net = models.vit_tiny(**SMALL, dropout=0.2)
    assert len([m for m in net.modules() if isinstance(m, nn.Dropout)]) == 1 + 2 * 2
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_images_of_another_size_are_refused():
    with pytest.raises(ArgumentError, match=r"x must hold images of img_size=32, got \(2, 3, 16, 16\)"):
        models.vit_tiny(**SMALL)(torch.randn(2, 3, 16, 16))


def test_make_unit():
    net = models.vit_tiny(**SMALL, dropout=0.1)
    unit = net.make_unit(1, 24, 1)
    assert unit(torch.randn(2, 5, 24)).shape == (2, 5, 24) and unit.attn.dropout is None
    assert (unit.attn.qkv.bias == 0).all()
    with pytest.raises(ArgumentError, match="in_channels must be 24, the width of the residual stream, got 32"):
        net.make_unit(1, 32, 1)
    with pytest.raises(ArgumentError, match="stride must be 1"):
        net.make_unit(1, 24, 2)
