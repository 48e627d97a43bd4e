"""How to compare a network of ``fastlocal.compat`` with the numbers of the official code, by its official names.

``check_compat("man_infopro_resnet32_K16", build)`` is the whole test of one oracle (``tests/data/oracles``): ``build()``
returns the network, made with the arguments of the oracle's "constructor" (``arguments(oracle)`` gives them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.methods.oracles import CASCADES, Comparison, _tolerance, load, make_batch, make_optimizer, official_value

Call = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def arguments(oracle: dict[str, Any]) -> dict[str, Any]:
    """The official constructor's arguments."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in oracle["constructor"].items()}


def fill(network: nn.Module, compare: Comparison, oracle: dict[str, Any]) -> None:
    """Names, shapes, order and requires_grad of everything official are the network's; its values become the oracle's."""
    parameters = [[name, list(p.shape)] for name, p in network.named_parameters()]
    assert parameters == oracle["parameters"]
    assert [[name, list(b.shape)] for name, b in network.named_buffers()] == oracle["buffers"]
    if "requires_grad" in oracle:
        assert [int(p.requires_grad) for p in network.parameters()] == [int(flag) for flag in oracle["requires_grad"]]
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            tensor.copy_(official_value(name, tuple(tensor.shape)))
    for (name, p), norm, total in zip(network.named_parameters(), oracle["initial"]["norm"], oracle["initial"]["sum"]):
        compare.relative("filled", float(p.detach().norm()), norm, 1e-12, name)
        compare.relative("filled", float(p.detach().sum()), total, 1e-11, name)


def by_weights(oracle: dict[str, Any]) -> Call:
    """The call of the official training scripts."""

    def call(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss, *_ = network(img=x, target=y, **oracle["loss_weights"])
        return logits, loss

    return call


def check_compat(
    name: str, build: Callable[[], nn.Module], call: Call | None = None, oracle: dict[str, Any] | None = None
) -> dict[str, float]:
    """Three steps and an evaluation in float64, everything that the oracle holds; the largest deviation over tolerance per
    quantity. ``call(network, x, y)`` is the training call and returns logits and the last block's loss; gradients are in
    ``.grad`` after it.
    """
    oracle = oracle or load(name)
    compare = Comparison(name)
    call = call or by_weights(oracle)
    torch.manual_seed(0)
    network = build().double()
    fill(network, compare, oracle)
    optimizer = make_optimizer(oracle, list(network.parameters()))
    seen: list[Any] = []
    network.local.register_forward_hook(
        lambda _m, _i, out: seen.append(out)
    )  # per-block losses, which no official code returns
    conditioning = oracle["conditioning"]
    noise = set(conditioning["rounding_only_gradients"])
    names = [n for n, _ in oracle["parameters"]]

    for k, golden in enumerate(oracle["steps"]):
        x, y = make_batch(oracle, k)
        assert y.tolist() == golden["y"]
        network.train()
        optimizer.zero_grad()
        logits, loss = call(network, x, y)

        tolerance = _tolerance(conditioning["losses_logits_per_step"][k])
        losses = seen.pop().losses
        if name in CASCADES:  # the first block has no loss of its own, and no entry
            assert float(losses[0]) == 0
            losses = losses[1:]
        assert not seen and len(losses) == len(golden["blocks"])
        for i, (ours, block) in enumerate(zip(losses.tolist(), golden["blocks"])):
            compare.relative("loss", ours, block["total"], tolerance, f"block {i}")
        compare.relative("final loss", float(loss), golden["final_loss"], tolerance)
        for ours, theirs in zip(logits[0, :5].tolist(), golden["logits_0_5"]):
            compare.relative("logits", ours, theirs, tolerance)

        if k == 0:
            for (official, p), norm in zip(network.named_parameters(), golden["grad_norm"]):
                assert (p.grad is None) == (norm is None), official
                if norm is not None and official in noise:
                    compare.close("gradient (zero)", float(p.grad.norm()), norm, 1e-10, official)
                elif norm is not None:
                    allowed = _tolerance(conditioning["grad_norm_step0"])
                    compare.relative("gradient", float(p.grad.norm()), norm, allowed, official)
        optimizer.step()

        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        for what, listed, figure in (
            ("param", names, conditioning["param_norm_per_step"][k]),
            ("bn", oracle["bn_stats_order"], conditioning["bn_norm_last_step"]),
        ):
            for official, norm, total in zip(listed, golden[f"{what}_norm"], golden[f"{what}_sum"], strict=True):
                tensor = tensors[official].detach()
                compare.relative(f"{what} norm", float(tensor.norm()), norm, _tolerance(figure), official)
                allowed = 1e-9 * norm * tensor.numel() ** 0.5
                compare.close(f"{what} sum", float(tensor.sum()), total, allowed, official)

    for official, count in oracle["num_batches_tracked"]:
        assert int(tensors[official]) == count, official
    x, y = make_batch(oracle, 0)
    network.eval()
    with torch.no_grad():
        result = network(x, y)
    logits = result[0] if isinstance(result, tuple) else result
    for ours_row, row in zip(logits.tolist(), oracle["eval"]["logits"]):
        for ours, theirs in zip(ours_row, row):
            compare.relative("eval logits", ours, theirs, _tolerance(conditioning["eval_logits"]))
    return compare.worst
