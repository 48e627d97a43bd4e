"""Slices and hooks: the same blocks, and what each refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlocal.blocks.adapters import HookAdapter, SliceAdapter, logits_of
from fastlocal.errors import ArgumentError, PartitionError
from tests.engine.untouched import untouched

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers a, b, c in an order, and as often, as ``order`` says."""

    def __init__(self, order: str = "abc") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


def recorder() -> tuple[list[tuple[int, Tensor]], Any]:
    seen: list[tuple[int, Tensor]] = []

    def on_block(k: int, h: Tensor) -> Tensor:
        seen.append((k, h))
        return h.detach()

    return seen, on_block


def test_both_show_the_same_boundaries_and_cut_the_graph_there() -> None:
    net = Net()
    slices, on_slice = recorder()
    hooks, on_hook = recorder()
    one = SliceAdapter([(net.a,), (net.b,), (net.c,)]).run(net, (X,), {}, on_slice)
    two = HookAdapter(["a", "b"]).run(net, (X,), {}, on_hook)
    assert torch.equal(one, net(X)) and torch.equal(two, one)
    assert [k for k, _ in slices] == [k for k, _ in hooks] == [0, 1]
    for (_, h), (_, g) in zip(slices, hooks, strict=True):
        assert torch.equal(h, g)
    two.sum().backward()
    assert net.a.weight.grad is None and net.b.weight.grad is None and net.c.weight.grad is not None


def test_what_on_block_returns_goes_on() -> None:
    net = Net()
    for adapter in (SliceAdapter([(net.a,), (net.b, net.c)]), HookAdapter(["a"])):
        out = adapter.run(net, (X,), {}, lambda k, h: torch.zeros_like(h))
        assert torch.equal(out, net.c(net.b(torch.zeros(3, 4))))


def test_a_slice_takes_one_tensor() -> None:
    net = Net()
    adapter = SliceAdapter([(net.a,), (net.b,)])
    with (
        untouched(net),
        pytest.raises(
            ArgumentError, match=r"^batch: Net is cut into slices and takes one tensor, got 2.*batch=lambda b"
        ),
    ):
        adapter.run(net, (X, X), {}, recorder()[1])  # fmt: skip
    with pytest.raises(ArgumentError, match=r"got 1 inputs and keywords \['mask'\]"):
        adapter.run(net, (X,), {"mask": X}, recorder()[1])


@pytest.mark.parametrize(
    "order, boundaries, message",
    [
        ("aab", ["a"], r"module 'a' runs more than once in a forward.*cut after another module"),
        ("ba", ["a", "b"], r"module 'a' runs after 'b'; list the cuts in the order in which the modules run"),
        ("ac", ["a", "b"], r"b did not run in this forward; cut after modules that always run"),
    ],
)
def test_hooks_that_fire_wrongly(order: str, boundaries: list[str], message: str) -> None:
    net = Net(order)
    with untouched(net), pytest.raises(PartitionError, match=r"^blocks: .*" + message):
        HookAdapter(boundaries).run(net, (X,), {}, recorder()[1])


def test_hooks_are_gone_after_an_error_in_a_block() -> None:
    net = Net()

    def fail(k: int, h: Tensor) -> Tensor:
        raise ZeroDivisionError

    with untouched(net), pytest.raises(ZeroDivisionError):
        HookAdapter(["a", "b"]).run(net, (X,), {}, fail)


def test_hooks_are_there_only_while_the_network_runs() -> None:
    net = Net()
    during: list[int] = []

    def on_block(k: int, h: Tensor) -> Tensor:
        during.append(len(net.a._forward_hooks) + len(net.b._forward_hooks))
        return h.detach()

    HookAdapter(["a", "b"]).run(net, (X,), {}, on_block)
    assert during == [2, 2] and not net.a._forward_hooks and not net.b._forward_hooks


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"text": "no tensor", "hidden": self.one(x), "rest": (self.two(x), None)}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = Pair(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pair(x)
        return self.last(out["hidden"] + out["rest"][0])


def test_every_tensor_of_a_nested_output_is_cut_off() -> None:
    net = Around()
    seen, on_block = recorder()
    out = HookAdapter(["pair"]).run(net, (X,), {}, on_block)
    assert torch.equal(seen[0][1], net.pair.one(X)) and torch.equal(out, net(X))
    out.sum().backward()
    assert all(p.grad is None for p in net.pair.parameters()) and net.last.weight.grad is not None


def test_a_boundary_without_a_tensor() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            self.odd(x)
            return x

    net = Holder()
    with (
        untouched(net),
        pytest.raises(PartitionError, match=r"^blocks: module 'odd' returns no tensor; cut after another"),
    ):
        HookAdapter(["odd"]).run(net, (X,), {}, recorder()[1])


def test_a_cache_is_turned_off_unless_the_caller_asked_for_it() -> None:
    class Cached(Net):
        config = SimpleNamespace(use_cache=True)

        def forward(self, x: Tensor, use_cache: bool = True) -> Any:  # type: ignore[override]
            return super().forward(x), use_cache

    net, kwargs = Cached(), {}
    assert HookAdapter(["a"]).run(net, (X,), kwargs, recorder()[1])[1] is False
    assert kwargs == {}
    assert HookAdapter(["a"]).run(net, (X,), {"use_cache": True}, recorder()[1])[1] is True


def test_logits_of() -> None:
    y = torch.zeros(3)
    assert logits_of(X) is X
    assert logits_of(SimpleNamespace(loss=y, logits=X)) is X
    assert logits_of({"loss": y, "logits": X}) is X
    assert logits_of((X, y)) is X
    assert logits_of({"scores": X}) is X
    with pytest.raises(TypeError, match="returns str, in which no logits were found"):
        logits_of("text")


class Checkpointed(nn.Module):
    """Two layers under activation checkpointing: around the call of each, or in the layer's own forward."""

    class Layer(nn.Linear):
        inside = False

        def forward(self, x: Tensor) -> Tensor:
            run = super().forward
            return checkpoint(run, x, use_reentrant=False).relu() if self.inside else run(x).relu()

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.a, self.b, self.inside = self.Layer(4, 4), self.Layer(4, 4), inside
        self.a.inside = self.b.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = layer(x) if self.inside else checkpoint(layer, x, use_reentrant=False)
        return x


def test_a_cut_under_activation_checkpointing_is_refused_and_inside_a_module_it_is_welcome() -> None:
    def on_block(k: int, h: Tensor) -> Tensor:
        h.square().sum().backward()
        return h.detach()

    x = X.clone().requires_grad_()
    around, inside = Checkpointed(False), Checkpointed(True)
    with (
        untouched(around),
        pytest.raises(PartitionError, match=r"'a' ran anew in the backward of block 0.*own forward"),
    ):
        HookAdapter(["a"]).run(around, (x,), {}, on_block)
    HookAdapter(["a"]).run(inside, (x,), {}, on_block)
    assert inside.a.weight.grad is not None and inside.b.weight.grad is None
