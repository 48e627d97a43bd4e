import logging
import subprocess
import sys
import threading

import pytest
import torch

from fastlocal import ops
from fastlocal.errors import ArgumentError, BackendError
from fastlocal.ops import _dispatch
from fastlocal.ops._dispatch import Candidate, Choice, select


@pytest.fixture
def toy():
    """An operator whose "triton" takes signatures below 10, and whose "aten" takes those below 100."""
    _dispatch.register(
        "toy",
        lambda size: size,
        [
            Candidate("triton", lambda s: None if s < 10 else f"{s} is 10 or more"),
            Candidate("aten", lambda s: None if s < 100 else f"{s} is 100 or more"),
        ],
    )
    yield "toy"
    del _dispatch._operators["toy"]
    select.cache_clear()
    _dispatch._choose.cache_clear()


def test_auto_takes_the_first_that_can(toy):
    assert select(toy, 5).chosen == "triton"
    assert select(toy, 50).chosen == "aten"
    assert select(toy, 500).chosen is None
    reasons = dict(select(toy, 50).rejected)
    assert reasons["triton"] == "50 is 10 or more"
    assert reasons["native"] == reasons["reference"] == "this operator has no such implementation"
    assert 'but "triton" is preferred' in dict(select(toy, 5).rejected)["aten"]


def test_select_is_cached(toy):
    assert select(toy, 5) is select(toy, 5)


def test_explicit_request(toy):
    assert select(toy, 5, "aten").chosen == "aten"
    assert 'but "aten" was asked for' in dict(select(toy, 5, "aten").rejected)["triton"]
    assert _dispatch.choose(toy, 5, "aten") == "aten"
    with pytest.raises(BackendError, match=r'toy: backend "triton" cannot serve .* 50 is 10 or more.*takes "aten"'):
        _dispatch.choose(toy, 50, "triton")
    with pytest.raises(BackendError, match="no such implementation"):
        _dispatch.choose(toy, 5, "native")
    with pytest.raises(BackendError, match="500 is 100 or more"):
        _dispatch.choose(toy, 500, "auto")


def test_context_manager_nests_and_restores(toy):
    def chosen():
        return _dispatch.choose(toy, 5, "auto")

    with ops.backend("aten"):
        assert chosen() == "aten"
        with ops.backend("triton"):
            assert chosen() == "triton"
            assert _dispatch.choose(toy, 5, "aten") == "aten"  # the argument comes before the context
        assert chosen() == "aten"
        with pytest.raises(KeyError), ops.backend("auto"):
            assert chosen() == "triton"
            raise KeyError
        assert chosen() == "aten"
    assert chosen() == "triton"

    @ops.backend("aten")
    def decorated():
        return chosen()

    assert [decorated(), decorated(), chosen()] == ["aten", "aten", "triton"]


def test_request_belongs_to_the_thread(toy):
    seen = []
    with ops.backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.choose(toy, 5, "auto")))
        thread.start()
        thread.join()
        assert _dispatch.choose(toy, 5, "auto") == "aten"
    assert seen == ["triton"]


@pytest.mark.parametrize("call", [lambda: ops.backend("tritn"), lambda: ops.explain("toy", 5, impl="tritn")])
def test_unknown_backend_is_refused_at_once(toy, call):
    with pytest.raises(ArgumentError, match=r'tritn.*Did you mean "triton"'):
        call()


def test_explain(toy):
    choice = ops.explain(toy, 50)
    assert isinstance(choice, Choice) and choice.chosen == "aten" and choice.requested == "auto"
    assert str(choice).splitlines()[0] == "toy: aten (asked for auto)"
    assert "  not triton: 50 is 10 or more" in str(choice).splitlines()
    with ops.backend("triton"):
        assert ops.explain(toy, 50).chosen is None
    with pytest.raises(ArgumentError, match=r"operator=.toi. is not an operator"):
        ops.explain("toi", 5)


def test_explain_takes_the_operator_itself():
    x, weight, target = torch.zeros(2, 3, 4), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
    for function in (ops.pool_linear_cross_entropy, ops.pool_linear_cross_entropy_value_and_grad):
        choice = ops.explain(function, x, weight, None, target, pool="mean")
        assert choice.operator == "pool_linear_cross_entropy"
        assert choice.chosen == "aten"


def test_fallback_on_a_gpu_is_logged_once(caplog):
    from fastlocal.ops.pool_linear_cross_entropy import Signature

    signature = Signature("cuda", None, (torch.float64, torch.float64, torch.int64), 17)
    with caplog.at_level(logging.INFO, logger="fastlocal"):
        for _ in range(3):
            assert _dispatch.choose("pool_linear_cross_entropy", signature, "auto") == "aten"
    assert len(caplog.records) == 1 and "not triton: float64" in caplog.text


def test_platform_says_why_triton_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    _dispatch._platform.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "triton", None)
        assert "not installed" in _dispatch.platform(torch.device("cpu")).triton
    _dispatch._platform.cache_clear()
    pytest.importorskip("triton")
    assert "on cpu" in _dispatch.platform(torch.device("cpu")).triton
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.platform(torch.device("cpu")).triton is None


def test_importing_the_operators_imports_no_triton_and_starts_no_cuda():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastlocal.ops, fastlocal.triton_kernels\n"
        "x = torch.ones(2, 3, 4, requires_grad=True)\n"
        "fastlocal.ops.pool_linear_cross_entropy(x, torch.ones(5, 3), None, torch.tensor([0, 1]))[0].backward()\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted(m for m in sys.modules if m.startswith('triton') and m != 'triton'), x.grad.shape)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[] torch.Size([2, 3, 4])"


def test_as_on_gpu_prefers_aten_where_there_is_one():
    before = dict(_dispatch._operators)
    _dispatch.register("with_aten", lambda: None, [_dispatch.Candidate(n, lambda s: None) for n in ("native", "aten")])
    _dispatch.register("without", lambda: None, [_dispatch.Candidate("reference", lambda s: None)])
    with _dispatch.as_on_gpu():
        assert _dispatch.choose("with_aten", None, "auto") == "aten"
        assert _dispatch.choose("with_aten", None, "native") == "native"
        assert _dispatch.choose("without", None, "auto") == "reference"
        with ops.backend("native"):
            assert _dispatch.choose("with_aten", None, "auto") == "native"
    assert _dispatch.choose("with_aten", None, "auto") == "native"
    _dispatch._operators.clear()
    _dispatch._operators.update(before)
