"""SOLO: heads, the shared copy of the readout and its refreshes; the causal loss without logits in memory."""

import copy
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlocal as fl
from fastlocal import models, reference
from fastlocal.blocks import heads as heads_module
from fastlocal.blocks.heads import ClassifierHead, FusedSequential, task_loss, token_mlp
from fastlocal.blocks.losses import CausalLMLoss, cross_entropy
from fastlocal.blocks.measure import SavedBytes
from fastlocal.errors import ArgumentError
from fastlocal.methods import StepContext
from fastlocal.methods.solo import SOLO, TransformerPlusPlus, readout_of
from fastlocal.models.gpt import GPTBlock
from tests.methods.sites import site
from tests.methods.three_ways import in_bf16, never_waits


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gpt(**options):
    return models.create(
        "gpt", **{"vocab_size": 19, "block_size": 8, "n_layer": 4, "n_head": 2, "n_embd": 16, "tie": False, **options}
    )


def ids(rows=4, length=8, vocabulary=19):
    return torch.randint(vocabulary, (rows, length))


def localized(blocks=3, net=None, **options):
    return fl.localize(net or gpt(), "solo", blocks=blocks, sample=ids(2), **options)


def sgd(params):
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


# ----------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("bias", [False, True])
def test_head_by_hand(bias):
    model = localized(bias=bias).double()
    head, x = model.heads[1], ids()
    with torch.no_grad():
        head.temperature.fill_(1.7)
        if bias:
            head.bias.normal_()
    assert len(head.blocks) == 2 and all(isinstance(b, GPTBlock) for b in head.blocks)
    assert isinstance(head.norm, nn.RMSNorm)
    h = torch.randn(4, 8, 16, dtype=torch.float64)
    local = head(h, StepContext(x, x, CausalLMLoss()))
    z = h
    for block in head.blocks:
        z = block(z)
    z = z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * head.norm.weight
    logits = 1.7 * z @ model.backbone.lm_head.weight.T + (head.bias if bias else 0)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(local.loss, expected, rtol=1e-12, atol=0)
    assert local.terms["task"][1] == 1.0


def test_only_the_last_loss_trains_the_readout():
    model, x = localized(), ids()
    model(x, x).loss.backward()
    shared = model.heads[0].readout
    assert shared.weight.grad is None and not shared.weight.requires_grad
    assert torch.equal(shared.weight, model.backbone.lm_head.weight)
    alone = copy.deepcopy(model.backbone)
    h = model.backbone.h[:3](model.backbone.embed(x)).detach()  # the last block: h.3 and the readout
    assert [b.name for b in model.blocks] == ["h.1", "h.2", "h.3"], "ranges of as many layers, the first ones longer"
    alone.zero_grad()
    CausalLMLoss()(alone.readout(alone.h[3](h)), x).backward()
    torch.testing.assert_close(model.backbone.lm_head.weight.grad, alone.lm_head.weight.grad)
    for name, p in [*model.backbone.named_parameters(), *model.heads.named_parameters()]:
        assert (p.grad is not None) == (name != "0.readout.weight"), name


def test_one_copy_for_all_heads():
    model = localized(4)
    shared = model.heads[0].readout
    assert all(head._copy[0] is shared for head in model.heads)
    keys = [key for key in model.state_dict() if "readout" in key]
    assert keys == ["heads.0.readout.weight", "heads.0.readout.steps"]
    assert shared.weight.data_ptr() != model.backbone.lm_head.weight.data_ptr()
    engine = fl.Engine(model, sgd)
    held = {id(p) for inner in engine.optimizer.blocks for g in inner.param_groups for p in g["params"]}
    assert id(shared.weight) not in held and id(model.heads[1].temperature) in held
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(head._copy[0] is twin.heads[0].readout for head in twin.heads)
        assert twin.links[0].copy is twin.heads[0].readout and twin.links[0].readout is twin.backbone.lm_head
        twin(ids(), ids()).loss.backward()
        assert twin.heads[0].readout.count == 1 and shared.count == 0
    model.double()
    assert model.heads[2]._copy[0].weight.dtype == torch.float64
    assert not hasattr(model.method, "_copy") or model.method._copy is None


# -------------------------------------------------------------------------------------------------------- the refreshes


def run_a(model, data):
    optimizer, seen = sgd(model.parameters()), []
    for x in data:
        before = model.backbone.lm_head.weight.detach().clone()
        out = model(x, x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        seen.append((out.losses, before, model.heads[0].readout.weight.clone()))
    return seen


def run_engine(model, data, **options):
    engine, seen = fl.Engine(model, sgd, backend="reference", **options), []
    for x in data:
        before = model.backbone.lm_head.weight.detach().clone()
        seen.append((engine.step(x).losses, before, model.heads[0].readout.weight.clone()))
    return seen


def run_reference(model, data):
    optimizer, seen = sgd(model.parameters()), []
    for x in data:
        before = model.backbone.lm_head.weight.detach().clone()
        losses = torch.stack(reference.train_step(model, x, optimizer))
        seen.append((losses, before, model.heads[0].readout.weight.clone()))
    return seen


@pytest.mark.parametrize("refresh", [1, 3])
def test_refreshes_and_equal_levels(refresh):
    model, data = localized(refresh=refresh), [ids() for _ in range(7)]
    with fl.backend("reference"):
        runs = [
            run_a(a := copy.deepcopy(model), data),
            run_engine(b := copy.deepcopy(model), data),
            run_engine(end := copy.deepcopy(model), data, update="end"),
            run_reference(spec := copy.deepcopy(model), data),
        ]
    for seen in runs:
        for t, (losses, _, copied) in enumerate(seen):
            assert torch.equal(losses, runs[0][t][0])
            fresh = seen[t - t % refresh][1]  # the readout before the last step that refresh divides
            assert torch.equal(copied, fresh), t
    for other in (b, end, spec):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in a.state_dict().items())
    assert a.heads[0].readout.steps == 7 and not torch.equal(runs[0][0][2], runs[0][-1][2])


def test_forwards_that_do_not_train_do_not_count():
    model, x = localized(refresh=2), ids()
    model.eval()(x, x)
    with torch.no_grad():
        model.train()(x, x)
    assert model.heads[0].readout.count == 0
    engine = fl.Engine(model, sgd)
    engine.accumulate(x)
    engine.accumulate(x)
    engine.step(x)
    assert model.heads[0].readout.count == 1, "three micro-batches are one step"


def test_no_step_waits_and_bf16_is_much_the_same():
    x = ids()
    in_bf16(localized(refresh=2), x, x)
    never_waits(localized(refresh=2), x, x)


@pytest.mark.parametrize("at", [2, 3])
def test_a_resumed_run_refreshes_when_the_first_one_would(at):
    model, data = localized(refresh=3), [ids() for _ in range(7)]
    whole = copy.deepcopy(model)
    engine = fl.Engine(whole, sgd)
    losses = [engine.step(x).losses for x in data]
    first = copy.deepcopy(model)
    engine = fl.Engine(first, sgd)
    for x in data[:at]:
        engine.step(x)
    saved = copy.deepcopy((first.state_dict(), engine.state_dict()))
    resumed = localized(refresh=3)
    other = fl.Engine(resumed, sgd)
    other.step(data[-1])  # something else, and a count of its own
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for x, expected in zip(data[at:], losses[at:], strict=True):
        assert torch.equal(other.step(x).losses, expected)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert resumed.heads[0].readout.steps == 7


def test_trainer_resumes_the_count(tmp_path):
    data = [(x, x) for x in ids(24).split(4)]

    def trainer(model, folder):
        make = torch.optim.SGD
        return fl.Trainer(
            model, optimizer=lambda named: make(named, lr=0.3, momentum=0.9), progress=False, folder=tmp_path / folder
        )

    torch.manual_seed(1)
    model = localized(refresh=4)
    whole, half, late = copy.deepcopy(model), copy.deepcopy(model), localized(refresh=4)
    trainer(whole, "whole").fit(data, epochs=2)
    trainer(half, "half").fit(data, epochs=1)
    second = trainer(late, "half")
    second.resume()
    second.fit(data, epochs=2)
    assert late.heads[0].readout.steps == whole.heads[0].readout.steps == 12
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in late.state_dict().items())


# -------------------------------------------------------------------------------------------------- memory of the logits


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_no_head_keeps_logits_of_a_large_vocabulary(backend):
    """Block 0 saves less with its head than one set of logits would take."""
    vocabulary, rows, length = 3000, 4, 32
    net = gpt(vocab_size=vocabulary, block_size=length)
    x = ids(rows, length, vocabulary)
    model = fl.localize(net, "solo", blocks=3, sample=x[:2])
    one = rows * length * vocabulary * 4
    known = [*model.parameters(), *model.buffers()]
    ctx = model.context((x,), {}, x)
    h = torch.randn(rows, length, 16, requires_grad=True)
    with fl.backend(backend), SavedBytes(exclude=known) as saved:
        local = model.heads[0](h, ctx)
        assert 0 < saved.current < one / 4
    assert local.logits is None and local.correct.dtype == torch.int64
    local.loss.backward()
    # the same as with the logits
    expected_h = h.detach().clone().requires_grad_()
    features = model.heads[0].norm(model.heads[0].blocks(expected_h)) * model.heads[0].temperature
    logits = features @ net.lm_head.weight.detach().T
    expected = CausalLMLoss()(logits, x)
    expected.backward()
    torch.testing.assert_close(local.loss, expected)
    torch.testing.assert_close(h.grad, expected_h.grad, rtol=1e-4, atol=1e-7)
    assert local.correct == (logits[:, :-1].argmax(-1) == x[:, 1:]).sum()


def test_a_criterion_of_ones_own_gets_the_logits():
    def squares(logits, target):
        return (logits - F.one_hot(target, logits.shape[-1])).square().mean()

    model, x = localized(criterion=squares), ids()
    seen = {}
    model.heads[0].register_forward_hook(lambda m, inputs, out: seen.update(out=out))
    model(x, x)
    assert seen["out"].logits.shape == (4, 8, 19)
    torch.testing.assert_close(seen["out"].loss, squares(seen["out"].logits, x))


# --------------------------------------------------------------------- task_loss of other heads with a target per token


def served(net, h, ctx):
    """Loss, gradients and scores through the operator, which must have been called."""
    operator = mock.Mock(wraps=heads_module.pool_linear_cross_entropy)
    with fl.backend("aten"), mock.patch.object(heads_module, "pool_linear_cross_entropy", operator):
        loss, scores = task_loss(net, h, ctx)
    return loss, scores, operator


CRITERIA = {
    "causal": CausalLMLoss(),
    "causal, smoothed, class 3 ignored": CausalLMLoss(ignore_index=3, label_smoothing=0.1),
    "every token": cross_entropy,
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["dgl", "make_readout"])
def test_heads_with_a_target_per_token_take_the_operator(kind, criterion):
    loss_fn = CRITERIA[criterion]
    net = token_mlp((8, 16), 19, dense=True) if kind == "dgl" else FusedSequential(gpt().make_readout(16, 19))
    net = net.double()
    x = ids()
    x[0, 3:] = getattr(loss_fn, "ignore_index", -100)
    results = []
    for run in (lambda *a: (*task_loss(*a), None), served):
        h = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        net.zero_grad()
        loss, scores, operator = run(net, h, StepContext(x, x, loss_fn))
        loss.backward()
        results.append((loss, h.grad, [p.grad.clone() for p in net.parameters()], scores, operator))
    plain, fused = results
    torch.testing.assert_close(plain[:3], fused[:3], rtol=1e-10, atol=1e-12)
    assert fused[4].call_count == 1 and "logits" in plain[3] and "logits" not in fused[3]
    expected = CausalLMLoss(-100).correct if criterion != "every token" else (lambda z, y: (z.argmax(-1) == y).sum())
    target = x.where(x != getattr(loss_fn, "ignore_index", -100), -100)
    assert fused[3]["correct"] == expected(plain[3]["logits"], target)


def test_what_the_operator_does_not_serve_is_called_plainly():
    x, h = ids(), torch.randn(4, 8, 16)
    net = token_mlp((8, 16), 19, dense=True)
    for criterion, target in (
        (lambda z, y: z.square().mean(), x),
        (type("Mine", (CausalLMLoss,), {})(), x),
        (cross_entropy, F.one_hot(x, 19).float()),
    ):
        loss, scores, operator = served(net, h, StepContext(target, x, criterion))
        assert operator.call_count == 0 and torch.equal(loss, criterion(scores["logits"], target))
    hooked = FusedSequential(gpt().make_readout(16, 19))
    calls = []
    hooked[0][1].register_forward_hook(lambda *a: calls.append(1))
    _, _, operator = served(hooked, h, StepContext(x, x, cross_entropy))
    assert operator.call_count == 0 and calls
    wrong = StepContext(torch.zeros(4, 5, dtype=torch.int64), x, cross_entropy)
    with pytest.raises(ArgumentError, match="do not fit logits"):
        served(net, h, wrong)
    with pytest.raises(ArgumentError, match=r"the causal loss takes logits \[B, T, V\]"):
        served(net, h, StepContext(wrong.target, x, CausalLMLoss()))
    pooled = token_mlp((8, 16), 19, dense=False)
    _, scores, operator = served(pooled, h, StepContext(torch.zeros(4, dtype=torch.int64), x, cross_entropy))
    assert operator.call_count == 1 and operator.call_args.kwargs["pool"] == "none" and "correct" in scores


def test_auglocal_on_a_language_model_makes_no_logits_in_its_heads():
    model = fl.localize(gpt(), "auglocal", blocks=3, depth=1, sample=ids(2))
    x, head = ids(), model.heads[0]
    assert isinstance(head, ClassifierHead)
    _, scores, operator = served(head.net, torch.randn(4, 8, 16), model.context((x,), {}, x))
    assert operator.call_count == 1 and "correct" in scores


# ------------------------------------------------------------------------------------------------------- Hugging Face


def decoder(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=19, n_positions=8, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def hf_batch(rows=4):
    x = ids(rows)
    mask = torch.ones_like(x)
    mask[0, 5:] = 0  # right padding
    return {"input_ids": x, "attention_mask": mask, "labels": x.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["solo", "lopt"])
def test_hugging_face_decoders_at_every_level(kind, method):
    net = decoder(kind)
    layers = "transformer.h" if kind == "gpt2" else "model.layers"
    cuts = [f"{layers}.0", f"{layers}.1"]
    model = fl.localize(net, method, blocks=cuts, sample=hf_batch(2), tied="untie")
    assert "by hooks" in model.explain() and len(model.blocks) == 3
    if method == "solo":
        assert model.links[0].readout is net.lm_head
        assert all(
            isinstance(b, TransformerPlusPlus) and b.heads == (2 if kind == "gpt2" else 4)
            for b in model.heads[1].blocks
        )
    a, b, spec = (copy.deepcopy(model) for _ in range(3))
    data = [hf_batch() for _ in range(4)]
    optimizer, plain, losses = sgd(a.parameters()), sgd(spec.parameters()), []
    engine = fl.Engine(b, sgd, backend="reference")
    with fl.backend("reference"):
        for batch in data:
            out = a(**batch)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.losses)
            assert torch.equal(engine.step(batch).losses, out.losses)
            assert torch.equal(torch.stack(reference.train_step(spec, batch, plain)), out.losses)
    for other in (b, spec):
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in a.state_dict().items())
    assert not torch.equal(a.backbone.lm_head.weight, model.backbone.lm_head.weight)
    exported = a.export().eval()
    assert type(exported) is type(net) and exported(input_ids=data[0]["input_ids"]).logits.shape == (4, 8, 19)


@pytest.mark.parametrize("method", ["solo", "lopt"])
def test_hugging_face_trainer_equals_a_plain_loop(method, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    transformers.logging.set_verbosity_error()
    rows = [{key: value[0] for key, value in hf_batch(1).items()} for _ in range(8)]
    model = fl.localize(
        decoder("llama"), method, blocks=3, sample=hf_batch(2), **({"refresh": 2} if method == "solo" else {})
    )
    plain = copy.deepcopy(model)
    args = transformers.TrainingArguments(
        tmp_path, use_cpu=True, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=4, max_grad_norm=1.0,
        lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0, save_strategy="no", report_to=[],
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], seed=5,
    )  # fmt: skip
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append({**kwargs}), with_kwargs=True)
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    assert len(seen) == 4
    for batch in seen:
        optimizer.zero_grad()
        plain(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)
    trainer.save_model(tmp_path / "saved")  # safetensors refuses tensors that are shared between names
    assert list((tmp_path / "saved").glob("*.safetensors"))
    if method == "solo":
        assert model.heads[0].readout.steps == 4


@pytest.mark.parametrize("method", ["solo", "lopt"])
def test_lightning_equals_a_plain_loop(method, tmp_path):
    lightning = pytest.importorskip("lightning")
    options = {"refresh": 2} if method == "solo" else {}
    model = fl.localize(gpt(), method, blocks=3, sample=ids(2), **options)
    plain = copy.deepcopy(model)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return self.model(batch, batch).loss

        def configure_optimizers(self):
            return sgd(self.model.parameters())

    data = [ids() for _ in range(4)]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
    optimizer = sgd(plain.parameters())
    for x in data:
        optimizer.zero_grad()
        plain(x, x).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)
    assert method == "lopt" or model.heads[0].readout.steps == 4


# --------------------------------------------------------------------------------------------------------- small parts


def test_transformer_plus_plus():
    block = TransformerPlusPlus(16, 2)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(sum(p.numel() for p in block.parameters()), 4 * 16 * 16 + 3 * 16 * 48 + 2 * 16)
    changed = x.clone()
    changed[:, 4] += 1
    out, other = block(x), block(changed)
    assert torch.equal(out[:, :4], other[:, :4]) and not torch.equal(out[:, 5], other[:, 5]), "it is not causal"


def test_transformer_plus_plus_by_hand():
    """Positions turn pairs of channels as complex numbers, in queries and keys; one token and one head at a time."""
    block, x = TransformerPlusPlus(16, 2).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn_like(p) * 0.3)

    def rms(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(z, t):  # one head's 8 channels at position t
        angles = torch.tensor([t * 10_000.0 ** (-2 * j / 8) for j in range(4)], dtype=torch.float64)
        c = torch.complex(z[:4], z[4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((c.real, c.imag))

    q, k, v = (rms(x[0], block.norm1.weight) @ block.qkv.weight.T).view(5, 3, 2, 8).unbind(1)
    rows = []
    for t in range(5):
        parts = []
        for n in range(2):
            scores = torch.stack([turned(q[t, n], t) @ turned(k[s, n], s) / 8**0.5 for s in range(t + 1)])
            parts.append(scores.softmax(0) @ v[: t + 1, n])
        rows.append(torch.cat(parts))
    h = x[0] + torch.stack(rows) @ block.proj.weight.T
    gate, up = (rms(h, block.norm2.weight) @ block.gate.weight.T).chunk(2, -1)
    out = h + (gate * gate.sigmoid() * up) @ block.down.weight.T
    torch.testing.assert_close(block(x)[0], out, rtol=1e-5, atol=1e-6)


def test_readout_is_found():
    net = gpt(tie=True)
    assert readout_of(net, 16, 19) is net.lm_head
    chain = nn.Sequential(nn.Linear(16, 19), nn.ReLU(), nn.Linear(19, 16), nn.Linear(16, 19))
    assert readout_of(chain, 16, 19) is chain[3]
    with pytest.raises(ArgumentError, match=r"has no Linear of weight \[19, 8\]"):
        readout_of(chain, 8, 19)


def test_tied_embeddings():
    model = localized(net=gpt(tie=True), tied="link")
    engine, x = fl.Engine(model, sgd), ids()
    for _ in range(3):
        before = model.backbone.lm_head.weight.detach().clone()
        engine.step(x)
    assert torch.equal(model.heads[0].readout.weight, before)


def test_options():
    where = site((8, 16), dense=True, num_classes=19, net=gpt())
    method = SOLO(depth=1, units="transformer++", heads=4)
    method.resolve([where])
    head = method.head(where)
    assert len(head.blocks) == 1 and isinstance(head.blocks[0], TransformerPlusPlus) and head.blocks[0].heads == 4
    for options, match in (
        ({"refresh": 0}, "refresh: got 0"),
        ({"depth": -1}, "depth: got -1"),
        ({"units": "mlp"}, "units: got 'mlp'"),
        ({"heads": 0}, "heads: got 0"),
    ):
        with pytest.raises(ArgumentError, match=match):
            SOLO(**options)
    bad = SOLO(units="transformer++", heads=3)
    bad.resolve([where])
    with pytest.raises(ArgumentError, match="heads: 3 attention heads do not divide a width of 16"):
        bad.head(where)
    for shape, dense in (((8, 16), False), ((8, 4, 4), False), ((16,), False)):
        with pytest.raises(ArgumentError, match=r"'solo' predicts a class for every token.*use method='dgl'"):
            SOLO().head(site(shape, dense=dense))
