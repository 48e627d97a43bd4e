"""Reconstruction of input features on transformers, and InfoPro-Transformer, which reconstructs the image."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models, reference
from fastlocal.blocks.heads import InfoProHead
from fastlocal.errors import ArgumentError
from fastlocal.methods.feature_reconstruction import FeatureHead, FeatureReconstruction, ToMap, _map_shape
from tests.methods.sites import run_head, site
from tests.methods.three_ways import in_bf16, never_waits

NORM = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def swin():
    return models.create(
        "swin_tiny",
        img_size=32,
        patch_size=2,
        window=4,
        dim=12,
        depths=(1, 1, 2, 1),
        heads=(2, 2, 4, 4),
        num_classes=10,
    )


def vit():
    return models.create("vit_tiny", img_size=32, patch_size=8, dim=24, depth=4, heads=3, num_classes=10)


NETS = {"swin": swin, "vit": vit}


def batch(rows=4):
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


def localized(net, blocks=4, **options):
    return fl.localize(NETS[net](), "feature_reconstruction", blocks=blocks, sample=batch(2)[0], **options)


def boundaries(model, x):
    """Input and output of every block, by the units of the network."""
    cuts, h = {block.name for block in model.blocks[:-1]}, x
    found = [model.backbone.units()[0][1](x)]  # what the first block's head reconstructs
    for name, unit in model.backbone.units():
        h = unit(h)
        if name in cuts:
            found.append(h)
    return [t.detach() for t in found]


# ---------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("decoder", ["conv", "linear", "transformer"])
@pytest.mark.parametrize("net", NETS)
def test_every_head_reconstructs_the_input_of_its_block(net, decoder):
    model = localized(net, decoder=decoder, lam=(3.0, 0.5))
    x, y = batch()
    seen = {}
    for k, head in enumerate(model.heads):
        assert isinstance(head, FeatureHead)
        head.register_forward_hook(lambda m, inputs, out, k=k: seen.update({k: out}))
    expected_maps = boundaries(model, x)
    state = copy.deepcopy(model.state_dict())
    model(x, y)
    model.load_state_dict(state)  # BatchNorm statistics
    for k, head in enumerate(model.heads):
        wanted, h = expected_maps[k], expected_maps[k + 1]
        if wanted.shape[1] % 2:  # a class token, at the front
            wanted = wanted[:, 1:]
        side = int(wanted.shape[1] ** 0.5)
        predicted = head.decoder(h)
        assert predicted.shape == (4, wanted.shape[2], side, side)
        loss = (predicted.flatten(2).transpose(1, 2) - wanted).square().mean()
        scores = head.task.classifier(h)
        terms = seen[k].terms
        torch.testing.assert_close(terms["reconstruction"][0], loss.detach())
        torch.testing.assert_close(terms["task"][0], F.cross_entropy(scores, y).detach())
        assert (terms["reconstruction"][1], terms["task"][1]) == (3.0, 0.5)
        torch.testing.assert_close(seen[k].loss, 3 * loss + 0.5 * F.cross_entropy(scores, y))
        assert seen[k].logits.shape == (4, 10)


@pytest.mark.parametrize("net", NETS)
def test_infopro_transformer_reconstructs_the_image(net):
    model = localized(net, reconstruct="image", lam=(2.0, 1.0))
    x, y = batch()
    outs = []
    for head in model.heads:
        assert isinstance(head, InfoProHead)
        head.register_forward_hook(lambda m, inputs, out: outs.append((inputs[0].detach(), out)))
    state = copy.deepcopy(model.state_dict())
    model(x, y)
    model.load_state_dict(state)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in NORM)
    image = (x * std + mean).clamp(0, 1)
    for head, (h, out) in zip(model.heads, outs, strict=True):
        logits = head.decoder(h)
        assert logits.shape == x.shape
        expected = F.binary_cross_entropy(logits.sigmoid(), image)
        torch.testing.assert_close(out.terms["reconstruction"][0], expected.detach(), rtol=1e-4, atol=1e-6)
        assert out.terms["reconstruction"][1] == 2.0


def test_the_first_block_can_reconstruct_the_image():
    model = localized("swin", first="image")
    assert isinstance(model.heads[0], InfoProHead) and isinstance(model.heads[1], FeatureHead)
    two = localized("swin", blocks=2)
    assert isinstance(two.heads[0], FeatureHead) and two.heads[0].embedding.of is two.backbone.patch_embed
    with pytest.raises(ArgumentError, match="first: the first block is the embedding alone"):
        localized("swin", blocks=["patch_embed"])


def test_no_gradient_leaves_through_the_target():
    """What a block is compared with trains nothing: the embedding gets its gradient by way of the block's output alone."""
    model = localized("swin", blocks=["layers.0.blocks.0", "layers.1.blocks.0"])
    x, y = batch()
    head, proj = model.heads[0], model.backbone.patch_embed.proj.weight
    target = head.embedding(x)
    assert not target.requires_grad and torch.equal(target, model.backbone.patch_embed(x))
    h = model.backbone.layers[0].blocks[0](model.backbone.patch_embed(x))
    wanted = ToMap()(target)
    loss = F.mse_loss(head.decoder(h), wanted) + F.cross_entropy(head.task.classifier(h), y)
    (expected,) = torch.autograd.grad(loss, [proj])
    model(x, y).loss.backward()
    torch.testing.assert_close(proj.grad, expected)


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("net", NETS)
def test_levels_are_equal_and_train(net, blocks):
    model = localized(net, blocks)
    a, b, end, spec = (copy.deepcopy(model) for _ in range(4))
    data = [batch(6)] * 4

    def make(p):
        return torch.optim.AdamW(p, lr=3e-3)

    optimizer, plain, losses = make(a.parameters()), make(spec.parameters()), []
    engines = [fl.Engine(b, make, backend="reference"), fl.Engine(end, make, backend="reference", update="end")]
    with fl.backend("reference"):
        for x, y in data:
            out = a(x, y)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.losses)
            assert all(torch.equal(engine.step(x, y).losses, out.losses) for engine in engines)
            assert torch.equal(torch.stack(reference.train_step(spec, (x, y), plain)), out.losses)
    for other in (b, end, spec):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in a.state_dict().items())
    assert (losses[-1] < losses[0]).all(), "every block learns the batch"
    twin = pickle.loads(pickle.dumps(a))
    own = twin.heads[0].embedding.of
    unit = twin.backbone.units()[0][1]
    assert own is unit or own.__self__ is twin.backbone
    assert torch.equal(twin.eval()(data[0][0]), a.eval()(data[0][0]))
    assert not any("embed" in name for name, _ in a.heads.named_parameters())


@pytest.mark.parametrize("reconstruct", ["features", "image"])
def test_no_step_waits_and_bf16_is_much_the_same(reconstruct):
    model = localized("swin", reconstruct=reconstruct)
    in_bf16(model, *batch())
    never_waits(model, *batch())


def test_fused_operators_give_the_same_numbers():
    model = localized("vit", reconstruct="features").double()
    x, y = batch()
    plain, fused = copy.deepcopy(model), copy.deepcopy(model)
    out = plain(x.double(), y)
    with fl.backend("aten"):
        other = fused(x.double(), y)
    torch.testing.assert_close(out.losses, other.losses, rtol=1e-9, atol=0)
    assert torch.equal(out.correct, other.correct)


# ------------------------------------------------------------------------------------------------- weights, shapes, errors


def head_at(index, blocks, **options):
    method = FeatureReconstruction(**options)
    where = site((16, 12), index=index, blocks=blocks, units=9, unit=index + 1, name=str(index))
    method.resolve([where] * (blocks - 1))
    return method.head(where), where


def test_weights_go_linearly_from_the_first_head_to_the_last():
    for index, expected in ((1, (3.0, 0.75)), (3, (1.0, 1.25))):
        head, _ = head_at(index, 5, lam=(4, 0.5, 1, 1.25) if index == 3 else (4, 0.625, 1, 1.0))
        assert (head.weight, head.task.weights[1]) == pytest.approx(expected)
    head, _ = head_at(1, 5, lam=(4, 0.5))
    assert (head.weight, head.task.weights[1]) == (4, 0.5)


@pytest.mark.parametrize("loss", ["cross_entropy", "contrast"])
@pytest.mark.parametrize(("config", "convs", "linears"), [("0c1f", 0, 1), ("1c2f", 1, 2), ("2c2f", 2, 2)])
def test_classifier_has_the_layers_its_name_says(config, convs, linears, loss):
    head, _ = head_at(1, 3, config=config, loss=loss, feature_dim=24)
    chain = head.task.classifier
    assert isinstance(chain[0], ToMap)
    assert sum(isinstance(m, nn.Conv2d) for m in chain) == convs
    assert [m.out_features for m in chain if isinstance(m, nn.Linear)][-1] == (24 if loss == "contrast" else 5)
    assert sum(isinstance(m, nn.Linear) for m in chain) == linears
    assert head.task.contrast == (loss == "contrast")


def test_classifier_doubles_the_width_until_the_last_stage():
    model = localized("swin")
    first = [next(m for m in head.task.classifier if isinstance(m, nn.Conv2d)) for head in model.heads]
    widths = [block.cost.boundary[1] for block in model.blocks[:-1]]
    for conv, width in zip(first, widths, strict=True):
        assert conv.out_channels == (2 * width if width < 96 else width)


def test_decoders():
    head, _ = head_at(1, 3)
    convs = [m for m in head.decoder if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [32, 12]
    head, where = head_at(1, 3, reconstruct="image")
    assert [m.out_channels for m in head.decoder if isinstance(m, nn.Conv2d)] == [12, 3]
    run_head(head, where)
    head, where = head_at(1, 3, reconstruct="image", decoder="linear")
    assert head.decoder[2].out_channels == 3 * 8 * 8 and isinstance(head.decoder[0], nn.LayerNorm)
    run_head(head, where)
    large = site((16, 12), index=1, blocks=3, input_shape=(3, 96, 96))
    method = FeatureReconstruction(reconstruct="image", dataset="imagenet")
    method.resolve([large, large])
    convs = [m.out_channels for m in method.head(large).decoder if isinstance(m, nn.Conv2d)]
    assert convs == [128, 32, 12, 3]


def test_maps():
    assert _map_shape((8, 4, 4), "m") == (8, 4) and _map_shape((16, 8), "m") == _map_shape((17, 8), "m") == (8, 4)
    x = torch.randn(2, 17, 8)
    assert torch.equal(ToMap()(x)[:, :, 1, 2], x[:, 1 + 4 + 2])
    assert torch.equal(ToMap()(x[:, 1:])[:, :, 1, 2], x[:, 1 + 4 + 2])
    maps = torch.randn(2, 8, 4, 4)
    assert ToMap()(maps) is maps
    for shape in ((18, 8), (8, 4, 5), (8,)):
        with pytest.raises(ArgumentError, match="needs maps, or tokens of a square grid"):
            _map_shape(shape, "m")


def test_networks_of_maps_take_the_image_first():
    net = models.create("resnet20", width=4)
    x = batch(2)[0]
    with pytest.raises(ArgumentError, match=r"first: ResNetCIFAR has maps.*use first='image'"):
        fl.localize(net, "feature_reconstruction", blocks=3, sample=x)
    model = fl.localize(net, "feature_reconstruction", blocks=3, sample=x, first="image")
    assert model(*batch()).losses.isfinite().all()
    with pytest.raises(ArgumentError, match="decoder: 'transformer' needs"):
        fl.localize(net, "feature_reconstruction", blocks=3, sample=x, first="image", decoder="transformer")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reconstruct": "x"}, "reconstruct: got 'x'"),
        ({"first": "x"}, "first: got 'x'"),
        ({"decoder": "x"}, "decoder: got 'x'"),
        ({"config": "x"}, "config: got 'x'"),
        ({"loss": "x"}, "loss: got 'x'"),
        ({"dataset": "x"}, "dataset: got 'x'"),
        ({"lam": (1.0, 0.0)}, "lam: got"),
        ({"lam": (1.0, 1.0, 1.0)}, "lam: got"),
        ({"std": (1.0, 0.0, 1.0)}, "std: got"),
        ({"feature_dim": 0}, "feature_dim: got 0"),
        ({"temperature": 0}, "temperature: got 0"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ArgumentError, match=match):
        FeatureReconstruction(**options)


def test_networks_that_do_not_fit_are_refused():
    method = FeatureReconstruction()
    for where in (site((6, 8), dense=True), site((8,)), site((16, 8), input_shape=(64,))):
        with pytest.raises(ArgumentError, match=r"is for images of one label.*use method='lopt' for language models"):
            method.head(where)
    grey = site((16, 8), index=1, input_shape=(1, 32, 32))
    with pytest.raises(ArgumentError, match="mean, std: the image has 1 channels"):
        FeatureReconstruction(reconstruct="image").head(grey)
    run_head(FeatureReconstruction(reconstruct="image", mean=[0.3], std=[0.4]).head(grey), grey)
    odd = site((25, 8), index=1)
    with pytest.raises(ArgumentError, match=r"decoder: 'linear' makes a whole number.*use decoder='conv'"):
        FeatureReconstruction(reconstruct="image", decoder="linear").head(odd)


# -------------------------------------------------------------------------------------------------------------- memory


def table_rows():
    """The table of docs/methods.md: network, cuts, and MiB with features, with the image and under backprop."""
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    body = text.split("| network | cuts after | features | image | backprop |\n")[1].split("\n\n")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in body.splitlines()[1:]]
    return [(net.strip("`"), re.findall(r"`([^`]+)`", cuts), *map(float, sizes)) for net, cuts, *sizes in cells]


# Without data, so in seconds; attention of ViTs saves other things there than on a CPU.
@pytest.mark.parametrize("row", [1, 3])
def test_saved_bytes_are_those_of_the_page(row):
    rows = table_rows()
    assert len(rows) == 8
    name, cuts, features, image, bp = rows[row]
    with torch.device("meta"):
        net, x = models.create(name, num_classes=10), torch.empty(2, 3, 224, 224)

    def peak(method, **options):
        model = fl.localize(net, method, sample=x, **options)
        return round(max(block.cost.saved_bytes for block in model.blocks) / 2**20, 1)

    assert peak("bp") == bp
    assert peak("feature_reconstruction", blocks=cuts) == features
    assert peak("feature_reconstruction", blocks=cuts, reconstruct="image") == image
    assert features < image < bp and rows[7][2] < rows[7][3] < rows[7][4]
