"""The isolation audit: proves, by walking the autograd graph of one forward, which parameters each block trains.

A block owns what its own output depends on. Anything that two blocks depend on breaks isolation: a weight used twice
(tied) or a value that reaches over a cut (skip connection). Both are refused, with names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.blocks.adapters import Adapter, logits_of
from fastlocal.blocks.partition import undisturbed
from fastlocal.errors import IsolationError


@dataclass
class Audit:
    """What one forward showed.

    Attributes:
        parameters: per block, ``id`` of the parameters its output depends on.
        modules: per block, the modules with own parameters or buffers that ran in it.
        shapes: per block, its output shape without the batch.
        random: per block, whether it drew random numbers.
        shared: parameters that several blocks depend on: ``id`` -> block indices.
    """

    parameters: list[set[int]] = field(default_factory=list)
    modules: list[list[nn.Module]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    random: list[bool] = field(default_factory=list)
    shared: dict[int, list[int]] = field(default_factory=dict)


def graph_nodes(root: Tensor) -> tuple[set[Any], set[int]]:
    """All interior nodes below ``root`` and the ``id`` of every leaf it depends on."""
    interior: set[Any] = set()
    leaves: set[int] = set()
    if root.grad_fn is None:
        return interior, {id(root)} if root.requires_grad else set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node in interior:
            continue
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
            continue
        interior.add(node)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return interior, leaves


def audit(net: nn.Module, adapter: Adapter, blocks: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Audit:
    """Runs the sample once, detached at every cut, and reports what each block depends on.

    Leaves parameters, buffers, modes and random state as they were. Raises IsolationError for a skip connection that
    jumps a cut, naming the two blocks; shared parameters are reported in ``Audit.shared`` for the caller to judge.
    """
    result = Audit(modules=[[]])
    outputs: list[Tensor] = []
    interiors: list[set[Any]] = []
    borders: list[Tensor] = []  # the boundary activations, as the blocks behind them see them
    devices = random_devices(net)
    states = [random_state(devices)]

    def note(k: int, h: Tensor) -> Tensor:
        interior, leaves = graph_nodes(h)
        for earlier, border in enumerate(borders[:-1]):
            if id(border) in leaves:
                raise IsolationError(
                    f"blocks: the output of block {earlier} ('{blocks[earlier]}') is used in block {k} ('{blocks[k]}') too, a skip "
                    f"connection over the cut after '{blocks[k - 1]}'; of the blocks before, a block may use the last one's output "
                    "only. Cut elsewhere"
                )
        for earlier, nodes in enumerate(interiors):
            if interior & nodes:
                raise IsolationError(
                    f"blocks: a value computed in block {earlier} ('{blocks[earlier]}') reaches block {k} ('{blocks[k]}') around the "
                    "cut (a skip connection or a shared bias), so no gradient border can be drawn there; cut elsewhere"
                )
        interiors.append(interior)
        outputs.append(h)  # keeps the nodes alive: a freed node's address may come again
        result.parameters.append(leaves)
        result.shapes.append(tuple(h.shape[1:]))
        state = random_state(devices)
        result.random.append(not same_state(states[-1], state))
        states.append(state)
        result.modules.append([])
        border = h.detach()
        if border.is_floating_point():
            border.requires_grad_()
        borders.append(border)
        return border.clone()  # no leaf, so that the next block may change it in place

    def ran(module: nn.Module, inputs: Any) -> None:
        result.modules[-1].append(module)

    with undisturbed(net):
        states[0] = random_state(devices)
        hooks = [m.register_forward_pre_hook(ran) for m in net.modules() if m._parameters or m._buffers]
        try:
            output = adapter.run(net, args, kwargs, note)
        finally:
            for hook in hooks:
                hook.remove()
        last = logits_of(output)
        note(len(blocks) - 1, last)
    result.modules.pop()
    own = {id(p) for p in net.parameters()}
    result.parameters = [ids & own for ids in result.parameters]
    users: dict[int, list[int]] = {}
    for k, ids in enumerate(result.parameters):
        for i in ids:
            users.setdefault(i, []).append(k)
    result.shared = {i: ks for i, ks in users.items() if len(ks) > 1}
    return result


def sharing_report(net: nn.Module, shared: dict[int, list[int]]) -> str:
    """The shared parameters with all their names and the blocks that use them."""
    names: dict[int, list[str]] = {}
    for name, p in net.named_parameters(remove_duplicate=False):
        if id(p) in shared:
            names.setdefault(id(p), []).append(name)
    return "; ".join(f"{' = '.join(names[i])} (blocks {', '.join(map(str, shared[i]))})" for i in names)


def random_devices(net: nn.Module) -> set[torch.device]:
    """The CUDA devices on which ``net`` may draw random numbers."""
    return {p.device for p in net.parameters() if p.device.type == "cuda"}


def random_state(devices: set[torch.device]) -> list[Tensor]:
    """State of the default generators of the CPU and of these devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def same_state(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
