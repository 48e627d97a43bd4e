"""FusedSGD and FusedAdamW as torch.optim.Optimizers: against torch.optim, and what they add to it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.errors import ArgumentError
from fastlocal.ops import FusedAdamW, FusedSGD
from tests.ops.lists import bits, same_bits

SGD = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAMW = {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}
PAIRS = {
    "sgd": (FusedSGD, torch.optim.SGD, SGD),
    "plain": (FusedSGD, torch.optim.SGD, {"lr": 0.1}),
    "dampening": (FusedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "adamw": (FusedAdamW, torch.optim.AdamW, ADAMW),
}
each = pytest.mark.parametrize("name", PAIRS)
stateful = pytest.mark.parametrize("name", ["sgd", "dampening", "adamw"])
SHAPES = [(33,), (3, 5), (), (64, 3), (2, 3, 2, 2)]


def leaves(dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=made).to(dtype)) for s in SHAPES]


def give(params, step, skip=()):
    made = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=made).to(p.dtype)
        p.grad = None if i in skip else g


def two_groups(params):
    return [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:], "lr": 0.03}]


@each
@pytest.mark.parametrize("groups", [list, two_groups])
def test_the_bits_of_the_fused_optimizer(name, groups):
    ours, theirs, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(groups(a), **options), theirs(groups(b), fused=True, **options)
    for step in range(6):
        give(a, step, skip=(step % 3,) if step > 1 else ())  # absent gradients; PyTorch's must have begun before
        give(b, step, skip=(step % 3,) if step > 1 else ())
        assert mine.step(lambda: 7) == 7
        other.step()
    assert same_bits(a, b)
    for p, q in zip(a, b):
        assert mine.state[p].keys() == other.state[q].keys()
        for key, value in mine.state[p].items():
            assert torch.equal(value, other.state[q][key]), key


@each
def test_like_the_plain_optimizer(name):
    ours, theirs, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(a, **options), theirs(b, foreach=False, **options)
    for step in range(6):
        for params in (a, b):
            give(params, step, skip=(step % 4, 2))
        mine.step()
        other.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)
    assert a[2] not in mine.state


@stateful
@pytest.mark.parametrize("direction", ["from torch", "to torch", "own"])
@pytest.mark.parametrize("fused", [None, True])
def test_state_dicts_are_interchangeable(name, direction, fused):
    ours, theirs, options = PAIRS[name]
    make_own, make_theirs = (lambda p: ours(p, **options)), (lambda p: theirs(p, fused=fused, **options))
    source, target = {
        "from torch": (make_theirs, make_own), "to torch": (make_own, make_theirs), "own": (make_own, make_own)
    }[direction]  # fmt: skip
    a = leaves()
    first = source(a)
    for step in range(3):
        give(a, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    b = [nn.Parameter(p.detach().clone()) for p in a]
    second = target(b)
    second.load_state_dict(torch.load(file, weights_only=True))
    keys = {"exp_avg", "exp_avg_sq", "step"} if name == "adamw" else {"momentum_buffer"}
    assert all(second.state[p].keys() == keys for p in b)
    for step in range(3, 6):
        for params, optimizer in ((a, first), (b, second)):
            give(params, step)
            optimizer.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, torch.zeros_like(p))


@stateful
def test_copies_and_pickles_go_on(name):
    ours, _, options = PAIRS[name]
    a = leaves()
    mine = ours(a, **options, max_norm=1.0, check=True)
    give(a, 0)
    mine.step()
    for twin in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        b = twin.param_groups[0]["params"]
        assert twin.max_norm == 1.0 and twin.check and twin._step_supports_amp_scaling
        before = [p.detach().clone() for p in a]
        saved = copy.deepcopy(mine.state_dict())
        for params, optimizer in ((a, mine), (b, twin)):
            give(params, 1)
            optimizer.step()
        assert same_bits(a, b)
        for p, old in zip(a, before):
            p.data.copy_(old)
        mine.load_state_dict(saved)


@each
@pytest.mark.parametrize("groups", [list, two_groups])
def test_clipping_by_the_norm_of_all(name, groups):
    ours, theirs, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(groups(a), **options, max_norm=0.5), theirs(groups(b), **options)
    for step in range(3):
        give(a, step)
        give(b, step)
        mine.step()
        norm = nn.utils.clip_grad_norm_(b, 0.5)
        other.step()
        torch.testing.assert_close(mine.norm, norm)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)


@each
@pytest.mark.parametrize("groups", [list, two_groups])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_is_skipped_whole(name, groups, first):
    ours, _, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(groups(a), **options, check=True), ours(groups(b), **options)
    averages = [torch.zeros_like(p) for p in a]
    mine.link(zip(a, averages), 0.5)
    for step in range(4):
        give(a, step)
        give(b, step)
        bad = step == (0 if first else 2)
        if bad:
            a[3].grad[5, 1] = float("inf")
            before = [t.detach().clone() for t in (*a, *averages)]
        mine.step()
        if bad:
            assert same_bits(before, [*a, *averages])
        else:
            other.step()
    assert same_bits(a, b)
    assert all(torch.equal(mine.state[p][k], other.state[q][k]) for p, q in zip(a, b) for k in other.state[q])


@each
def test_grad_scaler(name):
    """torch.amp.GradScaler leaves unscaling and skipping to it."""
    ours, theirs, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(a, **options), theirs(b, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step in range(5):
        scale = scaler.get_scale()
        scaler.scale(torch.zeros((), requires_grad=True))  # begins
        give(a, step)
        give(b, step)
        for p in a:
            p.grad *= scale
        if step == 2:
            a[0].grad[0] = float("nan")
        else:
            other.step()
        scaler.step(mine)
        scaler.update()
        assert scaler.get_scale() == scale * (0.5 if step == 2 else 2)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)


@each
def test_averages_in_the_same_pass(name):
    ours, _, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(a, **options), ours(b, **options)
    averages, expected = ([p.detach().clone() for p in leaves(seed=1)] for _ in range(2))
    decay = torch.tensor(0.5)
    mine.link(list(zip(a, averages))[1:], decay)
    for step, value in enumerate((0.5, 0.9, 0.0)):
        decay.fill_(value)
        give(a, step)
        give(b, step)
        mine.step()
        other.step()
        fl.ops.ema_update_(expected[1:], b[1:], decay)
    assert same_bits(a, b) and same_bits(averages, expected)


@each
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_masters_of_half_precision_parameters(name, half):
    """Small updates add up, which they do not in half precision; the state comes back in float32."""
    ours, theirs, options = PAIRS[name]
    options = options | {"lr": 1e-4}
    a, b = leaves(half), [nn.Parameter(p.detach().float()) for p in leaves(half)]
    a.append(nn.Parameter(torch.ones(5)))  # one that needs no master
    b.append(nn.Parameter(torch.ones(5)))
    mine, other = ours(a, **options, master=True), theirs(b, **options)
    for step in range(8):
        give(a, step % 2)
        for p, q in zip(a, b):
            q.grad = p.grad.float()
        mine.step()
        other.step()
        if step == 4:
            saved = copy.deepcopy(mine.state_dict())
            a = [nn.Parameter(p.detach().clone()) for p in a]
            mine = ours(a, **options, master=True)
            mine.load_state_dict(saved)
    for p, q in zip(a[:-1], b):
        master = mine.state[p]["master"]
        torch.testing.assert_close(master, q.detach())
        assert torch.equal(p, master.to(half))
        assert all(v.dtype == torch.float32 for v in mine.state[p].values())
    assert "master" not in mine.state[a[-1]]
    torch.testing.assert_close(a[-1], b[-1])


@each
def test_schedulers_and_rates_on_the_device(name):
    ours, theirs, options = PAIRS[name]
    a, b = leaves(), leaves()
    mine, other = ours(a, **options | {"lr": torch.tensor(0.1)}), theirs(b, **options | {"lr": 0.1})
    rate = mine.param_groups[0]["lr"]
    for optimizer in (mine, other):
        optimizer.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(4):
        for params, optimizer in ((a, mine), (b, other)):
            give(params, step)
            optimizer.step()
            optimizer.scheduler.step()
    assert mine.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.1 / 16)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q)


@stateful
@pytest.mark.parametrize("on_device", [True, False])
def test_inside_the_engine(name, on_device):
    """One fused optimizer a block, the same losses and weights as torch.optim's; skipped where a loss is not finite."""
    ours, theirs, options = PAIRS[name]
    made = []
    for make in (lambda n: ours(n, **options), lambda n: theirs(n, **options)):
        torch.manual_seed(0)
        net = fl.models.ResNetCIFAR(1, width=8)
        model = fl.localize(net, "dgl", blocks=2, sample=torch.randn(2, 3, 16, 16))
        engine = fl.Engine(model, make, nonfinite="skip")
        engine._guard.waits = on_device  # as on a GPU: the flag is a tensor that nobody reads
        made.append(engine)
    for step in range(3):
        torch.manual_seed(step + 1)
        x, y = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
        if step == 1:
            x[0, 0, 0, 0] = float("nan")
        for engine in made:
            engine.step(x, y)
    for p, q in zip(made[0].model.parameters(), made[1].model.parameters()):
        torch.testing.assert_close(p, q)
        assert p.isfinite().all()
    state = made[0].state_dict()
    made[0].load_state_dict(state)


def test_no_gradient_at_all_and_refusals():
    a = leaves()
    for kind in (FusedSGD, FusedAdamW):
        mine = kind(a, max_norm=1.0, check=True)
        before = [p.detach().clone() for p in a]
        mine.step()
        assert (
            mine.norm is None
            and not mine.state
            and all(torch.equal(bits(p.detach()), bits(q)) for p, q in zip(a, before))
        )
        with pytest.raises(ArgumentError, match="max_norm=0"):
            kind(a, max_norm=0)
        with pytest.raises(ArgumentError, match="impl='gpu'"):
            kind(a, impl="gpu")
        with pytest.raises(ValueError, match="learning rate"):
            kind(a, lr=-1.0)
    other = torch.optim.AdamW(a, amsgrad=True)
    with pytest.raises(ArgumentError, match="amsgrad"):
        FusedAdamW(a).load_state_dict(other.state_dict())
