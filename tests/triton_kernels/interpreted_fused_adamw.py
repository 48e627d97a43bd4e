"""The kernels on the CPU, in Triton's interpreter; run by test_fused_adamw.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal.errors import BackendError
from fastlocal.ops import FusedAdamW, fused_adamw_
from fastlocal.triton_kernels import fused_adamw as kernels
from fastlocal.triton_kernels import multi_tensor, optimizer_step
from tests.ops.lists import MANY, SHAPES, clones, draw, same_bits
from tests.ops.test_fused_adamw import OPTIONS, make, options_of, served_by
from tests.triton_kernels.interpreter import mend

mend()
triton = served_by("triton")
SMALL = SHAPES[:-1]
COPIES = {"plain", "all"}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of nan or of a large number: every output element must be written."""
    original = torch.empty

    def fill(*args, **kwargs):
        out = original(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", fill)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that are launched."""
    names = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    for module, name in ((kernels, "fl_fused_adamw_kernel"), (optimizer_step, "fl_gradients_kernel")):
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return names


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ragged_sizes(dtype, name):
    copies = {"copy_dtype": torch.float16} if name in COPIES else {}
    make(name, SMALL, dtype, **copies).check(triton, name, **options_of(name))


def test_many_chunks_and_parts(monkeypatch):
    """More chunks than there are programs in the first launch."""
    for module in (multi_tensor, optimizer_step):
        monkeypatch.setattr(module, "MAX_PARTS", 8)
    make("all", [(40001,), (2048,), (4097,), (3,)]).check(triton, "all", **options_of("all"))


def test_many_tensors_of_mixed_dtypes():
    case = make("all", MANY, copy_dtype=torch.float16)
    for row, every in ((case.grads, 3), (case.state[0], 5), (case.state[1], 4), (case.averages, 7)):
        row[::every] = [t.half() for t in row[::every]]
    case.copies[::2] = [t.float() for t in case.copies[::2]]
    case.check(triton, "mixed", **options_of("all"))


def test_one_launch_or_two(launches):
    make("betas", SMALL).run(triton, **options_of("betas"))
    assert launches == ["fl_fused_adamw_kernel"]
    for name in ("clipped", "all"):
        launches.clear()
        make(name, SMALL).run(triton, **options_of(name))
        assert launches == ["fl_gradients_kernel", "fl_fused_adamw_kernel"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 9])
def test_a_gradient_that_is_not_finite_leaves_every_bit(where, bad):
    case = make("all", SMALL, copy_dtype=torch.float16)
    case.grads[where].view(-1)[-1] = bad
    case.state[0][1].fill_(float("nan"))
    case.averages[2].fill_(float("nan"))
    options = options_of("all")
    got, norm = case.run(triton, **options)
    assert same_bits(got, case.written) and options["found_inf"].item() == 1 and not norm.isfinite()
    del options["max_norm"]
    options["found_inf"].zero_()
    assert same_bits(case.run(triton, **options)[0], case.written) and options["found_inf"].item() == 1


def test_large_gradients_are_finite():
    """The sum of their squares is not: no reason to skip."""
    case = make("plain", SMALL)
    case.grads[0].fill_(3e38)
    found = torch.zeros(1)
    got, _ = case.run(triton, lr=1e-3, found_inf=found, check=True)
    assert found.item() == 0 and not torch.equal(got[1], case.params[1])


def test_a_flag_from_outside(launches):
    case = make("plain", SMALL, average_dtype=torch.float32)
    options = options_of("plain") | {"ema_decay": 0.5}
    for flag in (1.0, 3.0):
        found = torch.full((1,), flag)
        assert same_bits(case.run(triton, found_inf=found, **options)[0], case.written) and found.item() == flag
        assert same_bits(case.run(triton, found_inf=found, check=True, **options)[0], case.written)
        assert found.item() == flag
    found = torch.zeros(())
    got, _ = case.run(triton, found_inf=found, check=True, **options)
    assert same_bits(got, case.run(triton, **options)[0]) and found.item() == 0


def test_without_a_flag_what_is_not_finite_goes_through():
    case = make("clipped", SMALL)
    case.grads[2][3] = float("nan")
    got, norm = case.run(triton, **options_of("clipped"))
    assert norm.isnan() and all(t.isnan().all() for t in got[: len(SMALL)])
    case.grads[2][3] = float("inf")
    got, norm = case.run(triton, **options_of("clipped"))
    assert norm.isinf() and got[2].isnan().sum() == 1 and not got[3].isnan().any()


def test_what_a_graph_may_change():
    """A rate, a decay, a scale and a flag on the device are read at each call."""
    case = make("all", SMALL)
    options = options_of("all") | {"ema_decay": torch.tensor(0.5)}
    case.run(triton, **options)
    for name, value in (("lr", 0.7), ("ema_decay", 0.2), ("grad_scale", 16.0)):
        options[name].fill_(value)
        case.check(triton, name, **options)
    options["found_inf"].fill_(1)
    assert same_bits(case.run(triton, **options)[0], case.written)


def test_nothing_around_is_touched():
    names = ("params", "grads", "means", "squares", "averages")
    whole = {name: torch.rand(9000) for name in names}
    before = {name: t.clone() for name, t in whole.items()}
    views = [(1, 4), (5, 2053), (2059, 4106), (4110, 4111), (5001, 8999)]
    lists = {name: [t[a:b] for a, b in views] for name, t in whole.items()}
    expected = {name: [t[a:b].clone() for a, b in views] for name, t in whole.items()}
    for impl, x in (("triton", lists), ("aten", expected)):
        steps = list(torch.arange(5.0).unbind())
        state = x["params"], x["grads"], x["means"], x["squares"], steps
        fused_adamw_(*state, lr=0.1, averages=x["averages"], ema_decay=0.9, impl=impl)
        assert torch.stack(steps).tolist() == [1, 2, 3, 4, 5]
    inside = torch.zeros(9000, dtype=torch.bool)
    for i, (a, b) in enumerate(views):
        inside[a:b] = True
        for name in names:
            torch.testing.assert_close(lists[name][i], expected[name][i])
    for name in names:
        assert torch.equal(whole[name][~inside], before[name][~inside])


def test_the_last_program_counts_the_steps(monkeypatch):
    """Once for each tensor, whatever its chunks, also of those beyond one block of steps; the counter is at rest again."""
    monkeypatch.setattr(kernels, "BLOCK_STEPS", 16)
    case = make("plain", MANY)
    for _ in range(2):
        got, _ = case.run(triton, **options_of("plain"))
        steps = got[3 * len(MANY) : 4 * len(MANY)]
        assert same_bits(steps, [s + 1 for s in case.state[2]]) and len(steps) > 32
    assert all(table[-1] == 0 for table in multi_tensor._tables.entries.values())


def test_the_corrections_do_not_lose_digits():
    for count in (0, 1, 2, 10, 100, 700, 1000, 10**6):
        p, g = [torch.zeros(1000)], [torch.full((1000,), 0.5)]
        m, v = [torch.full((1000,), 0.5)], [torch.full((1000,), 0.25)]  # they stay; what remains is the corrections
        fused_adamw_(p, g, m, v, [torch.tensor(float(count))], lr=1.0, weight_decay=0.0, eps=0.0, impl="triton")
        expected = -((1 - 0.999 ** (count + 1)) ** 0.5) / (1 - 0.9 ** (count + 1))
        torch.testing.assert_close(p[0].double(), torch.full((1000,), expected).double(), rtol=3e-7, atol=0)


def test_the_average_follows_the_parameter_as_it_is_stored():
    case = make("average", SMALL, torch.float16)
    options = options_of("average") | {"ema_decay": 0.0}
    got, _ = case.run(triton, **options)
    n = len(case.params)
    assert same_bits(got[-n:], [p.float() for p in got[:n]])


def test_channels_last():
    case = make("all", [(4, 6, 5, 3)])
    for row in (case.params, case.grads, *case.state[:2], case.averages):
        row[0] = row[0].to(memory_format=torch.channels_last)
    case.check(triton, "channels_last", **options_of("all"))
    case.grads[0] = case.grads[0].contiguous()
    with pytest.raises(BackendError, match="other strides"):
        case.run(triton, **options_of("all"))


def test_the_same_bits_every_time_and_version_counters():
    case = make("all", SMALL, copy_dtype=torch.float16)
    assert same_bits(case.run(triton, **options_of("all"))[0], case.run(triton, **options_of("all"))[0])
    lists, more = case.arguments()
    tensors = [*lists[0], *lists[2], *lists[3], *lists[4], *more["averages"], *more["copies"]]
    before = [t._version for t in tensors]
    fused_adamw_(*lists, **more, impl="triton", **options_of("all"))
    assert all(t._version > v for t, v in zip(tensors, before))


def test_a_run_of_the_optimizer():
    """Steps with gradients at new places, some of them absent, one not finite, against torch.optim.AdamW."""
    start = draw(SMALL)
    ours, theirs = ([torch.nn.Parameter(p) for p in clones(start)] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    own = FusedAdamW(ours, **options, max_norm=1.0, check=True, impl="triton")
    other = torch.optim.AdamW(theirs, **options)
    for step in range(6):
        grads = draw(SMALL)
        bad = step == 3
        for i, g in enumerate(grads):
            absent = (step + i) % 4 == 0
            ours[i].grad = None if absent else g.clone()
            theirs[i].grad = None if absent else g.clone()
        if bad:
            ours[2].grad[0] = float("nan")
        own.step()
        if not bad:
            norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            torch.testing.assert_close(own.norm, norm)
            other.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_kernels_are_interpreted():
    for kernel in (kernels.fl_fused_adamw_kernel, optimizer_step.fl_gradients_kernel):
        assert type(kernel).__name__ == "InterpretedFunction"
