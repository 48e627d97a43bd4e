import sys

import pytest
import torch

from fastlocal import ops, reference
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import ema_update_
from tests.ops.lists import MANY, SHAPES, check_lists, clones, draw, same_bits

IMPLS = ("aten", "reference")
OPERATOR = torch.ops.fastlocal.ema_update_.default
MODULE = sys.modules["fastlocal.ops.ema_update"]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]


def loop(averages, sources, weight):
    """What a user writes, in the wider dtype of the two."""
    out = []
    for a, s in zip(averages, sources):
        wide = torch.promote_types(a.dtype, s.dtype)
        out.append((a.to(wide) * (1 - weight) + s.to(wide) * weight).to(a.dtype))
    return out


def check(impl, shapes, own, other, decay):
    averages, sources = draw(shapes, own), draw(shapes, other)
    got = clones(averages)
    before = clones(sources)
    assert ema_update_(got, sources, decay, impl=impl) is None
    weight = 1 - float(decay)
    truth = loop([a.double() for a in averages], [s.double() for s in sources], weight)
    check_lists(got, loop(averages, sources, weight), truth, f"{own} {other} {decay}", list(zip(averages, sources)))
    assert same_bits(sources, before)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("own, other", DTYPES)
def test_ragged_sizes(own, other, impl):
    for decay in (0.0, 0.3, 0.5, 0.75, 1.0, torch.tensor(0.75), torch.tensor([0.25], dtype=torch.float64)):
        check(impl, SHAPES, own, other, decay)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_tensors_of_mixed_dtypes(impl):
    averages = draw(MANY)
    sources = [s.to(d) for s, d in zip(draw(MANY), [torch.float32, torch.bfloat16, torch.float16] * 99)]
    averages[5] = averages[5].bfloat16()
    averages += [torch.tensor(3), torch.tensor([True, False]), torch.arange(5, dtype=torch.int32)]
    sources += [torch.tensor(9), torch.tensor([False, False]), torch.arange(5, 10, dtype=torch.int32)]
    got = clones(averages)
    ema_update_(got, sources, 0.9, impl=impl)
    floats = len(MANY)
    truth = loop([a.double() for a in averages[:floats]], [s.double() for s in sources[:floats]], 1 - 0.9)
    check_lists(
        got[:floats],
        loop(averages[:floats], sources[:floats], 1 - 0.9),
        truth,
        "many",
        list(zip(averages, sources[:floats])),
    )
    assert same_bits(got[floats:], sources[floats:])


def test_the_bits_of_foreach_lerp_and_of_swa_utils():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        averages, sources = draw(SHAPES, dtype), draw(SHAPES, dtype)
        for decay in (0.999, 0.3):
            got, lerped, swa = clones(averages), clones(averages), clones(averages)
            ema_update_(got, sources, decay, impl="aten")
            torch._foreach_lerp_(lerped, sources, 1 - decay)
            torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(swa, sources, None)
            assert same_bits(got, lerped) and same_bits(got, swa)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_wide_average_of_half_precision_moves_where_a_narrow_one_stalls(impl):
    source, wide, narrow = [torch.tensor([1.5]).bfloat16()], [torch.ones(1)], [torch.ones(1).bfloat16()]
    for _ in range(1000):
        ema_update_(wide, source, 0.999, impl=impl)
        ema_update_(narrow, source, 0.999, impl=impl)
    torch.testing.assert_close(wide[0], torch.tensor([1.5 - 0.5 * 0.999**1000]), rtol=1e-5, atol=0)
    assert narrow[0].item() == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    average, source = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    expected = clones([average])
    ema_update_(expected, [source], 0.7, impl=impl)
    last = source.to(memory_format=torch.channels_last)
    for a, s in (
        (average.to(memory_format=torch.channels_last), last),
        (average.clone(), last),
        (average.clone(), torch.stack([source, source], -1)[..., 0]),
    ):
        ema_update_([a], [s], 0.7, impl=impl)
        assert torch.equal(a, expected[0])
    whole = torch.zeros(8, 6, 5, 5)
    whole[::2] = average
    ema_update_([whole[::2]], [source[:1].expand(4, 6, 5, 5)], 0.7, impl=impl)
    assert not whole[1::2].any()
    torch.testing.assert_close(whole[::2], average.lerp(source[:1].expand(4, 6, 5, 5), 0.3))


def test_nothing_to_do():
    for impl in (None, *IMPLS, "triton"):
        ema_update_([], [], 0.9, impl=impl)
    reference.ema_update_([], [], 0.9)


def test_leaves_that_require_gradients_and_version_counters():
    average, source = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))
    version = average._version
    ema_update_([average], [source], 0.5)
    assert average._version > version and average.tolist() == [0.5] * 3 and average.grad_fn is None


def test_opcheck():
    for own, other in DTYPES:
        averages, sources = draw([(3,), (2, 4)], own), draw([(3,), (2, 4)], other)
        for tensor in (None, torch.tensor(0.5)):
            for impl in IMPLS:
                torch.library.opcheck(OPERATOR, (averages, sources, tensor, 0.5, impl))


def test_compiled():
    def step(averages, sources, decay):
        ema_update_(averages, [s * 2 for s in sources], decay)
        return averages[0].sum()

    sources, decay = draw([(3,), (40,)]), torch.tensor(0.9)
    eager = draw([(3,), (40,)])
    compiled = clones(eager)
    expected = step(eager, sources, decay)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, sources, decay)
    assert same_bits(eager, compiled) and torch.equal(got, expected)


def test_explain_and_refusals():
    a = [torch.ones(3)]
    choice = ops.explain(ema_update_, a, a, 0.9)
    assert choice.chosen == "aten" and "cpu" in dict(choice.rejected)["triton"]
    for args, words in [
        ((a, [], 0.9), "sources has 0 tensors and averages 1"),
        ((a, [torch.ones(4)], 0.9), r"sources\[0\] has shape \[4\]"),
        ((a, [torch.ones(3, device="meta")], 0.9), r"sources\[0\] is on meta"),
        ((a, [torch.ones(3, dtype=torch.int64)], 0.9), "int64.*float32"),
        (([torch.ones(3, dtype=torch.int32)], [torch.ones(3, dtype=torch.int64)], 0.9), "both alike"),
        (([torch.ones(3, dtype=torch.complex64)] * 2, [torch.ones(3, dtype=torch.complex64)] * 2, 0.9), "view_as_real"),
        ((a, a, 1.5), "decay=1.5"),
        ((a, a, "x"), "decay='x'"),
        ((a, a, torch.ones(2)), r"decay is torch.float32 \[2\]"),
        ((a, a, torch.tensor(1)), "decay is torch.int64"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            ema_update_(*args)
    with pytest.raises(BackendError, match="cpu"):
        ema_update_(a, a, 0.9, impl="triton")
    with pytest.raises(ArgumentError, match="cuda"):
        ema_update_(a, a, 0.9, impl="cuda")


def test_why_the_kernel_refuses():
    def reason(averages, sources):
        s = MODULE._signature(averages, sources)._replace(device="cuda", triton=None)
        return ops._dispatch._operators["ema_update_"].candidates[0].reject(s)

    a = torch.ones(4, 4)
    assert reason([a, torch.tensor(3)], [a.bfloat16(), torch.tensor(4)]) is None
    assert reason([a[:1], a[:, :1]], [a[:1].clone(), a[:, :1]]).startswith("tensors that belong together")
    assert reason([a], [a.t()]).startswith("tensors that belong together")
    assert reason([a[:0]], [torch.ones(4, 0).t()]) is None and reason([a[:1]], [torch.ones(1, 4)]) is None
    assert "float64" in reason([a.double()], [a])
    assert "bfloat16" in MODULE._dispatch._operators["ema_update_"].candidates[0].reject(
        MODULE._signature([a], [a.bfloat16()])._replace(triton=None)
    )
