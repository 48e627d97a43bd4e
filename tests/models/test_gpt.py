import copy
import math
import pickle

import pytest
import torch

from fastlocal import models
from fastlocal.errors import ArgumentError

SMALL = {"vocab_size": 11, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}


def test_gpt2_small_has_the_published_size(count):
    with torch.device("meta"):
        net = models.gpt()
        logits = net(torch.zeros(2, 16, dtype=torch.int64))
    assert count(net) == 124_439_808 and logits.shape == (2, 16, 50257)
    assert len(net.units()) == len(net.widths) == 13


def test_names_are_gpt2s():
    block = [
        f"{part}.{kind}"
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    assert list(models.gpt(**{**SMALL, "n_layer": 1}).state_dict()) == [
        "wte.weight",
        "wpe.weight",
        *(f"h.0.{name}" for name in block),
        "ln_f.weight",
        "ln_f.bias",
        "lm_head.weight",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_token_changes_no_earlier_logits(dtype):
    net = models.gpt(**SMALL).to(dtype)
    assert net.causal
    tokens = torch.randint(0, 11, (2, 16))
    before = net(tokens)
    for t in (1, 7, 15):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = net(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-6, atol=1e-7)
        assert (after[:, t:] - before[:, t:]).abs().amax(dim=(0, 2)).min() > 1e-4, "every later token sees the change"


def test_equals_the_transformers_library():
    """The same weights in an independent implementation give the same logits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    net = models.gpt(**SMALL).double().eval()
    state = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items()}
    linears = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored the other way round in theirs
    net.load_state_dict({name: p.T if name.endswith(linears) else p for name, p in state.items()})
    tokens = torch.randint(0, 11, (2, 9))
    torch.testing.assert_close(net(tokens), theirs(tokens).logits)


def test_tied_embeddings_stay_tied_in_copies():
    net = models.gpt(**SMALL)
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.lm_head.weight is twin.wte.weight
    assert "lm_head.weight" not in dict(net.named_parameters())


def test_untied():
    net = models.gpt(**SMALL, tie=False)
    assert net.lm_head.weight is not net.wte.weight and "lm_head.weight" in dict(net.named_parameters())


def test_initialisation():
    net = models.gpt(vocab_size=500, block_size=64, n_layer=8, n_head=2, n_embd=128)
    assert net.wte.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for block in (net.h[3], net.make_unit(4, 128, 1)):
        for linear in (block.attn.c_proj, block.mlp.c_proj):
            assert linear.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
            assert (linear.bias == 0).all()


def test_dropout_only_in_training():
    net = models.gpt(**SMALL, dropout=0.3)
    tokens = torch.randint(0, 11, (2, 8))
    assert not torch.equal(net(tokens), net(tokens))
    assert torch.equal(net.eval()(tokens), net(tokens))


def test_it_learns_to_copy_the_previous_token():
    net = models.gpt(**SMALL)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        tokens = torch.randint(0, 11, (16, 16))
        loss = torch.nn.functional.cross_entropy(net(tokens)[:, 1:].flatten(0, 1), tokens[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(11)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 4), "tokens must have an integer dtype such as torch.int64, got torch.float32"),
        (torch.zeros(2, 17, dtype=torch.int64), r"T at most block_size=16, got \(2, 17\)"),
        (torch.zeros(4, dtype=torch.int64), r"tokens must be \[B, T\].*got \(4,\)"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(ArgumentError, match=message):
        models.gpt(**SMALL)(tokens)


def test_make_unit_refuses_another_width():
    with pytest.raises(ArgumentError, match="in_channels must be 16, the width of the residual stream, got 8"):
        models.gpt(**SMALL).make_unit(1, 8, 1)
