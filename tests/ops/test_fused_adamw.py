import itertools
import sys

import pytest
import torch

from fastlocal import ops, reference
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import fused_adamw_
from tests.ops.lists import MANY, SHAPES, Update, clones, draw, same_bits

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.fused_adamw_.default
MODULE = sys.modules["fastlocal.ops.fused_adamw"]

# Everything an update may have, and all of it at once.
OPTIONS = {
    "plain": {"weight_decay": 0.0},
    "weight decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.99), "eps": 1e-3, "maximize": True},
    "no memory": {"betas": (0.0, 0.0)},
    "rate on the device": {"lr": torch.tensor(0.3)},
    "clipped": {"max_norm": 0.5},
    "short enough": {"max_norm": 1e6},
    "scaled": {"grad_scale": torch.tensor(1024.0)},
    "average": {"ema_decay": 0.9},
    "average by a tensor": {"ema_decay": torch.tensor(0.4, dtype=torch.float64)},
    "all": {
        "betas": (0.8, 0.95), "weight_decay": 0.01, "maximize": True, "max_norm": 2.0, "ema_decay": 0.99,
        "grad_scale": torch.tensor(3.0), "check": True, "lr": torch.tensor(0.1),
    },
}  # fmt: skip


def options_of(name):
    options = {"lr": 0.1} | OPTIONS[name]
    if options.get("check"):
        options["found_inf"] = torch.zeros(())
    return options


def make(name, shapes=SHAPES, dtype=torch.float32, **dtypes):
    options = OPTIONS[name]
    if "ema_decay" in options:
        dtypes.setdefault("average_dtype", torch.float64 if dtype == torch.float64 else torch.float32)
    return Update("adamw", shapes, dtype, **dtypes)


def served_by(impl):
    return lambda *args, **options: fused_adamw_(*args, impl=impl, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_sizes(impl, name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        make(name, dtype=dtype).check(served_by(impl), f"{name} {dtype}", **options_of(name))


@pytest.mark.parametrize("name", ["all", "plain"])
def test_many_tensors(name):
    for impl in IMPLS:
        make(name, MANY).check(served_by(impl), name, **options_of(name))


def test_float32_masters_of_half_precision_weights():
    for half, name in itertools.product((torch.bfloat16, torch.float16), ("all", "plain", "plain")):
        case = make(name, grad_dtype=half, copy_dtype=half)
        assert ops.explain(fused_adamw_, case.params, case.grads, *case.state[:2]).chosen == "reference"
        case.check(served_by(None), f"{name} {half}", **options_of(name))
        got, _ = case.run(served_by(None), **options_of(name))
        n = len(case.params)
        assert same_bits(got[-n:], [p.to(half) for p in got[:n]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 5, len(SHAPES) - 1])
def test_a_gradient_that_is_not_finite_leaves_every_bit(where, bad, impl):
    for dtype in (torch.float32, torch.bfloat16):
        case = make("all", dtype=dtype, copy_dtype=torch.bfloat16)  # the copies are full of nan
        case.grads[where].view(-1)[-1] = bad
        case.state[0][1].fill_(float("nan"))
        case.averages[2].fill_(float("nan"))
        options = options_of("all")
        got, _ = case.run(served_by(impl), **options)
        assert same_bits(got, case.written) and options["found_inf"].item() == 1
    assert "nan" in str(got[-1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_flag_from_outside(impl):
    case = make("plain", average_dtype=torch.float32)
    options = options_of("plain") | {"ema_decay": 0.5}
    for flag in (1.0, 3.0):
        found = torch.full((1,), flag)
        got, _ = case.run(served_by(impl), found_inf=found, **options)
        assert same_bits(got, case.written) and found.item() == flag
    got, _ = case.run(served_by(impl), found_inf=torch.zeros(()), **options)
    assert same_bits(got, case.run(served_by(impl), **options)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_flag_what_is_not_finite_goes_through(impl):
    case = make("clipped")
    case.grads[2][3] = float("nan")
    got, norm = case.run(served_by(impl), **options_of("clipped"))
    assert norm.isnan() and all(t.isnan().all() for t in got[: len(case.params)])  # as clip_grad_norm_ does
    case.grads[2][3] = float("inf")
    got, norm = case.run(served_by(impl), **options_of("clipped"))
    assert norm.isinf() and got[2].isnan().sum() == 1 and not got[3].isnan().any()


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("scaled", "all", "average by a tensor")])
def test_the_bits_of_pytorch(name):
    """Where the arithmetic is the same: its fused SGD, after its clip_grad_norm_ and before its foreach lerp."""
    options = options_of(name)
    case = make(name)
    got, _ = case.run(served_by("aten"), **options)
    n = len(case.params)
    params, grads, *state = (clones(x) for x in (case.params, case.grads, *case.state, case.averages))
    *state, averages = state
    if "max_norm" in options:
        leaves = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(leaves, grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(leaves, options["max_norm"])
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    own = {
        "weight_decay": options.get("weight_decay", 0.01),
        "eps": options.get("eps", 1e-8),
        "maximize": "betas" in options and name == "betas",
    }
    means, squares, steps = state
    torch._foreach_add_(steps, 1)
    torch._fused_adamw_(
        params, grads, means, squares, [], steps, lr=options["lr"], beta1=beta1, beta2=beta2, amsgrad=False, **own
    )
    if averages:
        torch._foreach_lerp_(averages, params, 1 - options["ema_decay"])
    assert same_bits(got, [*params, *means, *squares, *steps, *averages]) and len(got) % n == 0


@pytest.mark.parametrize("impl", [None, *IMPLS, "triton"])
def test_nothing_to_do(impl):
    assert fused_adamw_([], [], [], [], [], lr=0.1, impl=impl) is None
    assert fused_adamw_([], [], [], [], [], lr=0.1, max_norm=1.0, impl=impl).item() == 0
    assert reference.fused_adamw_([], [], [], [], [], lr=0.1) is None


def test_any_strides():
    plain = make("all", [(4, 6, 5, 5)])
    expected, _ = plain.run(served_by("reference"), **options_of("all"))
    for attribute in ("params", "grads", "averages"):
        case = make("all", [(4, 6, 5, 5)])
        case.params, case.grads, case.state, case.averages = plain.params, plain.grads, plain.state, plain.averages
        setattr(case, attribute, [t.to(memory_format=torch.channels_last) for t in getattr(case, attribute)])
        chosen = ops.explain(fused_adamw_, case.params, case.grads, *case.state[:2]).chosen
        assert chosen == ("aten" if attribute == "averages" else "reference")
        got, _ = case.run(served_by(None), **options_of("all"))
        for g, e in zip(got, expected):
            torch.testing.assert_close(g, e)


def test_the_average_follows_the_parameter_as_it_is_stored():
    case = make("average", SHAPES, torch.float16)
    options = options_of("average") | {"ema_decay": 0.0}
    got, _ = case.run(served_by(None), **options)
    n = len(case.params)
    assert same_bits(got[-n:], [p.float() for p in got[:n]])


def test_version_counters():
    case = make("all", copy_dtype=torch.bfloat16)
    for impl in IMPLS:
        lists, more = case.arguments()
        tensors = [*lists[0], *lists[2], *lists[3], *lists[4], *more["averages"], *more["copies"]]
        before = [t._version for t in tensors]
        fused_adamw_(*lists, **more, impl=impl, **options_of("all"))
        assert all(t._version > v for t, v in zip(tensors, before))


def call(name, impl, dtype=torch.float32):
    """Arguments of the registered operator."""
    case = make(name, [(3,), (2, 4)], dtype)
    o = options_of(name)
    lr = o["lr"]
    rate = (lr, 0.0) if isinstance(lr, torch.Tensor) else (None, lr)
    return (
        case.params, case.grads, *case.state, case.averages, case.copies, *rate, *o.get("betas", (0.9, 0.999)), 1e-8,
        o.get("weight_decay", 0.01), o.get("maximize", False), None, o.get("ema_decay", 0.0), o.get("max_norm"),
        o.get("grad_scale"), o.get("found_inf"), o.get("check", False), None, impl,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    for name in ("plain", "clipped", "all"):
        torch.library.opcheck(OPERATOR, call(name, impl))
    torch.library.opcheck(OPERATOR, call("plain", impl, torch.bfloat16))


def test_compiled():
    def step(params, grads, means, squares, steps, found):
        norm = fused_adamw_(
            params, [g * 2 for g in grads], means, squares, steps, lr=0.1, max_norm=1.0, found_inf=found, check=True
        )
        return norm + params[0].sum()

    case = make("plain", [(3,), (40,)])
    args = [*case.arguments()[0], torch.zeros(())]
    again = [clones(x) if isinstance(x, list) else x.clone() for x in args]
    expected = step(*args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*again)
    assert torch.equal(got, expected)
    for a, b in zip(args, again):
        assert same_bits(a, b) if isinstance(a, list) else torch.equal(a, b)


def test_the_corrections_do_not_lose_digits():
    """A first step from zero moves each element by the rate, whatever its gradient; float32 powers would not."""
    for impl in IMPLS:
        for count in (0.0, 1.0, 10.0, 1000.0, 1e6):
            p, g = [torch.zeros(1000)], draw([(1000,)])
            m, v = [g[0] * (1 - 0.9 ** (count + 1))], [g[0].square().double().mul(1 - 0.999 ** (count + 1)).float()]
            m[0] = (m[0] - 0.1 * g[0]) / 0.9
            v[0] = (v[0] - 0.001 * g[0].square()) / 0.999
            fused_adamw_(p, g, m, v, [torch.tensor(count)], lr=1.0, weight_decay=0.0, eps=0.0, impl=impl)
            torch.testing.assert_close(p[0], -g[0].sign(), rtol=3e-5 if count == 0 else 3e-6, atol=0)


def test_explain_and_refusals():
    a, b, t = [torch.ones(3)], [torch.ones(3)], [torch.zeros(())]
    choice = ops.explain(fused_adamw_, a, a, b, b, t)
    assert choice.chosen == "aten" and "cpu" in dict(choice.rejected)["triton"]
    for args, options, words in [
        ((a, [], b, b, t), {}, "grads has 0 tensors"),
        ((a, a, [torch.ones(4)], b, t), {}, r"exp_avgs\[0\] has shape \[4\]"),
        ((a, a, b, [torch.ones(3, dtype=torch.int64)], t), {}, r"exp_avg_sqs\[0\] is torch.int64"),
        ((a, a, b, b, []), {}, "steps has 0 tensors"),
        ((a, a, b, b, [torch.zeros((), dtype=torch.int64)]), {}, r"steps\[0\] is torch.int64"),
        ((a, a, b, b, t), {"betas": (1.0, 0.9)}, r"betas\[0\]=1.0"),
        ((a, a, b, b, t), {"averages": b}, "ema_decay"),
        ((a, a, b, b, t), {"check": True}, "found_inf"),
        ((a, a, b, b, t), {"impl": "gpu"}, "gpu"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            fused_adamw_(*args, **{"lr": 0.1} | options)
    with pytest.raises(BackendError, match="cpu"):
        fused_adamw_(a, a, b, b, t, lr=0.1, impl="triton")
    with pytest.raises(BackendError, match="one dtype"):
        fused_adamw_(a, [torch.ones(3).half()], b, b, t, lr=0.1, impl="aten")
