"""Stochastic rounding of fused_sgd_, fused_adamw_ and their optimizers: the bits, the mean, and what depends on them."""

import copy
import io

import pytest
import torch
from torch import nn

from fastlocal import ops
from fastlocal.errors import ArgumentError
from fastlocal.ops import FusedAdamW, FusedSGD, fused_adamw_, fused_sgd_
from fastlocal.reference import rounding
from fastlocal.reference.rounding import mix, places, random_bits, rounded
from tests.ops.lists import bits, clones, draw, same_bits

HALF = torch.bfloat16
IMPLS = ("aten", "reference")
SHAPES = [(1,), (3,), (63,), (127,), (1000,), (), (0,), (4, 3, 3, 3), (5000,)]
SEED = (5 << 32) + 0xFFFFFFF0
RULES = {"sgd": fused_sgd_, "adamw": fused_adamw_}
FACES = {"sgd": (FusedSGD, {"lr": 0.01, "momentum": 0.9}), "adamw": (FusedAdamW, {"lr": 0.01})}
rules = pytest.mark.parametrize("rule", RULES)


class Exact:
    """An update without a rounding but the last: every backend must come to the same bits. Its new values lie between two
    of bfloat16; the first of the tensors hold what is hard to round."""

    def __init__(self, rule, shapes=SHAPES, average_dtype=HALF):
        made = torch.Generator().manual_seed(1)

        def integers(low, high, unit):
            return [(torch.randint(low, high, s, generator=made) * unit) for s in shapes]

        self.rule = rule
        self.params = [t.to(HALF) for t in integers(-128, 128, 2.0**-7)]
        self.grads = [t + 2.0**-11 for t in integers(-256, 256, 2.0**-10)]  # none is 0
        self.state = [t.to(HALF) for t in integers(-128, 128, 2.0**-7)]
        self.averages = [t.to(average_dtype) for t in integers(-128, 128, 2.0**-7)]
        self.squares = [torch.zeros_like(t) for t in self.state]
        self.steps = [torch.tensor(float(i)) for i in range(len(shapes))]

    @property
    def written(self):
        states = [self.state, self.squares] if self.rule == "adamw" else [self.state]
        return [t for row in (self.params, *states, self.averages, self.steps) for t in row]

    def run(self, impl, seed=SEED, **options):
        new = copy.deepcopy(self)
        options = {"averages": new.averages, "ema_decay": 0.75, "rounding": "stochastic", "seed": seed} | options
        if self.rule == "adamw":  # without memory: each element moves by the rate
            lists = new.params, new.grads, new.state, new.squares, new.steps
            fused_adamw_(*lists, lr=2.0**-13, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, impl=impl, **options)
        else:
            lists = new.params, new.grads, new.state
            fused_sgd_(*lists, lr=2.0**-3, momentum=0.5, steps=new.steps, impl=impl, **options)
        return new


def spoil(case):
    """Ends of the range, on both sides of what rounding to nearest makes inf, and what is not finite."""
    case.params[4][:8] = torch.tensor([3.3895e38, -3.3895e38, 3.3895e38, 1.0, 1.0, 1.0, 0, -0.0])
    case.grads[4][:8] = torch.tensor([-5e36, 5e36, -9e36, -float("inf"), float("inf"), 1.0, 0.0, 0.0])
    case.grads[4].view(torch.int32)[5] = 0x7FFFFFFF  # the nan of a GPU: bits added to it would make it -0
    case.state[4][:8] = 0
    return case


@rules
@pytest.mark.parametrize("average_dtype", [HALF, torch.float32])
def test_the_same_bits_on_every_backend(rule, average_dtype):
    case = Exact(rule, average_dtype=average_dtype)
    if rule == "sgd":
        spoil(case)
    results = [case.run(impl).written for impl in IMPLS]
    assert same_bits(*results)
    changed = results[0][: len(SHAPES)]
    assert same_bits(case.run("aten").params, changed) and not same_bits(case.params, changed)
    for other in (SEED + 1, SEED + (1 << 32)):
        assert not same_bits(case.run("aten", seed=other).params, changed)


@rules
def test_backends_agree_but_for_float32(rule):
    """Any arithmetic: backends differ in the last bits of float32, which decide about one element in thousands."""
    torch.manual_seed(3)
    p, g, m, a = (draw([(40000,)], HALF) for _ in range(4))
    out = []
    for impl in IMPLS:
        lists = [clones(x) for x in (p, g, m)]
        more = {"steps": [torch.tensor(4.0)], "momentum": 0.9}
        if rule == "adamw":
            lists += [[t.square() for t in m], [torch.tensor(4.0)]]
            more = {}
        options = {"rounding": "stochastic", "averages": clones(a), "ema_decay": 0.99, "max_norm": 3.0, **more}
        RULES[rule](*lists, lr=0.03, weight_decay=0.01, impl=impl, **options)
        out.append([*lists[0], *lists[2], *options["averages"]])
    for x, y in zip(*out):
        assert (x != y).sum() <= 20
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-6)


def test_rounded_keeps_what_is_exact_and_what_is_not_finite():
    """For all bits: between its neighbours, up in so many cases as it lies above, no new inf."""
    every = torch.arange(65536)
    high = torch.finfo(HALF).max
    pattern = torch.tensor([0x3F800000, 0x3F800001, 0x3F80C000, 0x3F80FFFF, 0x00004000, 0x7F7E8000]).to(torch.int32)
    for value in pattern.view(torch.float32):
        for v in (value, -value):
            got = rounded(v.expand(65536), HALF, every)
            low_bits = int(v.view(torch.int32)) & 0xFFFF
            down = (v.view(torch.int32) & -65536).view(torch.float32)
            away = got.float() != down
            assert int(away.sum()) == low_bits
            exact = got.double().mean() if abs(v) < 1e30 else None
            assert exact is None or exact == v.double()
    cases = torch.tensor([high, high * 1.001, high * 1.0019, high * 1.0025, float("inf"), 0.0])
    for v in torch.cat([cases, -cases]):
        assert bits(rounded(v.expand(65536), HALF, every)).equal(bits(v.to(HALF).expand(65536)))
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).to(torch.int32).view(torch.float32)
    assert all(rounded(v.expand(65536), HALF, every).isnan().all() for v in nans)
    assert rounded(torch.tensor(1.001), torch.float16, every[3]) == torch.tensor(1.001).half()


def test_the_generator():
    """Known values (the C code of lowbias32), and the spread of the bits over elements, steps, tensors, seeds and words."""
    assert [mix(x) for x in (0, 1, 2, 0xFFFFFFFF)] == [lowbias32(x) for x in (0, 1, 2, 0xFFFFFFFF)]
    assert mix(torch.arange(100, dtype=torch.int64)).tolist() == [mix(i) for i in range(100)]
    n = 1 << 18
    p = torch.empty(n)

    def words(seed=0, number=0, step=1.0):
        return random_bits(p, seed, number, torch.tensor(step))

    rows = [*words(), *words(step=2.0), *words(number=1), *words(seed=1), *words(seed=1 << 32), *words(step=1e6)]
    table = torch.stack(rows)
    assert table.min() >= 0 and table.max() < 65536
    for row in rows:
        for shift in (0, 8):
            counts = torch.bincount((row >> shift) & 255, minlength=256).double()
            chi = ((counts - n / 256).square() / (n / 256)).sum()
            assert 255 - 5.5 * 510**0.5 < chi < 255 + 5.5 * 510**0.5  # mean 255, variance 510
        steps = (row[1:] - row[:-1]) % 256  # of neighbours
        chi = ((torch.bincount(steps, minlength=256) - n / 256).square() / (n / 256)).sum()
        assert chi < 255 + 5.5 * 510**0.5
    centred = (table.double() - 32767.5) / (65536 / 12**0.5)
    correlation = centred @ centred.T / n - torch.eye(len(rows))
    assert correlation.abs().max() < 5.5 / n**0.5
    few = 1 << 16
    flags = torch.stack([(table[:8, :few] >> k) & 1 for k in range(16)]).float().reshape(-1, few) * 2 - 1
    assert (flags @ flags.T / few - torch.eye(len(flags))).abs().max() < 6 / few**0.5  # each bit against each other
    for lag in (1, 2, 32, 256, 2048):
        assert (centred[:, lag:] * centred[:, :-lag]).mean(1).abs().max() < 5.5 / n**0.5
    over_time = torch.stack([random_bits(p[:8], 3, 0, torch.tensor(float(s)))[0] for s in range(4096)]).double()
    assert ((over_time.mean(0) - 32767.5).abs() < 5.5 * 65536 / 12**0.5 / 64).all()


def lowbias32(x):
    """The published C code."""
    x = (x ^ (x >> 16)) & 0xFFFFFFFF
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_elements_are_numbered_by_their_places(monkeypatch):
    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert sorted(places(x).flatten().tolist()) == list(range(120)) and places(x)[0, 1, 0, 0] == 1
    assert places(torch.empty(())) == 0 and places(torch.empty(3, 0)).shape == (3, 0)
    monkeypatch.setattr(rounding, "places", lambda t: torch.tensor([7, 7 + (1 << 32)]))  # of a very large tensor
    a, b = random_bits(torch.empty(2), 0, 0, torch.tensor(1.0))[0].tolist()
    assert a != b


def assert_unbiased(drawn, expected):
    """The mean of the rows, [draws, n], is what is expected; an element that is never rounded up may be so one time more."""
    deviation, n = drawn.std(0), len(drawn)
    error = (drawn.mean(0) - expected) / torch.maximum(deviation / n**0.5, expected.abs() * 2**-8 / n)
    assert error.abs().max() < 5 and error.square().mean() < 2
    assert (deviation > 0).sum() > len(deviation) / 2


@rules
@pytest.mark.parametrize("impl", IMPLS)
def test_unbiased(rule, impl):
    """The mean over many draws of all that is rounded is the value in float32, element by element."""
    n, draws = 60, 2000
    torch.manual_seed(0)
    p, g, m, a = (torch.randn(n).to(HALF) for _ in range(4))
    v = m.square() + 0.01
    wide = [t.float() for t in (p, g, m, v, a)]
    rate, options = 3e-3, {"ema_decay": 0.99, "impl": impl}
    rows = [t.repeat(draws) for t in (p, g, m, v, a)]
    states = slice(2, 4 if rule == "adamw" else 3)

    def step(p, g, m, v, a, **more):
        if rule == "adamw":
            fused_adamw_([p], [g], [m], [v], [torch.tensor(9.0)], lr=rate, averages=[a], **options, **more)
        else:
            count = {"steps": [torch.tensor(9.0)]} if more else {}
            fused_sgd_([p], [g], [m], lr=rate, momentum=0.9, averages=[a], **options, **count, **more)

    step(*wide)
    step(*rows, rounding="stochastic", seed=11)
    # The average follows the rounded parameter, whose mean is the wide one's.
    for got, expected in zip([rows[0], *rows[states], rows[4]], [wide[0], *wide[states], wide[4]]):
        assert_unbiased(got.view(draws, n).double(), expected.double())


@rules
def test_small_updates_add_up(rule):
    """A thousand steps of 1e-4 relative to the weight: to nearest it stays, at random it goes as far as in float32."""
    n = 4000
    start = torch.full((n,), 1.0, dtype=HALF)

    def train(dtype, how):
        p = nn.Parameter(start.to(dtype))
        face, options = FACES[rule]
        optimizer = face([p], **{k: v for k, v in options.items() if k != "momentum"}, rounding=how)
        optimizer.param_groups[0].update(lr=1e-4, weight_decay=0.0)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().double()

    wide, nearest, drawn = train(torch.float32, "nearest"), train(HALF, "nearest"), train(HALF, "stochastic")
    assert (nearest == 1).all() and wide.mean() == pytest.approx(0.9, abs=1e-3)
    # A walk of 1000 roundings, each of a variance below step * spacing: 0.1 * 2**-8 in all.
    spread = (0.1 * 2**-8) ** 0.5
    assert abs(drawn.mean() - wide.mean()) < 5 * spread / n**0.5
    assert 0.3 * spread < drawn.std() < 1.5 * spread


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_squares_fall_again(how):
    """A second moment in bfloat16 cannot shrink by a thousandth of itself to nearest; at random it can."""
    p = nn.Parameter(torch.zeros(2000, dtype=HALF))
    optimizer = FusedAdamW([p], lr=0.0, rounding=how)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    square = optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    for _ in range(500):
        optimizer.step()
    expected = 1.0 if how == "nearest" else 0.999**500
    assert float(square.double().mean()) == pytest.approx(expected, rel=0.01)


@rules
@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_step_leaves_every_bit_and_the_steps(rule, impl):
    case = spoil(Exact(rule))
    case.grads[2][5] = float("inf")
    found = torch.zeros(())
    assert same_bits(case.run(impl, found_inf=found, check=True).written, case.written) and found == 1
    assert same_bits(case.run(impl, found_inf=torch.ones(())).written, case.written)
    new = case.run(impl)
    assert [s.item() for s in new.steps] == [i + 1 for i in range(len(SHAPES))]


@rules
def test_steps_draw_anew(rule):
    """The same weights and gradients twice: other bits; and other bits for equal tensors of one list."""
    case = Exact(rule, [(500,)] * 2)
    for row in (case.params, case.grads, case.state, case.averages):
        row[1] = row[0].clone()
    case.steps = [torch.tensor(3.0), torch.tensor(3.0)]
    once = case.run("aten")
    assert not torch.equal(once.params[0], once.params[1])
    case.steps = [torch.tensor(4.0), torch.tensor(3.0)]
    again = case.run("aten")
    assert not torch.equal(again.params[0], once.params[0]) and torch.equal(again.params[1], once.params[1])


@rules
def test_channels_last(rule):
    """Bits belong to places in memory."""
    case = Exact(rule, [(4, 6, 5, 3)])
    rows = (case.params, case.grads, case.state, case.squares, case.averages)
    for row in rows:
        row[0] = row[0].to(memory_format=torch.channels_last)
    results = [case.run(impl) for impl in IMPLS]
    assert same_bits(results[0].written, results[1].written)
    for row in rows:  # the same memory as a plain tensor
        row[0] = row[0].permute(0, 2, 3, 1)
    plain = case.run("aten")
    assert plain.params[0].is_contiguous() and torch.equal(plain.params[0], results[0].params[0].permute(0, 2, 3, 1))


def leaves():
    made = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(s, generator=made).to(HALF)) for s in [(50,), (7, 3), (), (64,)]]


def train(optimizer, params, steps):
    for step in steps:
        made = torch.Generator().manual_seed(100 + step)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=made).to(HALF)
            p.grad = None if (step + i) % 5 == 4 else g
        optimizer.step()


@rules
def test_a_resumed_run_draws_the_same(rule):
    face, options = FACES[rule]
    options = options | {"rounding": "stochastic", "seed": 2**32 - 1, "max_norm": 1.0}

    def make(params):
        return face([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:]}], **options)

    a = leaves()
    first = make(a)
    train(first, a, range(4))
    file = io.BytesIO()
    torch.save([first.state_dict(), [p.detach() for p in a]], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    twin = copy.deepcopy(first)
    train(first, a, range(4, 9))
    b = [nn.Parameter(w) for w in weights]
    second = make(b)
    second.load_state_dict(state)
    assert all(s["step"].dtype == torch.float32 for s in second.state.values())
    train(second, b, range(4, 9))
    assert same_bits(a, b)
    c = [p for g in twin.param_groups for p in g["params"]]
    train(twin, c, range(4, 9))
    assert same_bits(a, c)
    other = make(d := leaves())
    other.seed = 1
    train(other, d, range(9))
    assert not same_bits(a, d)


@rules
def test_groups_draw_apart(rule):
    face, options = FACES[rule]
    a = [nn.Parameter(torch.full((500,), 1.0, dtype=HALF)) for _ in range(2)]
    optimizer = face([{"params": [p]} for p in a], **options, rounding="stochastic")
    for _ in range(3):
        for p in a:
            p.grad = torch.full_like(p, 0.01)
        optimizer.step()
    assert not torch.equal(a[0], a[1])


@rules
def test_state_goes_to_torch_optim_and_back(rule):
    face, options = FACES[rule]
    a = leaves()
    mine = face(a, **options, rounding="stochastic")
    train(mine, a, range(2))
    theirs = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule](a, **options)
    theirs.load_state_dict(mine.state_dict())
    train(theirs, a, range(2, 3))
    mine.load_state_dict(theirs.state_dict())
    train(mine, a, range(3, 4))
    assert float(mine.state[a[3]]["step"]) >= 2


@rules
def test_version_counters_compile_and_opcheck(rule):
    case = Exact(rule, [(3,), (40,)])
    for impl in IMPLS:
        new = copy.deepcopy(case)
        tensors = [*new.params, *new.state, *new.steps]
        versions = [t._version for t in tensors]
        step(rule, new, impl)
        assert all(t._version > v for t, v in zip(tensors, versions))
    expected, got = copy.deepcopy(case), copy.deepcopy(case)
    step(rule, expected, None)
    compiled = torch.compile(
        lambda p, g, m, v, s: by_rule(rule, p, g, m, v, s, None), fullgraph=True, backend="aot_eager"
    )
    compiled(got.params, got.grads, got.state, got.squares, got.steps)
    assert same_bits(got.written, expected.written)
    lists = [case.params, case.grads, case.state]
    for impl in IMPLS:
        if rule == "adamw":
            args = (*lists, case.squares, case.steps, [], [], None, 0.1, 0.9, 0.9, 1e-8, 0.0, False, None, 0.0, 1.0, None,
                    None, False, 5, impl)  # fmt: skip
        else:
            args = (*lists, [], [], None, 0.1, 0.0, 0.9, 0.0, False, False, False, None, 0.0, 1.0, None, None, False,
                    case.steps, 5, impl)  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.fastlocal, f"fused_{rule}_").default, args)


def by_rule(rule, p, g, m, v, s, impl):
    if rule == "adamw":
        fused_adamw_(p, g, m, v, s, lr=0.01, rounding="stochastic", impl=impl)
    else:
        fused_sgd_(p, [x * 1 for x in g], m, lr=0.01, momentum=0.9, steps=s, rounding="stochastic", impl=impl)
    return p[0] + 1


def step(rule, case, impl):
    by_rule(rule, case.params, case.grads, case.state, case.squares, case.steps, impl)


def test_explain_and_refusals():
    p, f, t = [torch.ones(3, dtype=HALF)], [torch.ones(3)], [torch.zeros(())]
    choice = ops.explain(fused_sgd_, p, p, rounding="stochastic")
    assert choice.chosen == "aten"
    stochastic = {"lr": 0.1, "rounding": "stochastic"}
    for run, words in [
        (lambda: fused_sgd_(f, f, steps=t, **stochastic), r"params\[0\] is torch.float32; rounding='stochastic' takes"),
        (lambda: fused_adamw_(f, f, f, f, t, **stochastic), r"params\[0\] is torch.float32"),
        (lambda: fused_sgd_(p, p, **stochastic), "steps has 0 tensors"),
        (lambda: fused_sgd_(p, p, lr=0.1, steps=t), "steps has 1 tensors.*none with 'nearest'"),
        (lambda: fused_sgd_(p, p, steps=[torch.zeros(2)], **stochastic), r"steps\[0\] is torch.float32 \[2\]"),
        (lambda: fused_sgd_(p, p, steps=t, copies=f, **stochastic), "copies are given"),
        (lambda: fused_sgd_(p, p, steps=t, seed=-1, **stochastic), "seed=-1"),
        (lambda: fused_sgd_(p, p, lr=0.1, rounding="up"), "rounding='up'"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            run()
    for face in (FusedSGD, FusedAdamW):
        for params, options, words in [
            ([nn.Parameter(f[0])], {}, r"params\[0\] is torch.float32"),
            ([nn.Parameter(p[0])], {"master": True}, "master=True"),
            ([nn.Parameter(p[0])], {"seed": 2**32}, "seed="),
            ([nn.Parameter(p[0])], {"rounding": "down"}, "rounding='down'"),
        ]:
            with pytest.raises(ArgumentError, match=words):
                face(params, **{"rounding": "stochastic"} | options)
