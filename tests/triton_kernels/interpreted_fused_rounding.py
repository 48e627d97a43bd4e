"""Stochastic rounding by the kernels on the CPU, in Triton's interpreter; run by test_fused_rounding.py with
TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal.ops import fused_adamw_
from fastlocal.triton_kernels import fused_adamw, fused_sgd, multi_tensor, optimizer_step
from tests.ops.lists import MANY, bits, clones, draw, same_bits
from tests.ops.test_fused_rounding import (
    FACES,
    HALF,
    RULES,
    SEED,
    SHAPES,
    Exact,
    assert_unbiased,
    leaves,
    rules,
    spoil,
    train,
)
from tests.triton_kernels.interpreter import mend

mend()


def same(case, **options):
    """The reference and the kernel come to the same bits."""
    expected = case.run("reference", **options).written
    got = case.run("triton", **options).written
    assert same_bits(got, expected)
    return got


@rules
@pytest.mark.parametrize("seed", [0, 2**31, SEED])
def test_the_bits_of_the_reference(rule, seed):
    case = Exact(rule)
    got = same(case, seed=seed)
    moved = [(a != b).float().mean() for a, b in zip(got[: len(SHAPES)], case.params) if a.numel() > 500]
    assert all(0 < share < 1 for share in moved)
    same(Exact(rule, average_dtype=torch.float32), seed=seed)


@rules
def test_many_tensors_and_chunks(rule):
    same(Exact(rule, [*MANY[:5], (2048,), (20001,)]))
    case = Exact(rule, [(4, 6, 5, 3)])
    for row in (case.params, case.grads, case.state, case.squares, case.averages):
        row[0] = row[0].to(memory_format=torch.channels_last)
    same(case)


@rules
def test_states_of_several_dtypes(rule):
    """Only what is bfloat16 is rounded at random; the others keep their bits."""
    case = Exact(rule)
    for row in (case.state, case.squares, case.averages):
        row[4], row[8] = row[4].float(), row[8].float()
    got = same(case)
    wide = Exact(rule)
    for row in (wide.state, wide.squares, wide.averages):
        row[:] = [t.float() for t in row]
    n = len(SHAPES)
    kept = same(wide)
    assert torch.equal(got[n + 4], kept[n + 4]) and not torch.equal(got[n + 3].float(), kept[n + 3])


def test_the_ends_of_the_range():
    case = spoil(Exact("sgd"))
    for seed in range(4):
        expected, got = (case.run(impl, seed=seed).params[4] for impl in ("reference", "triton"))
        assert torch.equal(expected.isnan(), got.isnan()) and torch.equal(
            expected.nan_to_num(7.0, float("inf"), -float("inf")), got.nan_to_num(7.0, float("inf"), -float("inf"))
        )
        assert torch.equal(bits(got[6:8]), bits(case.params[4][6:8])) and got[:5].isinf().tolist()[3:] == [True, True]


@rules
def test_other_steps_and_tensors_draw_anew(rule):
    case = Exact(rule, [(500,)] * 2)
    for row in (case.params, case.grads, case.state, case.averages):
        row[1] = row[0].clone()
    case.steps = [torch.tensor(1e6), torch.tensor(1e6)]
    first = same(case)
    case.steps = [torch.tensor(1e6 + 1), torch.tensor(1e6)]
    again = same(case)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@rules
def test_a_skipped_step_leaves_every_bit_and_the_steps(rule):
    case = Exact(rule)
    case.grads[2][5] = float("inf")
    found = torch.zeros(())
    assert same_bits(case.run("triton", found_inf=found, check=True).written, case.written) and found == 1
    assert same_bits(case.run("triton", found_inf=torch.ones(())).written, case.written)


@rules
def test_one_launch_or_two_and_the_steps(rule, monkeypatch):
    """The last program counts, whatever the chunks, also beyond one block of steps; the counter is at rest again."""
    names = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.fn.__name__)
            return self.kernel[grid]

    module = {"sgd": fused_sgd, "adamw": fused_adamw}[rule]
    own = f"fl_fused_{rule}_kernel"
    for where, name in ((module, own), (optimizer_step, "fl_gradients_kernel")):
        monkeypatch.setattr(where, name, Counted(getattr(where, name)))
    monkeypatch.setattr(module, "BLOCK_STEPS", 8)
    case = Exact(rule, MANY[:20])
    new = case.run("triton")
    assert names == [own] and same_bits(new.steps, [s + 1 for s in case.steps])
    names.clear()
    new = case.run("triton", max_norm=1.0)
    assert names == ["fl_gradients_kernel", own] and same_bits(new.steps, [s + 1 for s in case.steps])
    assert all(table[-1] == 0 for table in multi_tensor._tables.entries.values())


@rules
def test_any_arithmetic(rule):
    """The rest of the update is what it is to nearest: at most one unit in the last place from the reference."""
    torch.manual_seed(3)
    p, g, m, a = (draw([(9000,), (31,)], HALF) for _ in range(4))
    out = []
    for impl in ("triton", "reference"):
        lists, more = [clones(x) for x in (p, g, m)], {"momentum": 0.9, "nesterov": True, "steps": list(torch.ones(2))}
        if rule == "adamw":
            lists, more = [*lists, [t.square() for t in m], list(torch.ones(2))], {}
        options = {"rounding": "stochastic", "averages": clones(a), "ema_decay": 0.99, "max_norm": 3.0, **more}
        RULES[rule](*lists, lr=0.03, weight_decay=0.01, impl=impl, **options)
        out.append([*lists[0], *lists[2], *options["averages"]])
    for x, y in zip(*out):
        assert (x != y).sum() <= 8
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-6)


@rules
def test_a_run_of_the_optimizer(rule):
    face, options = FACES[rule]
    made = []
    for impl in ("triton", "reference"):
        params = leaves()
        optimizer = face(params, **options, rounding="stochastic", seed=3, max_norm=1.0, impl=impl)
        train(optimizer, params, range(6))
        made.append((params, [optimizer.state[p]["step"].item() for p in params]))
    assert made[0][1] == made[1][1]
    differing = sum(int((a != b).sum()) for a, b in zip(made[0][0], made[1][0]))
    assert differing <= 4


def test_unbiased():
    n, draws = 40, 200
    torch.manual_seed(0)
    p, g = (torch.randn(n).to(HALF) for _ in range(2))
    m, v = torch.randn(n).to(HALF) * 0.1, torch.rand(n).to(HALF)
    wide = [t.float() for t in (p, g, m, v)]
    rows = [t.repeat(draws) for t in (p, g, m, v)]
    fused_adamw_(*([t] for t in wide), [torch.tensor(3.0)], lr=0.003, impl="reference")
    fused_adamw_(*([t] for t in rows), [torch.tensor(3.0)], lr=0.003, rounding="stochastic", impl="triton")
    for i in (0, 2, 3):
        assert_unbiased(rows[i].view(draws, n).double(), wide[i].double())
