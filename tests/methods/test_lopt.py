"""LoPT: heads, cuts, the summed form of the official code, and its numbers."""

import copy
import json
import math
import pickle
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models, reference
from fastlocal.blocks.losses import cross_entropy
from fastlocal.engine.clip import Clip
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.lopt import Embedding, LoPT
from tests.methods.sites import site
from tests.methods.three_ways import in_bf16, never_waits

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "lopt_llama.json").read_text())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gpt(**options):
    return models.create(
        "gpt", **{"vocab_size": 19, "block_size": 8, "n_layer": 5, "n_head": 2, "n_embd": 16, "tie": False, **options}
    )


def ids(rows=4, length=8, vocabulary=19):
    return torch.randint(vocabulary, (rows, length))


# ----------------------------------------------------------------------------------------------------------- the head


def test_head_layers_and_loss():
    where = site((6, 16), index=1, blocks=4, dense=True, input_shape=(6,))
    head = LoPT(lam=3.0).head(where)
    norm, down, act, up = head.net
    assert isinstance(norm, nn.LayerNorm) and isinstance(act, nn.GELU) and act.approximate == "none"
    assert (down.in_features, down.out_features, up.in_features, up.out_features) == (16, 4, 4, 16)
    bound = 0.1 * math.sqrt(6 / 20)
    assert down.weight.abs().max() <= bound and down.weight.abs().max() > 0.9 * bound
    assert (down.bias == 0).all() and (up.bias == 0).all() and head.embedding is None
    h, before = torch.randn(2, 6, 16, requires_grad=True), torch.randn(2, 6, 16, requires_grad=True)
    ctx = StepContext(torch.zeros(2, 6, dtype=torch.int64), None, cross_entropy, boundary=before.detach())
    local = head(h, ctx)
    expected = (up(F.gelu(down(norm(h)))) - before).square().mean()
    torch.testing.assert_close(local.loss, expected * 3.0 / 3)  # the mean over three heads
    assert local.terms["reconstruction"][1] == 1.0 and local.logits is None
    assert LoPT(reduction=100).head(where).net[1].out_features == 1


def test_loss_is_in_float32_at_least():
    where = site((6, 16), index=1, blocks=2, dense=True)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        head = LoPT().head(where).to(dtype)
        h = torch.randn(2, 6, 16, dtype=dtype, requires_grad=True)
        before = torch.randn(2, 6, 16, dtype=dtype)
        local = head(h, StepContext(torch.zeros(2), None, cross_entropy, boundary=before))
        assert local.loss.dtype == wide
        torch.testing.assert_close(local.terms["reconstruction"][0], F.mse_loss(head.net(h).to(wide), before.to(wide)))


@pytest.mark.parametrize(
    ("units", "blocks", "ends"),
    [(5, 2, [3]), (5, 4, [2, 3, 4]), (8, 4, [2, 4, 6]), (7, 3, [3, 5]), (4, 4, [1, 2, 3])],
)
def test_cuts_are_the_official_ranges(units, blocks, ends):
    names = [f"model.layers.{i}" for i in range(units)]
    assert [c + 1 for c in LoPT().cuts(blocks, names, nn.Identity())] == ends
    with_embedding = ["embed", *(f"h.{i}" for i in range(units))]
    assert LoPT().cuts(blocks, with_embedding, nn.Identity()) == ends  # one unit before the layers
    assert LoPT().cuts(1, names, nn.Identity()) is None


def test_embeddings_of_each_kind_of_network():
    net, x = gpt(dropout=0.5), ids()
    expected = net.wte(x) + net.wpe(torch.arange(8))
    assert torch.equal(Embedding(net)(x), expected) and not Embedding(net)(x).requires_grad
    vit = models.create("vit_tiny", img_size=16, patch_size=8, dim=12, depth=2, num_classes=3)
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(Embedding(vit)(image), vit.embed(image))
    assert Embedding(vit, (3, 16, 16)).shape == (5, 12)
    with pytest.raises(ArgumentError, match="Linear has no get_input_embeddings"):
        Embedding(nn.Linear(2, 2))


def test_bad_options_and_networks_are_refused():
    for options, match in (({"lam": -1}, "lam: got -1"), ({"reduction": 0}, "reduction: got 0")):
        with pytest.raises(ArgumentError, match=match):
            LoPT(**options)
    with pytest.raises(ArgumentError, match=r"'lopt' reconstructs tokens .*use method='feature_reconstruction'"):
        LoPT().head(site((8, 4, 4)))


# ------------------------------------------------------------------------------------------------- the step, both forms


def summed_step(model, x):
    """The official form: one forward through detached borders, one loss, one backward. By hand, from the parts."""
    net, count = model.backbone, len(model.blocks)
    h, aux, ends = net.embed(x), [], [int(b.name.split(".")[1]) + 1 for b in model.blocks]
    ends[-1], start = len(net.h), 0
    for k, end in enumerate(ends):
        before = h.detach()
        for layer in net.h[start:end]:
            h = layer(h)
        start = end
        if k < count - 1:
            aux.append(F.mse_loss(model.heads[k].net(h), before))
            h = h.detach()
    logits = net.lm_head(net.ln_f(h))
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    total = task + 10.0 * torch.stack(aux).mean()
    total.backward()
    return total.detach()


@pytest.mark.parametrize("blocks", [2, 4])
def test_gradients_equal_those_of_the_summed_loss(blocks):
    model = fl.localize(gpt().double(), "lopt", blocks=blocks, sample=ids(2))
    assert [b.name for b in model.blocks] == {2: ["h.2", "h.4"], 4: ["h.1", "h.2", "h.3", "h.4"]}[blocks]
    official, level_a, spec = (copy.deepcopy(model) for _ in range(3))
    x = ids()
    total = summed_step(official, x)
    out = level_a(x, x)
    out.loss.backward()
    losses = reference.train_step(spec, x, torch.optim.SGD(spec.parameters(), lr=0.0))
    for losses_of in (out.losses, torch.stack(losses)):
        torch.testing.assert_close(losses_of.sum(), total, rtol=1e-12, atol=0)
    grads = dict(official.named_parameters())
    assert all(p.grad is not None for p in grads.values())
    for ours in (level_a, spec):
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, grads[name].grad, rtol=1e-10, atol=1e-14, msg=name)


@pytest.mark.parametrize("update", ["immediate", "end"])
def test_levels_are_equal_and_copies_go_on(update):
    model = fl.localize(gpt(tie=True), "lopt", blocks=3, sample=ids(2), tied="untie")
    a, b, spec = (copy.deepcopy(model) for _ in range(3))
    data = [ids() for _ in range(4)]
    optimizer = torch.optim.AdamW(a.parameters(), lr=1e-2)
    plain = torch.optim.AdamW(spec.parameters(), lr=1e-2)
    engine = fl.Engine(b, lambda p: torch.optim.AdamW(p, lr=1e-2), backend="reference", update=update)
    for x in data:
        with fl.backend("reference"):
            out = a(x, x)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses = reference.train_step(spec, x, plain)
        assert torch.equal(engine.step(x, x).losses, out.losses) and torch.equal(torch.stack(losses), out.losses)
    for name, value in a.state_dict().items():
        assert torch.equal(b.state_dict()[name], value) and torch.equal(spec.state_dict()[name], value), name
    assert not torch.equal(a.backbone.wte.weight, model.backbone.wte.weight)
    # the embeddings that block 0's head reads are those of its own network
    twin = pickle.loads(pickle.dumps(a))
    with torch.no_grad():
        twin.backbone.wte.weight.add_(1.0)
    assert twin.heads[0].embedding.of is twin.backbone.wte and a.heads[0].embedding.of is a.backbone.wte
    assert len(list(a.heads[0].parameters())) == 6, "the embeddings are no part of the head"


def test_no_step_waits_and_bf16_is_much_the_same():
    x = ids()
    model = fl.localize(gpt(), "lopt", blocks=3, sample=x[:2])
    in_bf16(model, x, x)
    never_waits(model, x, x)


def test_block_0_reconstructs_the_embeddings_without_moving_them():
    model = fl.localize(gpt(), "lopt", blocks=2, sample=ids(2))
    x = ids()
    seen = {}
    model.heads[0].register_forward_hook(lambda m, inputs, out: seen.update(h=inputs[0], loss=out.loss))
    model(x, x)
    h, net = seen["h"].detach(), model.backbone
    target = (net.wte(x) + net.wpe(torch.arange(8))).detach()
    torch.testing.assert_close(seen["loss"], 10.0 * F.mse_loss(model.heads[0].net(h), target))


# -------------------------------------------------------------------------------------------------- the official numbers


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GOLDEN["config"])).double()


def official_name(name):
    if name.startswith("backbone."):
        return name.removeprefix("backbone.")
    _, k, rest = name.split(".", 2)
    return f"aux_decoders.{k}.{rest.removeprefix('net.')}"


def official_model(blocks):
    """Filled by names, as the official wrapper was."""
    sample = {"input_ids": ids(2, 9, 23)}
    model = fl.localize(llama(), "lopt", blocks=blocks, sample=sample, tied="untie")
    with torch.no_grad():
        for own, p in model.named_parameters():
            name = official_name(own)
            r = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=p.dtype)
            if p.dim() < 2:
                p.copy_(0.1 * r + (1.0 if name.endswith("weight") else 0.0))
            elif "embed" in name or "lm_head" in name:
                p.copy_(r * 0.3)
            else:
                p.copy_(r * 0.5 / math.sqrt(p.shape[1]))
    return model


def official_batch(step):
    g = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(23, (GOLDEN["rows"], GOLDEN["length"]), generator=g)
    lengths = torch.randint(5, GOLDEN["length"] + 1, (GOLDEN["rows"],), generator=g)
    mask = (torch.arange(GOLDEN["length"])[None] < lengths[:, None]).long()
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    # The official wrapper counts positions by the mask; what it reconstructs includes the padding.
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "labels": labels}


def adamw(params):
    options = dict(GOLDEN["optimizer"]["AdamW"])
    return torch.optim.AdamW(params, betas=tuple(options.pop("betas")), **options)


@pytest.mark.parametrize("level", ["a", "b"])
@pytest.mark.parametrize("blocks", [2, 4])
def test_official_numbers(blocks, level):
    case = GOLDEN["cases"][str(blocks)]
    model = official_model(blocks)
    assert [int(b.name.rpartition(".")[2]) + 1 for b in model.blocks[:-1]] == [end for _, end in case["ranges"][:-1]]
    optimizer = adamw(model.parameters()) if level == "a" else None
    clip = Clip(GOLDEN["clip"], scope="global")
    engine = None if level == "a" else fl.Engine(model, adamw, update="end", clip=clip, backend="reference")
    for k, expected in enumerate(case["steps"]):
        batch = official_batch(k)
        if engine is not None:
            losses = engine.step(batch).losses
        else:
            out = model(**batch)
            optimizer.zero_grad()
            out.loss.backward()
            losses = out.losses
            if k == 0:
                for name, p in model.named_parameters():
                    assert float(p.grad.norm()) == pytest.approx(
                        expected["gradients"][official_name(name)], rel=1e-9
                    ), name
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GOLDEN["clip"])
            assert float(norm) == pytest.approx(expected["grad_norm"], rel=1e-9) and norm > GOLDEN["clip"]
            optimizer.step()
        assert float(losses[-1]) == pytest.approx(expected["task"], rel=1e-9)
        assert float(losses[:-1].sum()) == pytest.approx(GOLDEN["lambda"] * expected["aux"], rel=1e-9)
    for name, p in model.named_parameters():
        norm, total = case["steps"][-1]["after"][official_name(name)]
        assert float(p.detach().norm()) == pytest.approx(norm, rel=1e-8), name
        assert float(p.detach().sum()) == pytest.approx(total, abs=1e-8 * norm * math.sqrt(p.numel())), name
    assert len(case["steps"][-1]["after"]) == len(list(model.parameters()))


def test_official_gradients_through_the_reference_step():
    expected = GOLDEN["cases"]["4"]["steps"][0]
    model = official_model(4)
    reference.train_step(model, official_batch(0), torch.optim.SGD(model.parameters(), lr=0.0))
    for name, p in model.named_parameters():
        assert float(p.grad.norm()) == pytest.approx(expected["gradients"][official_name(name)], rel=1e-9), name
