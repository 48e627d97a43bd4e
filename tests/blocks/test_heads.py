import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from fastlocal.blocks import heads, losses
from fastlocal.blocks.measure import LaunchCounter
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.ops._seed import is_one, ones


def context(rows=4, classes=5, image=(3, 8, 8), seed=0):
    g = torch.Generator().manual_seed(seed)
    return StepContext(
        target=torch.randint(0, classes, (rows,), generator=g),
        input=torch.randn(rows, *image, generator=g),
        criterion=losses.cross_entropy,
    )


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def build_all():
    """One head of every kind for a [B, 8, 4, 4] boundary of 8x8 images, by name."""
    shape, image = (8, 4, 4), (3, 8, 8)
    torch.manual_seed(0)
    norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    conv = [8, 16]
    return {
        "dgl": heads.ClassifierHead(heads.dgl_net(shape, 5)),
        "dgl_cnn": heads.ClassifierHead(heads.dgl_net(shape, 5, convs=2, kernel_size=3, hidden=0)),
        "dgl auglocal": heads.ClassifierHead(heads.dgl_net(shape, 5, hidden=2, bias=False)),
        "man++": heads.ClassifierHead(heads.man_plus_plus_net(shape, 5, width=8, hidden=16)),
        "predsim": heads.PredSimHead(shape, 5, dim_in_decoder=32),
        "infopro contrast": heads.InfoProHead(
            heads.decoder_net(8, image),
            heads.classifier_net(8, conv, 2, [16, 16]),
            contrast=True,
            weights=(5, 0.5),
            **norm,
        ),
        "infopro task": heads.InfoProHead(
            heads.decoder_net(8, image, convs=4),
            heads.classifier_net(8, [], 1, [5]),
            contrast=False,
            weights=(1, 2),
            **norm,
        ),
        "infopro imagenet": heads.InfoProHead(
            heads.decoder_net_imagenet(8, image),
            heads.classifier_net_imagenet(8, 5),
            contrast=False,
            weights=(5, 0.75),
            **norm,
        ),
    }


KINDS = list(build_all())


@pytest.mark.parametrize("kind", KINDS)
def test_local_loss_is_the_weighted_sum_of_its_detached_terms(kind):
    head, h = build_all()[kind], torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    local = head(h.requires_grad_(), context())
    assert local.loss.dim() == 0
    assert torch.allclose(local.loss, sum(value * weight for value, weight in local.terms.values()))
    assert all(not value.requires_grad and isinstance(weight, float) for value, weight in local.terms.values())
    if kind == "infopro contrast":
        assert local.logits is None and set(local.terms) == {"reconstruction", "contrast"}
    else:
        assert local.logits.shape == (4, 5) and not local.logits.requires_grad
    local.loss.backward()
    assert h.grad.abs().sum() > 0
    assert all(p.grad is not None for p in head.parameters()), "a parameter that the loss does not reach"


@pytest.mark.parametrize("kind", KINDS)
def test_heads_run_under_autocast_and_in_half_precision(kind):
    head, h, ctx = build_all()[kind], torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1)), context()
    expected = head(h, ctx).loss
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            local = head(h.to(dtype).requires_grad_(), context())
        assert local.loss.dtype == torch.float32
        assert torch.allclose(local.loss, expected, rtol=0.1)
        local.loss.backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())
    half = copy.deepcopy(head).bfloat16()
    loss = half(h.bfloat16(), StepContext(ctx.target, ctx.input.bfloat16(), ctx.criterion)).loss
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, rtol=0.2)
    loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_heads_survive_copy_and_pickle_and_save_parameters_only(kind):
    head, h = build_all()[kind], torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = head(h, context()).loss
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(h, context()).loss, expected)
    assert not {"mean", "std"} & {key.rsplit(".", 1)[-1] for key in head.state_dict()}


def test_heads_leave_the_boundary_activation_alone():
    for head in build_all().values():
        h = torch.randn(4, 8, 4, 4, requires_grad=True)
        before, version = h.detach().clone(), h._version
        head(h, context())
        assert torch.equal(h, before) and h._version == version


def test_what_depends_on_the_batch_only_is_computed_once(monkeypatch):
    calls = []
    for name in ("target_similarity", "restore_image", "positive_weights"):
        real = getattr(losses, name)
        monkeypatch.setattr(losses, name, lambda *a, _real=real, _name=name: (calls.append(_name), _real(*a))[1])
    ctx = context()
    for kind in ("predsim", "infopro contrast", "infopro task"):
        for head in (build_all()[kind], build_all()[kind]):
            head(torch.randn(4, 8, 4, 4), ctx)
    assert sorted(calls) == ["positive_weights", "restore_image", "target_similarity"]


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 6, 3)])
def test_average_pool_hands_back_a_gradient_that_is_not_expanded(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    positions = tuple(range(2, 4)) if len(shape) == 4 else (1,)
    y = heads.AvgPool()(x)
    assert torch.allclose(y, x.mean(positions), rtol=1e-14)
    seen = []
    x.register_hook(lambda g: seen.append(g))
    y.square().sum().backward()
    assert torch.allclose(x.grad, torch.autograd.grad(x.mean(positions).square().sum(), x)[0])
    assert all(seen[0].stride(d) == 0 for d in positions)


def test_average_pool_of_float16_does_not_overflow():
    x = torch.full((1, 2, 64, 64), 100.0, dtype=torch.float16)
    assert torch.equal(heads.AvgPool()(x), torch.full((1, 2), 100.0, dtype=torch.float16))


def test_init_convs_draws_convolutions_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(4, 4))
    bias, linear = net[0].bias.clone(), net[1].weight.clone()
    heads.init_convs(net)
    assert net[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert torch.equal(net[0].bias, bias) and torch.equal(net[1].weight, linear)


@pytest.mark.parametrize(
    ("shape", "options", "first", "features"),
    [
        ((16, 32, 32), {}, 8, 64),
        ((16, 32, 32), {"hidden": 2, "bias": False}, 8, 64),
        ((64, 6, 6), {}, 2, 256),
        ((8, 4, 4), {}, 1, 32),
        ((8, 4, 4), {"hidden": 2, "bias": False}, 1, 8),
        ((8, 9, 5), {}, (3, 2), 32),
    ],
)
def test_dgl_net_pools_to_a_quarter_and_reads_four_positions(shape, options, first, features):
    net = heads.dgl_net(shape, 5, **options)
    first = (first, first) if isinstance(first, int) else first
    assert net[0](torch.randn(2, *shape)).shape[2:] == first
    linears = [m for m in net if isinstance(m, nn.Linear)]
    assert [m.in_features for m in linears] == [features] * (options.get("hidden", 3) + 1)
    assert net(torch.randn(2, *shape)).shape == (2, 5)


def test_dgl_net_variants():
    hidden = 3 * (32 * 32 + 32 + 2 * 32) + 32 * 5 + 5
    convs = 3 * (8 * 8 + 2 * 8)
    assert parameters(heads.dgl_net((8, 8, 8), 5)) == convs + hidden
    assert parameters(heads.dgl_net((8, 8, 8), 5, convs=0)) == hidden
    study = heads.dgl_net((8, 8, 8), 5, convs=2, kernel_size=3, hidden=0)
    assert parameters(study) == 2 * (8 * 8 * 9 + 16) + 16 + 32 * 5 + 5
    assert isinstance(study[0], nn.Conv2d) and isinstance(study[-3], nn.BatchNorm2d)
    bare = heads.dgl_net((8, 8, 8), 5, hidden=2, bias=False)
    assert parameters(bare) == convs + 2 * (32 * 32 + 2 * 32) + 32 * 5 + 5


def test_man_plus_plus_net_has_the_repository_s_shapes():
    shapes = [tuple(p.shape) for p in heads.man_plus_plus_net((32, 16, 16), 10).parameters()]
    conv = [(128, 32, 1, 1), (128,), (128,), (128, 128, 1, 1), (128,), (128,), (128, 128, 1, 1), (128,), (128,)]
    fc = [(512, 128), (512,), (512,), (512,), (512, 512), (512,), (512,), (512,), (512, 512), (512,), (512,), (512,)]
    assert shapes == [*conv, *fc, (10, 512), (10,)]
    assert sum(isinstance(m, nn.AdaptiveAvgPool2d) for m in heads.man_plus_plus_net((32, 8, 8), 10)) == 0


def test_token_mlp_pools_unless_dense():
    x = torch.randn(2, 7, 6)
    assert heads.token_mlp((7, 6), 5, dense=False)(x).shape == (2, 5)
    assert heads.token_mlp((7, 6), 5, dense=True)(x).shape == (2, 7, 5)
    net = heads.token_mlp((6,), 5, dense=False)
    assert net(x[:, 0]).shape == (2, 5)
    assert [type(m) for m in net] == [nn.Linear, nn.LayerNorm, nn.ReLU] * 3 + [nn.Linear]


@pytest.mark.parametrize(
    ("shape", "limit", "window", "padding", "features"),
    [
        ((128, 32, 32), 4096, (8, 4), (0, 0), 4096),
        ((128, 16, 16), 4096, (4, 2), (0, 0), 4096),
        ((16, 32, 32), 512, (8, 4), (0, 0), 512),
        ((512, 7, 7), 4096, (4, 2), (2, 1), 4096),
        ((8192, 4, 4), 4096, (4, 4), (0, 0), 8192),
        ((4, 4, 4), 4096, None, None, 64),
    ],
)
def test_predsim_pools_to_the_limit(shape, limit, window, padding, features):
    pred = heads.PredSimHead(shape, 5, dim_in_decoder=limit).pred if shape[0] < 1024 else None
    layers, found = heads._decoder_pool(shape, limit)
    assert found == features
    pools = [m for m in layers if isinstance(m, nn.AvgPool2d)]
    if window is None:
        assert not pools
    else:
        assert (pools[0].kernel_size, pools[0].padding) == (window, padding)
    if pred is not None:
        assert pred(torch.randn(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize("shape", [(6,), (7, 6)])
def test_predsim_of_vectors_and_tokens(shape):
    torch.manual_seed(0)
    head, h, ctx = heads.PredSimHead(shape, 5), torch.randn(4, *shape), context()
    assert head.pred[-1].in_features == 6 and isinstance(head.sim, nn.Linear)
    local = head(h, ctx)
    pooled = h.mean(1) if len(shape) == 2 else h
    logits = head.pred[-1](pooled)
    assert local.terms["pred"][0].item() == pytest.approx(losses.cross_entropy(logits, ctx.target).item(), abs=1e-6)
    assert torch.allclose(local.logits, logits, atol=1e-6)
    with as_on_gpu():
        assert head(h, ctx).correct == (logits.argmax(1) == ctx.target).sum()
    assert torch.allclose(local.terms["sim"][0], losses.similarity_matching_loss(head.sim(h), ctx.target, 5))
    assert local.terms["pred"][1] == pytest.approx(0.01) and local.terms["sim"][1] == 0.99


@pytest.mark.parametrize("which", ["pred", "sim"])
def test_predsim_with_one_loss_alone(which):
    head = heads.PredSimHead((8, 4, 4), 5, losses=which)
    local = head(torch.randn(4, 8, 4, 4), context())
    assert list(local.terms) == [which] and local.terms[which][1] == 1.0
    assert (local.logits is None) == (which == "sim")
    assert (head.pred is None, head.sim is None) == (which == "sim", which == "pred")


def test_upsample_is_aligned_bilinear_and_free_at_its_own_size():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    expected = torch.tensor([[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]])
    assert torch.allclose(heads.Upsample((3, 3))(x)[0, 0], expected)
    assert heads.Upsample((2, 2))(x) is x


def test_infopro_nets_have_the_published_sizes():
    decoder = heads.decoder_net(16, (3, 32, 32))
    assert decoder(torch.randn(2, 16, 8, 8)).shape == (2, 3, 32, 32)
    assert parameters(decoder) == 16 * 12 * 9 + 12 + 24 + 12 * 3 * 9 + 3
    four = heads.decoder_net(16, (3, 32, 32), convs=4)
    assert parameters(four) == parameters(decoder) + 2 * (12 * 12 * 9 + 12 + 24)
    classifier = heads.classifier_net(16, [32], 2, [128, 10])
    assert parameters(classifier) == 16 * 32 * 9 + 64 + 32 * 128 + 128 + 128 * 10 + 10
    decoder = heads.decoder_net_imagenet(512, (3, 32, 32))
    assert decoder(torch.randn(2, 512, 4, 4)).shape == (2, 3, 32, 32)
    convs = 512 * 128 + 128 + 128 * 32 * 9 + 32 + 32 * 12 * 9 + 12 + 12 * 3 * 9 + 3
    assert parameters(decoder) == convs + 2 * (128 + 32 + 12)
    head = heads.classifier_net_imagenet(512, 1000)
    convs = 512 * 128 + 128 * 256 * 9 + 256 * 512 * 9 + 512 * 2048
    assert parameters(head) == convs + 2 * (128 + 256 + 512 + 2048) + 2048 * 1000 + 1000
    assert head(torch.randn(2, 512, 4, 4)).shape == (2, 1000)


CRITERIA = {
    "default": losses.cross_entropy,
    "options": functools.partial(losses.cross_entropy, ignore_index=2, label_smoothing=0.1),
    "torch": nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.2),
    "weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "own": lambda logits, target: nn.functional.cross_entropy(logits, target) * 2,
}


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["dgl", "dgl_cnn", "man++", "predsim", "infopro task", "infopro imagenet"])
def test_the_fused_task_loss_is_that_of_the_scores(kind, criterion, probabilities):
    """Loss, hits and every gradient, against the criterion on the scores that the same chain computes."""
    ctx = context(rows=6)
    ctx.input = ctx.input.double()
    ctx.criterion = CRITERIA[criterion]
    if probabilities and criterion == "torch":
        ctx.criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
    if probabilities:
        ctx.target = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    h = torch.randn(6, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    got = build_all()[kind].double()
    plain = copy.deepcopy(got)
    net = {"pred": getattr(plain, "pred", None), "net": getattr(plain, "net", None)}
    part = net["net"] or net["pred"] or plain.classifier
    part.register_forward_hook(lambda *_: None)  # a chain that is watched computes its scores
    with as_on_gpu():
        a, b = got(h, ctx), plain(h, ctx)
    assert b.correct is None and torch.allclose(a.loss, b.loss)
    if criterion in ("default", "options", "torch"):
        labels = ctx.target.argmax(1) if probabilities else ctx.target
        hits = b.logits.argmax(1) == labels
        ignored = {"options": 2, "torch": 1}.get(criterion)
        if ignored is not None and not probabilities:
            hits &= labels != ignored
        assert a.logits is None and a.correct == hits.sum()
    elif criterion != "weights":
        assert a.correct is None and torch.equal(a.logits, b.logits)
    for p, q in zip([h, *got.parameters()], [h, *plain.parameters()], strict=True):
        wanted = torch.autograd.grad(b.loss, q, retain_graph=True)[0]
        assert torch.allclose(torch.autograd.grad(a.loss, p, retain_graph=True)[0], wanted)


WEIGHTED = [kind for kind in KINDS if kind.startswith(("predsim", "infopro"))]


@pytest.mark.parametrize("seed", ["one", "unknown"])
@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_inside_the_operators_are_the_weights_of_the_sum(kind, seed):
    """As on a GPU, against the plain sum of weight times value, also from another gradient than one (a loss scale)."""
    plain, ctx = build_all()[kind].double(), context()
    ctx.input = ctx.input.double()
    fused = copy.deepcopy(plain)
    h = torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    with as_on_gpu():
        local = fused(h, ctx)
        start = ones(local.loss) if seed == "one" else torch.tensor(8.0, dtype=torch.float64)
        with LaunchCounter() as counter:
            grads = torch.autograd.grad(local.loss, [h, *fused.parameters()], start)
    expected = plain(h, context_like(ctx))
    wanted = torch.autograd.grad(expected.loss, [h, *plain.parameters()], 1.0 * start)
    torch.testing.assert_close(local.loss, expected.loss, rtol=1e-14, atol=0)
    assert [(name, weight) for name, (_, weight) in local.terms.items()] == list(
        (name, weight) for name, (_, weight) in expected.terms.items()
    )
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-13 * float(start))
    if seed == "one" and kind != "predsim":
        # float64 has no kernel for the reconstruction, whose scale is a product then.
        assert counter.by_op["aten::_foreach_mul"] == 0 and counter.by_op["aten::mul"] <= 1


def context_like(ctx):
    return StepContext(ctx.target, ctx.input, ctx.criterion)


def test_a_criterion_that_no_operator_serves_has_its_weight_too():
    ctx, h = context(), torch.randn(4, 8, 4, 4).requires_grad_()
    ctx.criterion = lambda scores, target: torch.nn.functional.multi_margin_loss(scores, target)
    head = build_all()["infopro task"]
    expected = torch.autograd.grad(head(h, ctx).loss, h)[0]
    with as_on_gpu():
        local = head(h, ctx)
        assert local.logits is not None
        assert torch.allclose(torch.autograd.grad(local.loss, h)[0], expected, atol=1e-7)


class Seen(torch.autograd.Function):
    """The loss, and whether the gradient that reaches it is the known one."""

    flags: list = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        Seen.flags.append(is_one(grad))
        return grad


@pytest.mark.parametrize("weights", [(2.0, 0.5), (1.0, 1.0), (2.0,), (1.0,), (0.0, 3.0, 1.0)])
def test_a_weighted_sum_hands_its_gradient_on_as_it_is(weights):
    x = torch.tensor(3.0, requires_grad=True)
    for weighted in (True, False):
        Seen.flags.clear()
        terms = [(str(i), Seen.apply(x * (i + 1)), weight) for i, weight in enumerate(weights)]
        with LaunchCounter() as counter:
            local = (LocalLoss.of_weighted if weighted else LocalLoss.of)(*terms)
        if weighted:
            assert counter.total == (0 if weights == (1.0,) else len(weights))
        assert local.loss == sum(3.0 * (i + 1) * weight for i, weight in enumerate(weights))
        assert [weight for _, weight in local.terms.values()] == list(weights)
        grad = torch.autograd.grad(local.loss, x, ones(local.loss))[0]
        slopes = [1.0] * len(weights) if weighted else weights  # then the values' own backwards have the weights
        assert grad == sum((i + 1) * slope for i, slope in enumerate(slopes))
        if weighted:
            assert Seen.flags == [True] * len(weights)


def test_a_scaled_gradient_leaves_the_value():
    x = torch.tensor(3.0, requires_grad=True)
    assert losses.scaled_gradient(x, 1.0) is x
    y = losses.scaled_gradient(x * x, 0.25)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    assert y == 9 and first == 1.5 and torch.autograd.grad(first, x)[0] == 0.5


def test_the_weight_of_a_classifier_head_is_in_its_loss_and_in_its_gradients():
    ctx = StepContext(target=torch.tensor([0, 2, 1]), input=None, criterion=losses.cross_entropy)
    net, h = nn.Linear(4, 3), torch.randn(3, 4, requires_grad=True)
    plain, weighted = heads.ClassifierHead(net)(h, ctx), heads.ClassifierHead(net, weight=0.25)(h, ctx)
    assert weighted.terms["task"][1] == 0.25
    torch.testing.assert_close(weighted.loss, 0.25 * plain.loss)
    for wanted, got in zip(*(torch.autograd.grad(local.loss, [h, net.weight]) for local in (plain, weighted))):
        torch.testing.assert_close(got, 0.25 * wanted)
