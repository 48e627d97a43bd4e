import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastlocal.blocks import losses
from fastlocal.errors import ArgumentError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- cross-entropy --------------------------------------------------------------------------------------------------


def test_cross_entropy_of_indices_is_the_mean_negative_log_probability():
    logits, target = randn(5, 7), torch.tensor([0, 6, 3, 3, 1])
    expected = -torch.stack(
        [torch.log(logits[i].exp()[t] / logits[i].exp().sum()) for i, t in enumerate(target)]
    ).mean()
    assert torch.allclose(losses.cross_entropy(logits, target), expected, rtol=1e-12)


def test_cross_entropy_of_probabilities():
    logits, target = randn(5, 7), randn(5, 7, seed=1).softmax(1)
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(losses.cross_entropy(logits, target), expected, rtol=1e-12)
    # Probabilities in another precision are the caller's loader, not a mistake.
    assert torch.allclose(losses.cross_entropy(logits, target.float()), expected, rtol=1e-6)


def test_cross_entropy_of_tokens_leaves_out_ignored_ones():
    logits, target = randn(2, 4, 7), torch.tensor([[1, -100, 3, 0], [-100, -100, 6, 2]])
    kept = [(i, j) for i in range(2) for j in range(4) if target[i, j] != -100]
    expected = -torch.stack([logits[i, j].log_softmax(0)[target[i, j]] for i, j in kept]).mean()
    assert torch.allclose(losses.cross_entropy(logits, target), expected, rtol=1e-12)
    soft = randn(2, 4, 7, seed=1).softmax(2)
    expected = -(soft * logits.log_softmax(2)).sum(2).mean()
    assert torch.allclose(losses.cross_entropy(logits, soft), expected, rtol=1e-12)


def test_cross_entropy_with_as_many_tokens_as_classes_reads_classes_last():
    logits, target = randn(2, 7, 7), torch.randint(0, 7, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert torch.equal(losses.cross_entropy(logits, target), expected)


def test_cross_entropy_of_pixels_is_torch_s():
    logits, target = randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(losses.cross_entropy(logits, target), F.cross_entropy(logits, target))


def test_cross_entropy_computes_in_float32_for_half_logits():
    logits = randn(4, 5).bfloat16()
    loss = losses.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])))


@pytest.mark.parametrize(
    ("logits", "target"), [((4, 5), (3,)), ((4, 6, 5), (4, 7)), ((4, 5), (4, 5)), ((2, 5, 3, 3), (2, 3))]
)
def test_cross_entropy_refuses_targets_that_do_not_fit(logits, target):
    with pytest.raises(ArgumentError, match="give one index per sample"):
        losses.cross_entropy(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="target: probabilities need the shape"):
        losses.cross_entropy(torch.zeros(logits), torch.zeros((*target, 2)))


def test_causal_loss_compares_with_the_next_token():
    logits, tokens = randn(2, 5, 7), torch.tensor([[0, 1, 2, 3, 4], [4, -100, 6, 0, 1]])
    pairs = [(i, t) for i in range(2) for t in range(4) if tokens[i, t + 1] != -100]
    expected = -torch.stack([logits[i, t].log_softmax(0)[tokens[i, t + 1]] for i, t in pairs]).mean()
    loss = losses.CausalLMLoss()
    assert torch.allclose(loss(logits, tokens), expected, rtol=1e-12)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(logits, tokens), loss(logits, tokens))
    assert torch.equal(copy.deepcopy(loss)(logits, tokens), loss(logits, tokens))
    with pytest.raises(ArgumentError, match=r"token ids \[B, T\]"):
        loss(logits[:, 0], tokens[:, 0])


# --- supervised contrastive -----------------------------------------------------------------------------------------


def naive_contrastive(features, labels, temperature):
    """The formula of Khosla et al., eq. 2, anchor by anchor."""
    z = features / features.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        partition = sum(torch.exp(z[i] @ z[j] / temperature) for j in others)
        for p in positives:
            total = total - torch.log(torch.exp(z[i] @ z[p] / temperature) / partition) / len(positives)
    return total / len(z)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 0, 1], [0, 1, 2, 3, 4, 5], [1] * 6])
def test_contrastive_loss_is_the_paper_s(labels):
    labels = torch.tensor(labels)
    ours, naive = (randn(6, 4).requires_grad_() for _ in range(2))
    loss, expected = losses.supervised_contrastive_loss(ours, labels, 0.2), naive_contrastive(naive, labels, 0.2)
    assert torch.allclose(loss, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    if loss.abs() > 0:
        (g,) = torch.autograd.grad(loss, ours)
        (e,) = torch.autograd.grad(expected, naive)
        assert torch.allclose(g, e, rtol=1e-10, atol=1e-13)


def test_contrastive_loss_of_one_sample_is_zero_with_zero_gradient():
    x = randn(1, 4).requires_grad_()
    loss = losses.supervised_contrastive_loss(x, torch.tensor([3]))
    (g,) = torch.autograd.grad(loss, x)
    assert loss == 0 and torch.equal(g, torch.zeros_like(g))


def test_contrastive_loss_takes_the_shared_positives_and_probabilities():
    x, labels = randn(6, 4), torch.tensor([0, 1, 0, 2, 0, 1])
    shared = losses.positive_weights(labels, torch.float64)
    expected = losses.supervised_contrastive_loss(x, labels)
    assert torch.equal(losses.supervised_contrastive_loss(x, labels, positives=shared), expected)
    soft = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    assert torch.equal(losses.supervised_contrastive_loss(x, soft), expected)


def test_contrastive_gradient():
    x = randn(5, 3).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda t: losses.supervised_contrastive_loss(t, labels, 0.5), x)


# --- similarity matching --------------------------------------------------------------------------------------------


def naive_similarity(rows):
    rows = [r - r.mean() for r in rows]
    return torch.stack([torch.stack([a @ b / ((a.norm() + 1e-8) * (b.norm() + 1e-8)) for b in rows]) for a in rows])


def test_similarity_matrix_of_maps_tokens_and_vectors():
    vectors = randn(4, 5)
    assert torch.allclose(losses.similarity_matrix(vectors), naive_similarity(list(vectors)), rtol=1e-12)
    maps = randn(4, 5, 3, 3)
    expected = naive_similarity([torch.stack([c.flatten().std() for c in m]) for m in maps])
    assert torch.allclose(losses.similarity_matrix(maps), expected, rtol=1e-12)
    tokens = randn(4, 6, 5)  # 6 tokens of width 5: five channels with six positions
    expected = naive_similarity([torch.stack([c.std() for c in t.T]) for t in tokens])
    assert torch.allclose(losses.similarity_matrix(tokens), expected, rtol=1e-12)


def test_similarity_matrix_of_few_channels_or_one_row_is_of_the_flat_values():
    for shape in [(4, 3, 5, 5), (4, 8, 1, 5), (4, 1, 8), (4, 5, 3)]:
        x = randn(*shape)
        assert torch.allclose(losses.similarity_matrix(x), naive_similarity(list(x.flatten(1))), rtol=1e-12)


def test_similarity_of_dead_rows_has_a_finite_gradient():
    x = torch.zeros(4, 5, 3, 3, dtype=torch.float64)
    x[0] = randn(5, 3, 3)
    x.requires_grad_()
    loss = losses.similarity_matching_loss(x, torch.tensor([0, 1, 0, 1]), 2)
    (g,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and g.isfinite().all()


def test_similarity_matching_loss_and_the_shared_target_matrix():
    x, y = randn(5, 6, 4, 4), torch.tensor([0, 2, 1, 0, 2])
    onehot = F.one_hot(y, 3).double()
    difference = losses.similarity_matrix(x) - naive_similarity(list(onehot))
    assert torch.allclose(losses.similarity_matching_loss(x, y, 3), (difference**2).mean(), rtol=1e-12)
    shared = losses.target_similarity(y, 3, torch.float64)
    assert torch.equal(losses.similarity_matching_loss(x, y, 3, shared), losses.similarity_matching_loss(x, y, 3))
    assert torch.equal(losses.target_similarity(onehot, 3, torch.float64), shared)
    small = randn(4, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: losses.similarity_matching_loss(t, y[:4], 3), small)


# --- reconstruction -------------------------------------------------------------------------------------------------


def test_restored_image_is_the_original():
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.1, 0.3]))
    x = ((image - mean) / std).requires_grad_()
    restored = losses.restore_image(x, mean, std)
    assert torch.allclose(restored, image, rtol=1e-12, atol=1e-14)
    assert not restored.requires_grad
    assert losses.restore_image(x.bfloat16(), mean, std).dtype == torch.float32
    assert losses.restore_image(x * 1e3, mean, std).amax() == 1


def test_reconstruction_loss_is_bce_with_the_logarithm_clamped():
    logits = torch.tensor([0.3, -2.0, 800.0, -800.0], dtype=torch.float64, requires_grad=True)
    image = torch.tensor([0.2, 0.9, 0.25, 0.5], dtype=torch.float64)
    p = torch.sigmoid(logits.detach())
    expected = 0.0
    for q, t in zip(p.tolist(), image.tolist()):
        log_q = max(math.log(q), -100) if q > 0 else -100
        log_r = max(math.log(1 - q), -100) if q < 1 else -100
        expected -= (t * log_q + (1 - t) * log_r) / 4
    loss = losses.reconstruction_loss(logits, image)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (g,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(g[:2], (p - image)[:2] / 4) and torch.equal(g[2:], torch.zeros_like(g[2:]))


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_under_autocast_equal_those_in_float32(dtype):
    y = torch.tensor([0, 1, 0, 2])
    maps = randn(4, 5, 4, 4, dtype=torch.float32)
    image = torch.rand(4, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    functions = [
        (lambda x: losses.supervised_contrastive_loss(x.flatten(1), y), 0),
        (lambda x: losses.reconstruction_loss(x, image), 0),
        (lambda x: losses.similarity_matching_loss(x.flatten(1), y, 3), 0),
        (
            lambda x: losses.similarity_matching_loss(x, y, 3),
            0.02,
        ),  # the deviation over positions is taken in x's dtype
        (lambda x: losses.cross_entropy(x.flatten(1), y), 0),
    ]
    for function, tolerance in functions:
        half = maps.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            loss = function(half)
        expected = function(half.detach().float())
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, expected, rtol=tolerance, atol=1e-7)
        loss.backward()
        assert half.grad.dtype == dtype and half.grad.isfinite().all() and half.grad.abs().sum() > 0


def test_which_criteria_the_operator_computes():
    rows, chances = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 5)
    options = losses.cross_entropy_options
    assert options(losses.cross_entropy, rows) == {}
    assert options(functools.partial(losses.cross_entropy, label_smoothing=0.1), rows) == {"label_smoothing": 0.1}
    assert options(functools.partial(losses.cross_entropy, ignore_index=3), chances) == {}
    assert options(nn.CrossEntropyLoss(ignore_index=3), rows)["ignore_index"] == 3
    assert options(nn.CrossEntropyLoss(ignore_index=3), chances) is None
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(), losses.CausalLMLoss(), lambda a, b: a.sum()):
        assert options(criterion, rows) is None
    assert options(losses.cross_entropy, torch.zeros(3, 4, dtype=torch.int64)) is None
    assert options(losses.cross_entropy, torch.zeros(3)) is None
    assert options(losses.cross_entropy, {"y": rows}) is None
