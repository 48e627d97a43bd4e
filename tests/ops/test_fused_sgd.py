import itertools
import sys

import pytest
import torch

from fastlocal import ops, reference
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import fused_sgd_
from tests.ops.lists import MANY, SHAPES, Update, clones, draw, same_bits

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.fused_sgd_.default
MODULE = sys.modules["fastlocal.ops.fused_sgd"]

# Everything an update may have, and all of it at once.
OPTIONS = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    "first": {"momentum": 0.9, "dampening": 0.3, "first": True},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "rate on the device": {"lr": torch.tensor(0.3)},
    "clipped": {"max_norm": 0.5, "momentum": 0.9},
    "short enough": {"max_norm": 1e6},
    "scaled": {"grad_scale": torch.tensor(1024.0), "momentum": 0.9},
    "average": {"ema_decay": 0.9},
    "average by a tensor": {"ema_decay": torch.tensor(0.4, dtype=torch.float64), "momentum": 0.5},
    "all": {
        "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True, "max_norm": 2.0, "ema_decay": 0.99,
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
    return Update("sgd", shapes, dtype, momentum="momentum" in options, **dtypes)


def served_by(impl):
    return lambda *args, **options: fused_sgd_(*args, impl=impl, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_ragged_sizes(impl, name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if impl == "aten" and dtype in (torch.bfloat16, torch.float16) and not MODULE._updates_half():
            with pytest.raises(BackendError, match="half precision"):
                make(name, dtype=dtype).run(served_by(impl), **options_of(name))
            continue
        make(name, dtype=dtype).check(served_by(impl), f"{name} {dtype}", **options_of(name))


@pytest.mark.parametrize("name", ["all", "plain"])
def test_many_tensors(name):
    for impl in IMPLS:
        make(name, MANY).check(served_by(impl), name, **options_of(name))


def test_float32_masters_of_half_precision_weights():
    for half, name in itertools.product((torch.bfloat16, torch.float16), ("all", "momentum", "plain")):
        case = make(name, grad_dtype=half, copy_dtype=half)
        assert ops.explain(fused_sgd_, case.params, case.grads).chosen == "reference"
        case.check(served_by(None), f"{name} {half}", **options_of(name))
        got, _ = case.run(served_by(None), **options_of(name))
        n = len(case.params)
        assert same_bits(got[-n:], [p.to(half) for p in got[:n]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 5, len(SHAPES) - 1])
def test_a_gradient_that_is_not_finite_leaves_every_bit(where, bad, impl):
    for dtype in (torch.float32, torch.bfloat16 if impl == "reference" else torch.float64):
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
    case = make("momentum", average_dtype=torch.float32)
    options = options_of("momentum") | {"ema_decay": 0.5}
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
    params, grads, averages = (clones(x) for x in (case.params, case.grads, case.averages))
    buffers = clones(case.state[0]) if case.state else []
    if "max_norm" in options:
        leaves = [torch.nn.Parameter(p) for p in params]
        for p, g in zip(leaves, grads):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(leaves, options["max_norm"])
    defaults = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False}
    own = defaults | {k: v for k, v in options.items() if k in defaults}
    torch._fused_sgd_(params, grads, buffers, lr=options["lr"], is_first_step=options.get("first", False), **own)
    if averages:
        torch._foreach_lerp_(averages, params, 1 - options["ema_decay"])
    assert same_bits(got, [*params, *buffers, *averages]) and len(got) % n == 0


@pytest.mark.parametrize("impl", [None, *IMPLS, "triton"])
def test_nothing_to_do(impl):
    assert fused_sgd_([], [], lr=0.1, impl=impl) is None
    assert fused_sgd_([], [], lr=0.1, max_norm=1.0, impl=impl).item() == 0
    assert reference.fused_sgd_([], [], lr=0.1) is None


def test_any_strides():
    plain = make("all", [(4, 6, 5, 5)])
    expected, _ = plain.run(served_by("reference"), **options_of("all"))
    for attribute in ("params", "grads", "averages"):
        case = make("all", [(4, 6, 5, 5)])
        case.params, case.grads, case.state, case.averages = plain.params, plain.grads, plain.state, plain.averages
        setattr(case, attribute, [t.to(memory_format=torch.channels_last) for t in getattr(case, attribute)])
        chosen = ops.explain(fused_sgd_, case.params, case.grads, case.state[0]).chosen
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
        tensors = [*lists[0], *lists[2], *more["averages"], *more["copies"]]
        before = [t._version for t in tensors]
        fused_sgd_(*lists, **more, impl=impl, **options_of("all"))
        assert all(t._version > v for t, v in zip(tensors, before))


def call(name, impl, dtype=torch.float32):
    """Arguments of the registered operator."""
    case = make(name, [(3,), (2, 4)], dtype)
    o = options_of(name)
    lr = o["lr"]
    rate = (lr, 0.0) if isinstance(lr, torch.Tensor) else (None, lr)
    momentum, buffers = o.get("momentum", 0.0), case.state[0] if case.state else []
    return (
        case.params, case.grads, buffers, case.averages, case.copies, *rate, o.get("weight_decay", 0.0), momentum,
        o.get("dampening", 0.0), o.get("nesterov", False), o.get("maximize", False), o.get("first", False), None,
        o.get("ema_decay", 0.0), o.get("max_norm"), o.get("grad_scale"), o.get("found_inf"), o.get("check", False),
        [], None, impl,
    )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    for name in ("plain", "nesterov", "clipped", "all"):
        torch.library.opcheck(OPERATOR, call(name, impl))
    torch.library.opcheck(OPERATOR, call("momentum", "auto", torch.bfloat16))


def test_compiled():
    def step(params, grads, buffers, found):
        norm = fused_sgd_(
            params, [g * 2 for g in grads], buffers, lr=0.1, momentum=0.9, max_norm=1.0, found_inf=found, check=True
        )
        return norm + params[0].sum()

    args = [draw([(3,), (40,)]), draw([(3,), (40,)]), draw([(3,), (40,)]), torch.zeros(())]
    again = [clones(x) if isinstance(x, list) else x.clone() for x in args]
    expected = step(*args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*again)
    assert torch.equal(got, expected)
    for a, b in zip(args, again):
        assert same_bits(a, b) if isinstance(a, list) else torch.equal(a, b)


def test_explain_and_refusals():
    a, b = [torch.ones(3)], [torch.ones(3)]
    choice = ops.explain(fused_sgd_, a, a)
    assert choice.chosen == "aten" and "cpu" in dict(choice.rejected)["triton"]
    for args, options, words in [
        ((a, []), {}, "grads has 0 tensors"),
        ((a, [torch.ones(4)]), {}, r"grads\[0\] has shape \[4\]"),
        ((a, [torch.ones(3, device="meta")]), {}, "meta"),
        ((a, [torch.ones(3).to_sparse()]), {}, r"grads\[0\] is torch.float32, torch.sparse_coo"),
        ((a, [torch.ones(3, dtype=torch.int64)]), {}, r"grads\[0\] is torch.int64"),
        ((a, a, b), {}, "momentum_buffers are given"),
        ((a, a), {"momentum": 0.9}, "momentum_buffers has 0"),
        ((a, a), {"nesterov": True}, "nesterov=True"),
        ((a, a, b), {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, "nesterov=True"),
        ((a, a), {"averages": b}, "ema_decay"),
        ((a, a), {"averages": b + b, "ema_decay": 0.9}, "averages has 2"),
        ((a, a), {"copies": [torch.ones(2)]}, r"copies\[0\]"),
        ((a, a), {"check": True}, "found_inf"),
        ((a, a), {"max_norm": 0.0}, "max_norm=0.0"),
        ((a, a), {"grad_scale": torch.ones(2)}, "grad_scale"),
        ((a, a), {"found_inf": torch.ones((), dtype=torch.int64)}, "found_inf"),
        ((a, a), {"lr": torch.ones(2)}, "lr is"),
        ((a, a), {"impl": "gpu"}, "gpu"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            fused_sgd_(*args, **{"lr": 0.1} | options)
    with pytest.raises(BackendError, match="cpu"):
        fused_sgd_(a, a, lr=0.1, impl="triton")
    with pytest.raises(BackendError, match="one dtype"):
        fused_sgd_(a, [torch.ones(3).double()], lr=0.1, impl="aten")
