"""The kernel on the CPU, in Triton's interpreter; run by test_ema_update.py with TRITON_INTERPRET=1."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlocal.errors import BackendError
from fastlocal.ops import ema_update_
from fastlocal.triton_kernels import ema_update as kernels
from fastlocal.triton_kernels import multi_tensor
from tests.ops.lists import MANY, SHAPES, check_lists, clones, draw, same_bits
from tests.ops.test_ema_update import check, loop
from tests.triton_kernels.interpreter import mend

mend()
HALF = [(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)]


@pytest.mark.parametrize("own, other", [*HALF, (torch.float16, torch.float32)])
@pytest.mark.parametrize(
    "decay", [0.0, 0.3, 0.5, 0.75, 1.0, torch.tensor(0.75), torch.tensor([0.25], dtype=torch.float64)]
)
def test_ragged_sizes(own, other, decay):
    check("triton", SHAPES[:-1], own, other, decay)


@pytest.mark.parametrize("own, other", HALF)
def test_many_chunks(own, other):
    check("triton", [(65537,), (2 * multi_tensor.BLOCK,), (multi_tensor.BLOCK - 1,)], own, other, 0.9)


def test_one_launch_for_many_tensors_of_mixed_dtypes(monkeypatch):
    averages = [a.half() if i % 5 == 0 else a for i, a in enumerate(draw(MANY))]
    sources = [s.half() if i % 3 == 0 else s for i, s in enumerate(draw(MANY))]
    averages += [torch.tensor(3), torch.tensor([True, False]), torch.arange(3000, dtype=torch.int32)]
    sources += [torch.tensor(-(2**40)), torch.tensor([False, True]), torch.arange(3000, dtype=torch.int32) - 70000]
    got, launches = clones(averages), []
    kernel = kernels.fl_ema_update_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "fl_ema_update_kernel", Counted())
    ema_update_(got, sources, 0.9, impl="triton")
    floats = len(MANY)
    truth = loop([a.double() for a in averages[:floats]], [s.double() for s in sources[:floats]], 1 - 0.9)
    check_lists(
        got[:floats],
        loop(averages[:floats], sources[:floats], 1 - 0.9),
        truth,
        "many",
        list(zip(averages, sources[:floats])),
    )
    assert same_bits(got[floats:], sources[floats:]) and len(launches) == 1


def test_only_integers():
    averages, sources = [torch.arange(5), torch.tensor(7)], [torch.arange(5) + 9, torch.tensor(-1)]
    ema_update_(averages, sources, torch.tensor(0.5), impl="triton")
    assert same_bits(averages, sources)


def test_nothing_around_is_touched():
    """Views into one tensor, off the 16 bytes: what lies between them stays."""
    whole, source = torch.randn(9000), torch.randn(9000)
    views = [(1, 4), (5, 2053), (2059, 4106), (4110, 4111), (5001, 8999)]
    expected = whole.clone()
    for a, b in views:
        whole[a:b] = torch.arange(b - a)
        expected[a:b] = torch.arange(b - a).float().lerp(source[a:b], 0.25)
    ema_update_([whole[a:b] for a, b in views], [source[a:b] for a, b in views], 0.75, impl="triton")
    torch.testing.assert_close(whole, expected)


def test_channels_last_and_transposed():
    for turn in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.transpose(0, 3)):
        a, s = turn(torch.randn(4, 6, 5, 3)), turn(torch.randn(4, 6, 5, 3))
        expected = a.lerp(s, 0.1)
        ema_update_([a], [s], 0.9, impl="triton")
        torch.testing.assert_close(a, expected)
    with pytest.raises(BackendError, match="other strides"):
        ema_update_([a], [s.contiguous()], 0.9, impl="triton")


def test_tables_are_built_once_and_never_wrong(monkeypatch):
    uploads = []
    original = multi_tensor._upload
    monkeypatch.setattr(multi_tensor, "_upload", lambda *args: uploads.append(args) or original(*args))
    monkeypatch.setattr(multi_tensor, "_layouts", multi_tensor._Cache(8))
    monkeypatch.setattr(multi_tensor, "_tables", multi_tensor._Cache(8))
    a, s = draw([(3,), (5,)]), draw([(3,), (5,)])
    for _ in range(3):
        ema_update_(a, s, 0.9, impl="triton")
    assert len(uploads) == 4  # sizes, codes, chunks, addresses
    moved = clones(s)
    ema_update_(a, moved, 0.9, impl="triton")
    assert len(uploads) == 5
    # The same memory seen as other sizes.
    a2, s2 = [a[0][:2], a[1][:4]], [s[0][:2], s[1][:4]]
    last = [a[0][2].item(), a[1][4].item()]
    expected = [x.lerp(y, 0.5) for x, y in zip(a2, s2)]
    ema_update_(a2, s2, 0.5, impl="triton")
    for x, y in zip(a2, expected):
        torch.testing.assert_close(x, y)
    assert [a[0][2].item(), a[1][4].item()] == last
    for _ in range(20):  # more tables than are kept
        fresh = draw([(3,), (5,)])
        expected = [x.lerp(y, 0.1) for x, y in zip(fresh, s)]
        ema_update_(fresh, s, 0.9, impl="triton")
        for x, y in zip(fresh, expected):
            torch.testing.assert_close(x, y)
    assert len(multi_tensor._tables.entries) <= 8


def test_version_counters_and_bits():
    a, s = draw([(300,)]), draw([(300,)])
    b, version = clones(a), a[0]._version
    ema_update_(a, s, 0.9, impl="triton")
    ema_update_(b, s, 0.9, impl="triton")
    assert a[0]._version > version and same_bits(a, b)


def test_kernels_are_interpreted():
    assert type(kernels.fl_ema_update_kernel).__name__ == "InterpretedFunction"
