"""ema_update_, fused_sgd_ and fused_adamw_ on the device: the error rule, skipped steps, graphs, equal bits, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlocal import ops
from fastlocal.ops import FusedAdamW, FusedSGD, ema_update_, fused_adamw_, fused_sgd_
from tests.gpu.device import DEVICE, INTERPRETED, MARKS, ON_CUDA, no_sync
from tests.ops.lists import MANY, SHAPES, Update, check_lists, clones, draw, same_bits
from tests.ops.test_fused_rounding import Exact

pytestmark = MARKS
IMPL = "triton" if ON_CUDA or INTERPRETED else "reference"
HALF = torch.bfloat16 if ON_CUDA else torch.float16  # the interpreter computes bfloat16 wrongly
SIZES = SHAPES if ON_CUDA else SHAPES[:-1]
RULES: dict[str, Any] = {"sgd": fused_sgd_, "adamw": fused_adamw_}
FACES: dict[str, Any] = {"sgd": FusedSGD, "adamw": FusedAdamW}
rules = pytest.mark.parametrize("rule", RULES)


def served(rule: str) -> Any:
    return lambda *args, **options: RULES[rule](*args, impl=IMPL, **options)


def options_of(rule: str, **more: Any) -> dict[str, Any]:
    own = {"momentum": 0.9, "nesterov": True} if rule == "sgd" else {"betas": (0.8, 0.99)}
    return {"lr": torch.tensor(0.1, device=DEVICE), "weight_decay": 0.01, **own, **more}


def everything(rule: str) -> dict[str, Any]:
    return options_of(
        rule,
        max_norm=1.0,
        ema_decay=torch.tensor(0.9, device=DEVICE),
        grad_scale=torch.tensor(8.0, device=DEVICE),
        found_inf=torch.zeros((), device=DEVICE),
        check=True,
    )


@rules
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
@pytest.mark.parametrize("full", [False, True])
def test_the_error_rule(rule: str, dtype: torch.dtype, full: bool) -> None:
    for shapes in (SIZES, MANY):
        case = Update(rule, shapes, dtype, average_dtype=torch.float32 if full else None).to(DEVICE)
        assert ops.explain(RULES[rule], case.params, case.grads, *case.state[:2]).chosen in (IMPL, "aten")
        case.check(served(rule), f"{dtype} full={full}", **(everything(rule) if full else options_of(rule)))


@rules
def test_masters_and_mixed_dtypes(rule: str) -> None:
    case = Update(rule, SIZES, grad_dtype=HALF, copy_dtype=HALF, average_dtype=torch.float32)
    case.params[3] = case.params[3].to(HALF)
    case.grads[::3] = [g.float() for g in case.grads[::3]]
    case.averages[1] = case.averages[1].to(torch.float16)
    case.to(DEVICE).check(served(rule), "mixed", **everything(rule))


@rules
def test_a_step_that_is_not_finite_leaves_every_bit(rule: str) -> None:
    for bad in (float("nan"), float("inf")):
        case = Update(rule, SIZES, average_dtype=torch.float32, copy_dtype=HALF)
        case.grads[-1].view(-1)[-1] = bad
        case.averages[2].fill_(float("nan"))
        options = everything(rule)
        got, _ = case.to(DEVICE).run(served(rule), **options)
        assert same_bits([t.cpu() for t in got], [t.cpu() for t in case.written]) and options["found_inf"].item() == 1


@rules
@pytest.mark.skipif(not ON_CUDA, reason="too large for one program after the other")
def test_full_size(rule: str) -> None:
    """Weights of a ResNet-50's size in many tensors, and one of 20 million elements: more chunks than partial sums."""
    shapes = [(512, 512, 3, 3), (2048, 1000), (20_000_001,), *[(64, 64, 3, 3)] * 40]
    case = Update(rule, shapes, average_dtype=torch.float32).to(DEVICE)
    case.check(served(rule), "large", **everything(rule))


@rules
def test_the_same_bits_every_time_and_no_waiting(rule: str) -> None:
    case = Update(rule, MANY, average_dtype=torch.float32, copy_dtype=HALF).to(DEVICE)
    options = everything(rule)
    first, norm = case.run(served(rule), **options)
    lists, more = case.arguments()
    with no_sync():
        again = RULES[rule](*lists, **more, impl=IMPL, **options)
    rows = [lists[0], *lists[2:], more["averages"], more["copies"]]
    assert same_bits([t for row in rows for t in row], first) and torch.equal(norm, again)


def test_averages() -> None:
    averages, sources = draw(MANY), [s.to(d) for s, d in zip(draw(MANY), [torch.float32, HALF, torch.float16] * 99)]
    averages[7] = averages[7].to(HALF)
    integers = [torch.arange(5000), torch.tensor([True, False, True]), torch.tensor(7, dtype=torch.int32)]
    own, other = ([t.clone().to(DEVICE) for t in row] for row in (averages, sources))
    counts, zeros = [t.to(DEVICE) for t in integers], [torch.zeros_like(t).to(DEVICE) for t in integers]
    decay = torch.tensor(0.9, dtype=torch.float64, device=DEVICE)
    ema_update_([*own, *zeros], [*other, *counts], decay, impl=IMPL)
    with no_sync():
        ema_update_([*own, *zeros], [*other, *counts], decay, impl=IMPL)

    def twice(dtype: torch.dtype | None) -> list[Tensor]:
        out = [a.to(dtype or a.dtype, copy=True) for a in averages]
        for _ in range(2):
            for a, s in zip(out, sources):
                wide = torch.promote_types(a.dtype, s.dtype)
                a.copy_(a.to(wide) * 0.9 + s.to(wide) * (1 - 0.9))
        return out

    check_lists([t.cpu() for t in own], twice(None), twice(torch.float64), "averages", list(zip(averages, sources)))
    assert same_bits([t.cpu() for t in zeros], integers)


@rules
def test_a_run_of_the_optimizer(rule: str) -> None:
    """Gradients are new tensors at every step, as after zero_grad(set_to_none=True); groups, a bad step, an average."""
    face = FACES[rule]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule]
    options = {k: v for k, v in options_of(rule).items() if k != "lr"}
    a, b = ([nn.Parameter(p.to(DEVICE)) for p in clones(start)] for start in [draw(SIZES)] * 2)
    groups = [[{"params": x[:3], "weight_decay": 0.0}, {"params": x[3:]}] for x in (a, b)]
    mine = face(groups[0], lr=0.01, max_norm=1.0, check=True, impl=IMPL, **options)
    other = kind(groups[1], lr=0.01, foreach=False, **options)
    averages = [p.detach().clone() for p in a]
    mine.link(zip(a, averages), 0.5)
    expected = clones(averages)
    for step in range(6):
        bad = step == 2
        for i, g in enumerate(draw(SIZES)):
            absent = (step + i) % 5 == 4
            a[i].grad = None if absent else g.to(DEVICE)
            b[i].grad = None if absent else g.to(DEVICE)
        if bad:
            a[1].grad[0] = float("inf")  # type: ignore[index]
        mine.step()
        if not bad:
            torch.testing.assert_close(mine.norm, nn.utils.clip_grad_norm_(b, 1.0))
            other.step()
            for e, p in zip(expected, b):
                if p.grad is not None:
                    e.lerp_(p.detach(), 0.5)
        a = list(a)
    for x, y in zip([*a, *averages], [*b, *expected]):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=1e-6)


@rules
def test_stochastic_rounding_draws_the_bits_of_the_reference(rule: str) -> None:
    case = Exact(rule, [*MANY[:5], (2049,), (20001,), (4, 6, 5, 3)])
    expected = case.run("reference").written
    for name in ("params", "grads", "state", "squares", "averages", "steps"):
        setattr(case, name, [t.to(DEVICE) for t in getattr(case, name)])
    for impl in (IMPL, "aten", "reference"):
        assert same_bits([t.cpu() for t in case.run(impl).written], expected), impl
    bad = case.run(IMPL, found_inf=torch.ones((), device=DEVICE)).written
    assert same_bits([t.cpu() for t in bad], [t.cpu() for t in case.written])


@rules
@pytest.mark.skipif(not ON_CUDA, reason="too large for one program after the other")
def test_stochastic_rounding_is_unbiased(rule: str) -> None:
    """Two million equal elements, a thousand steps below half a unit in the last place: as far as in float32."""
    p = nn.Parameter(torch.ones(2_000_000, dtype=torch.bfloat16, device=DEVICE))
    face = FACES[rule]([p], lr=1e-4, weight_decay=0.0, rounding="stochastic", impl=IMPL)
    p.grad = torch.ones_like(p)
    for _ in range(1000):
        with no_sync():
            face.step()
    assert abs(float(p.detach().double().mean()) - 0.9) < 1e-4


@pytest.mark.gpu
@rules
@pytest.mark.parametrize("fresh", [True, False])
def test_a_graph_with_changed_rates_and_gradients(rule: str, fresh: bool) -> None:
    """Captured once; the rate, the decay, the flag and the gradients change between replays. `fresh`: gradients are born in
    the graph, at addresses that no table knows."""
    shapes = [(1000,), (65537,), (3,), (64, 3, 3, 3)]
    case = Update(rule, shapes, average_dtype=torch.float32).to(DEVICE)
    eager = Update(rule, shapes, average_dtype=torch.float32).to(DEVICE)
    eager.params, eager.averages = clones(case.params), clones(case.averages)
    eager.state = [clones(row) for row in case.state]
    options = everything(rule)
    rate, decay, found = options["lr"], options["ema_decay"], options["found_inf"]
    inputs = [torch.zeros_like(g) for g in case.grads]

    def step() -> Tensor:
        found.zero_()
        grads = [x * 2.0 for x in inputs] if fresh else inputs
        return RULES[rule](case.params, grads, *case.state, averages=case.averages, impl="triton", **options)

    saved = clones(case.written)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step()
    for t, s in zip(case.written, saved):
        t.copy_(s)
    for i in range(5):
        torch.manual_seed(i)
        new = [g.to(DEVICE) for g in draw(shapes)]
        if i == 3:
            new[1][7] = float("nan")
        rate.fill_(0.1 / (i + 1))
        decay.fill_(0.5 + 0.1 * i)
        with no_sync():
            for x, g in zip(inputs, new):
                x.copy_(g)
            graph.replay()
        own = dict(options, found_inf=torch.zeros((), device=DEVICE))
        grads = [g * 2.0 for g in new] if fresh else new
        expected = RULES[rule](eager.params, grads, *eager.state, averages=eager.averages, impl="triton", **own)
        assert same_bits([t.cpu() for t in case.written], [t.cpu() for t in eager.written])
        assert found.item() == own["found_inf"].item() == (i == 3)
        torch.testing.assert_close(norm, expected, equal_nan=True)


@pytest.mark.gpu
@rules
def test_a_graph_draws_anew_at_each_replay(rule: str) -> None:
    """As a run without a graph: the steps on the device are the counter."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [nn.Parameter(t.to(DEVICE, torch.bfloat16)) for t in draw([(1000,), (65537,), (3,)])]
        for p in params:
            p.grad = torch.ones_like(p)
        made.append((params, FACES[rule](params, lr=1e-3, rounding="stochastic", seed=5, impl="triton")))
    (a, mine), (b, other) = made
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mine.step()
    torch.cuda.current_stream().wait_stream(side)
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for _ in range(4):
        with no_sync():
            graph.replay()
        other.step()
        assert same_bits([t.detach().cpu() for t in a], [t.detach().cpu() for t in b])
    assert all(float(mine.state[p]["step"]) == 5 for p in a)


@pytest.mark.gpu
def test_a_graph_of_averages() -> None:
    averages, sources = ([t.to(DEVICE) for t in draw(MANY)] for _ in range(2))
    decay = torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    ema_update_(averages, sources, decay, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(averages, sources, decay, impl="triton")
    for value in (0.9, 0.1, 0.5):
        expected = clones(averages)
        decay.fill_(value)
        for s in sources:
            s.add_(1)
        with no_sync():
            graph.replay()
        ema_update_(expected, sources, decay, impl="triton")
        assert same_bits([t.cpu() for t in averages], [t.cpu() for t in expected])


@pytest.mark.gpu
@rules
def test_a_first_call_inside_a_capture_says_so(rule: str) -> None:
    case = Update(rule, [(123, 457), (11, 13, 17)]).to(DEVICE)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="run the step once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.run(served(rule), lr=0.1)
