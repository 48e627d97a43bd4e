"""Level A, ``model(x, y).loss.backward()``, against the sum of detached local losses."""

from __future__ import annotations

import copy
import os
import socket
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models
from fastlocal.methods import StepContext
from fastlocal.models import ResNetCIFAR
from tests.engine.baseline import NoHostRead, assert_equal, gradients, losses_by_units, relative_error

OPTIONS: dict[str, dict[str, Any]] = {
    "dgl": {"blocks": 3},
    "auglocal": {"blocks": 4, "depth": 1},
    "predsim": {"blocks": 3},
    "infopro": {"blocks": 3, "lam": (5.0, 0.5)},
}


def images(rows: int = 6, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 16, 16), torch.randint(classes, (rows,))


def resnet(method: str = "dgl", **options: Any) -> fl.LocalModel:
    return fl.localize(ResNetCIFAR(1, width=4), method, sample=torch.randn(2, 3, 16, 16), **OPTIONS[method], **options)


def vit(method: str = "dgl", **options: Any) -> fl.LocalModel:
    """LayerNorm only: the gradient of a batch is the mean of the gradients of its parts."""
    net = models.create("vit_tiny", num_classes=10, img_size=16, patch_size=8, dim=16, depth=4, heads=2, **options)
    return fl.localize(net, method, blocks=3, sample=torch.randn(2, 3, 16, 16))


def baseline_of(model: fl.LocalModel) -> fl.LocalModel:
    return copy.deepcopy(model)


# --- equal to the sum of detached local losses -----------------------------------------------------------------------


@pytest.mark.parametrize("method", OPTIONS)
def test_gradients_equal_the_sum_of_local_losses_bitwise(method: str) -> None:
    model = resnet(method)
    other = baseline_of(model)
    x, y = images()
    losses = losses_by_units(other, x, y)
    torch.stack(losses).sum().backward()
    out = model(x, y)
    assert torch.equal(out.losses, torch.stack(losses)) and torch.equal(out.loss, torch.stack(losses).sum())
    assert not gradients(model), "a forward leaves .grad alone: Lightning clears gradients between forward and backward"
    out.loss.backward()
    assert_equal(gradients(model), gradients(other))
    assert_equal(dict(model.named_buffers()), dict(other.named_buffers()))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "scale", "dtype", "tolerance"),
    [
        (resnet, 65536.0, torch.float32, 0.0),
        (vit, 65536.0, torch.float32, 0.0),
        (resnet, 3.0, torch.float32, 2e-6),  # its gradients differ from exact ones by as much
        (vit, 3.0, torch.float32, 1e-6),
        (resnet, 3.0, torch.float64, 1e-13),
    ],
)
def test_loss_scale(make: Any, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    """Exact for a power of two; another factor acts after the backward's rounding instead of before it."""
    model = make().to(dtype)
    other = baseline_of(model)
    x, y = images()
    x = x.to(dtype)
    (torch.stack(losses_by_units(other, x, y)).sum() * scale).backward()
    (model(x, y).loss * scale).backward()
    if tolerance:
        assert relative_error(gradients(model), gradients(other)) <= tolerance
    else:
        assert_equal(gradients(model), gradients(other))


def test_a_weighted_sum_of_two_losses_scales_each_forward_by_its_own_factor() -> None:
    model = vit()
    other = baseline_of(model)
    (x, y), (u, v) = images(), images()
    (
        torch.stack(losses_by_units(other, x, y)).sum() * 2 + torch.stack(losses_by_units(other, u, v)).sum() / 4
    ).backward()
    (model(x, y).loss * 2 + model(u, v).loss / 4).backward()
    assert relative_error(gradients(model), gradients(other)) <= 1e-6


def test_accumulation_and_clipping_over_steps_bitwise() -> None:
    """Two batches a step, their losses halved, the global norm clipped: as Lightning, Hugging Face and timm do."""
    model = resnet("auglocal")
    other = baseline_of(model)
    batches = [images() for _ in range(6)]

    def train(m: fl.LocalModel, loss_of: Any) -> list[float]:
        optimizer, norms = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), []
        for i, (x, y) in enumerate(batches):
            (loss_of(m, x, y) / 2).backward()
            if i % 2:
                norms.append(float(nn.utils.clip_grad_norm_(m.parameters(), 0.5)))
                optimizer.step()
                optimizer.zero_grad()
        return norms

    norms = train(model, lambda m, x, y: m(x, y).loss)
    assert norms == train(other, lambda m, x, y: torch.stack(losses_by_units(m, x, y)).sum())
    assert min(norms) > 0.5, "the clip must act, or this shows nothing"
    assert_equal(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("method", ["dgl", "predsim", "infopro"])
def test_bf16_autocast_bitwise(method: str) -> None:
    """The trainer holds autocast over the forward only, so a backward taken inside the forward must leave it, too."""
    model = resnet(method)
    other = baseline_of(model)
    x, y = images()
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack(losses_by_units(other, x, y))
    losses.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, y)
    out.loss.backward()
    assert torch.equal(out.losses, losses)
    assert_equal(gradients(model), gradients(other))


class OneWeightTwice(nn.Module):
    """Autograd gives ``first`` and ``second`` one gradient tensor, and ``gain`` an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(8, 8) / 8) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first + self.second) * self.gain.sum()


def test_gradients_that_share_memory_are_scaled_once() -> None:
    net = nn.Sequential(OneWeightTwice(), nn.Tanh(), OneWeightTwice(), nn.Tanh(), nn.Linear(8, 3))
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randn(2, 8))
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    (model(x, y).loss * 4).backward()
    ctx, h, total = StepContext(y, x, F.cross_entropy), x, torch.zeros(())
    plain = baseline_of(model)
    plain.zero_grad()
    parts: Any = plain.backbone
    for k in range(3):
        h = parts[2 * k](h)
        h = parts[2 * k + 1](h) if k < 2 else h
        total = total + (F.cross_entropy(h, y) if k == 2 else plain.heads[k](h, ctx).loss)
        h = h.detach()
    (total * 4).backward()
    assert_equal(gradients(model), gradients(plain))
    own = [net[0].first.grad, net[0].second.grad]
    assert own[0].data_ptr() != own[1].data_ptr()  # type: ignore[union-attr]


def _ddp_worker(rank: int, port: int, state: dict[str, Tensor], batches: list[tuple[Tensor, Tensor]], out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for name, options in (
            ("plain", {}),
            ("unused", {"find_unused_parameters": True}),
            ("static", {"static_graph": True}),
        ):
            model = vit().double()
            model.load_state_dict(state)
            ddp = nn.parallel.DistributedDataParallel(model, **options)
            optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
            for i, (x, y) in enumerate(batches):
                x, y = x.chunk(2)[rank], y.chunk(2)[rank]
                if name == "plain" and i % 2 == 0:
                    with ddp.no_sync():
                        (ddp(x, y).loss / 2).backward()
                    continue
                (ddp(x, y).loss / (2 if name == "plain" else 1)).backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.save(model.state_dict(), f"{out}/{name}{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_process_ddp_equals_the_full_batch(tmp_path: Any) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    model = vit().double()
    batches = [(x.double(), y) for x, y in (images(8) for _ in range(4))]
    torch.multiprocessing.spawn(_ddp_worker, (port, model.state_dict(), batches, str(tmp_path)), nprocs=2)
    for name in ("plain", "unused", "static"):
        other = baseline_of(model)
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        for i, (x, y) in enumerate(batches):
            (torch.stack(losses_by_units(other, x, y)).sum() / (2 if name == "plain" else 1)).backward()
            if name != "plain" or i % 2:
                optimizer.step()
                optimizer.zero_grad()
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        assert_equal(ranks[0], ranks[1])
        assert relative_error(ranks[0], other.state_dict()) < 1e-12
        assert relative_error(ranks[0], model.state_dict()) > 1e-3, "nothing was trained"


# --- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "scale"), [(resnet, 2.0**14), (vit, 2.0**16)])  # what fp16 backprop bears here
def test_fp16_error_is_at_most_twice_that_of_scaled_backprop(make: Any, scale: float) -> None:
    model = make()
    x, y = images(16)
    exact = baseline_of(model).double()
    torch.stack(losses_by_units(exact, x.double(), y)).sum().backward()
    plain = baseline_of(model)
    with torch.autocast("cpu", torch.float16):
        total = torch.stack(losses_by_units(plain, x, y)).sum()
    (total * scale).backward()
    with torch.autocast("cpu", torch.float16):
        out = model(x, y)
    (out.loss * scale).backward()
    truth = gradients(exact)
    scaled = {n: g / scale for n, g in gradients(plain).items()}
    local = {n: g / scale for n, g in gradients(model).items()}
    theirs, ours = relative_error(scaled, truth), relative_error(local, truth)
    assert 0 < ours <= 2 * theirs < 0.2, (ours, theirs)


def test_small_fp16_gradients_survive_because_each_block_scales_its_loss() -> None:
    """Without the blocks' own scale these gradients, taken before the trainer's scaler acts, would underflow to zero."""
    model = vit()
    with torch.no_grad():
        for head in model.heads:
            head.net[-1].weight.mul_(1e-5)
    x, y = images(16)
    exact = baseline_of(model).double()
    torch.stack(losses_by_units(exact, x.double(), y)).sum().backward()
    with torch.autocast("cpu", torch.float16):
        out = model(x, y)
    out.loss.backward()
    first = {n: g for n, g in gradients(model).items() if n.startswith("backbone.blocks.0")}
    truth = {n: gradients(exact)[n] for n in first}
    assert relative_error(first, truth) < 0.02


def test_an_overflow_is_handed_on_and_halves_the_scale_of_its_block_alone() -> None:
    net = models.create("vit_tiny", num_classes=10, img_size=16, patch_size=8, dim=16, depth=4, heads=2)
    # the caller's own criterion: its targets are not read on the host
    model = fl.localize(net, "dgl", blocks=3, sample=torch.randn(2, 3, 16, 16), criterion=F.cross_entropy)
    with torch.no_grad():
        model.heads[1].net[-1].weight.mul_(1e4)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = images()
    with NoHostRead():
        with torch.autocast("cpu", torch.float16):
            out = model(x, y)
        scaled = scaler.scale(out.loss)
        scaled.backward()
    assert out.losses.isfinite().all()
    scales = next(iter(model._scales.values())).scale
    assert [float(s) for s in scales] == [2.0**14, 2.0**13, 2.0**14]
    finite = {n: bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if p.grad is not None}
    of_block = {k: {n for n, _ in b.named_parameters()} for k, b in enumerate(model.blocks)}
    assert all(finite[n] for k in (0, 2) for n in of_block[k])
    assert not all(finite[n] for n in of_block[1])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_equal(dict(model.named_parameters()), before)
    for _ in range(12):  # the block finds a scale that fits, and training goes on
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = model(x, y)
        scaler.scale(out.loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_half_precision_parameters() -> None:
    """No autocast at all: bfloat16 gradients as plain PyTorch gives them, and fp16 with the blocks' scales."""
    model = vit().to(torch.bfloat16)
    other = baseline_of(model)
    x, y = images()
    torch.stack(losses_by_units(other, x.bfloat16(), y)).sum().backward()
    model(x.bfloat16(), y).loss.backward()
    assert_equal(gradients(model), gradients(other))
    half = model.half()
    half.zero_grad()
    half(x.half(), y).loss.backward()
    assert all(g.dtype == torch.float16 and g.isfinite().all() for g in gradients(half).values())
    assert relative_error(gradients(half), gradients(other)) < 0.2


# --- what a call does and does not do --------------------------------------------------------------------------------


def test_no_value_is_read_on_the_host() -> None:
    model = fl.localize(
        ResNetCIFAR(1, width=4),
        "auglocal",
        blocks=4,
        depth=1,
        sample=torch.randn(2, 3, 16, 16),
        criterion=F.cross_entropy,
    )
    x, y = images()
    with NoHostRead():
        out = model(x, y)
        (out.loss * 8).backward()
        _ = out.correct
    assert gradients(model)
    with pytest.raises(AssertionError, match="reads from the device"), NoHostRead():
        out.loss.item()


def test_graphs_are_gone_when_the_forward_returns() -> None:
    model = vit()
    inner = []
    for unit in model.backbone.blocks:  # type: ignore[union-attr]
        unit.mlp.fc1.register_forward_hook(lambda m, i, o: inner.append(weakref.ref(o)))
    alive_at_head: list[int] = []
    for head in model.heads:
        head.register_forward_pre_hook(lambda m, i: alive_at_head.append(sum(r() is not None for r in inner)))
    out = model(*images())
    # fc1's output is the saved input of GELU: alive until the backward of its own block has run, not longer
    per_block = [sum(u.startswith("blocks.") for u in b.units) for b in model.blocks]
    assert alive_at_head == per_block[:-1] and len(inner) == sum(per_block)
    assert not any(r() is not None for r in inner)
    assert {type(node).__name__ for node, _ in out.loss.grad_fn.next_functions if node} == {"AccumulateGrad"}


def test_second_backward_is_refused() -> None:
    model = vit()
    out = model(*images())
    out.loss.backward(retain_graph=True)
    before = gradients(model)
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\).*call the model again"):
        out.loss.backward()
    assert_equal(gradients(model), before)


def test_gradients_by_autograd_grad() -> None:
    model = vit()
    other = baseline_of(model)
    x, y = images()
    other(x, y).loss.backward()
    found = torch.autograd.grad(model(x, y).loss, list(model.parameters()))
    assert_equal({n: g for (n, _), g in zip(model.named_parameters(), found, strict=True)}, gradients(other))
    assert not gradients(model)


def test_no_grad_call_gives_losses_and_no_graph() -> None:
    model = resnet()
    x, y = images()
    expected = baseline_of(model)(x, y).losses
    with torch.no_grad():
        out = model(x, y)
    assert torch.equal(out.losses, expected) and not out.loss.requires_grad
    assert out.correct.shape == (3,)
    with torch.inference_mode():
        assert torch.isfinite(model(x, y).loss)


@pytest.mark.parametrize(
    "what", ["first unit", "first block", "a head", "a block and its head", "the last block", "a bias"]
)
def test_frozen_parameters(what: str) -> None:
    model = vit()
    blocks = model.blocks
    frozen = {
        "first unit": [
            p for n, p in model.named_parameters() if n.split(".")[1] in ("cls_token", "pos_embed", "patch_embed")
        ],
        "first block": [p for _, p in blocks[0].backbone_parameters()],
        "a head": list(model.heads[1].parameters()),
        "a block and its head": blocks[1].parameters(),
        "the last block": blocks[2].parameters(),
        "a bias": [model.get_parameter("backbone.blocks.1.mlp.fc1.bias")],
    }[what]
    assert frozen
    for p in frozen:
        p.requires_grad_(False)
    other = baseline_of(model)
    x, y = images()
    torch.stack(losses_by_units(other, x, y)).sum().backward()
    out = model(x, y)
    out.loss.backward()
    assert all(p.grad is None for p in frozen)
    assert_equal(gradients(model), gradients(other))
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


def test_all_frozen_is_a_loss_without_a_graph() -> None:
    model = vit().requires_grad_(False)
    out = model(*images())
    assert out.losses.shape == (3,) and not out.loss.requires_grad


def test_an_error_in_a_head_changes_no_gradient() -> None:
    model = vit()
    x, y = images()
    model(x, y).loss.backward()
    before = gradients(model)

    def fail(module: nn.Module, inputs: Any) -> None:
        raise KeyError("broken head")

    handle = model.heads[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken head"):
        model(x, y)
    handle.remove()
    assert_equal(gradients(model), before)


def test_dropout_draws_what_the_plain_loop_draws() -> None:
    model = vit(dropout=0.2)
    other = baseline_of(model)
    x, y = images()
    torch.manual_seed(5)
    out = model(x, y)
    out.loss.backward()
    # The plain loop in the same order: block, head, next block. No head draws here, so the streams agree.
    torch.manual_seed(5)
    torch.stack(losses_by_units(other, x, y)).sum().backward()
    assert_equal(gradients(model), gradients(other))


# --- LocalOutput -----------------------------------------------------------------------------------------------------


def test_return_logits() -> None:
    model = resnet()
    x, y = images()
    expected = baseline_of(model).backbone(x)  # training mode: batch statistics
    assert "logits" not in model(x, y)
    out = model(x, y, return_logits=True)
    assert torch.equal(out.logits, expected) and not out.logits.requires_grad


def test_output_access() -> None:
    model = resnet()
    x, y = images()
    out = model(x, y)
    assert out.loss is out["loss"] and out.losses is out["losses"]
    assert set(out) == {"loss", "losses"} and "correct" not in out
    assert torch.equal(out.correct, out["correct"])
    assert out.correct.dtype == torch.int64 and out.correct.shape == (3,)
    assert not out.losses.requires_grad and out.loss.dim() == 0
    with pytest.raises(AttributeError, match="no 'accuracy'; it has loss, losses, correct"):
        _ = out.accuracy
    with pytest.raises(KeyError):
        _ = out["accuracy"]
    again = copy.copy(out)
    assert again.loss is out.loss and torch.equal(again.correct, out.correct)


def test_output_is_rebuilt_from_a_mapping() -> None:
    """Accelerate and Lightning rebuild every mapping that a model returns as ``type(out)({...})``."""
    out = vit()(*images())
    rebuilt = type(out)({key: value * 1 for key, value in out.items()})
    assert torch.equal(rebuilt.loss, out.loss) and torch.equal(rebuilt["losses"], out.losses)
    assert rebuilt.loss.requires_grad


def test_correct_counts_every_head() -> None:
    model = vit()
    x, y = images(12)
    with torch.no_grad():
        h, expected = x, []
        for block in model.blocks[:-1]:
            h = block(h)
            expected.append(int((model.heads[block.index].net(h).argmax(-1) == y).sum()))  # type: ignore[operator]
        expected.append(int((model.backbone(x).argmax(-1) == y).sum()))
    assert model(x, y).correct.tolist() == expected


def test_training_without_a_target_and_eval_are_the_backbone() -> None:
    model = vit()
    x, y = images()
    logits = model.backbone(x)
    assert torch.equal(model(x), logits) and model(x).requires_grad
    model.eval()
    assert torch.equal(model(x), logits) and torch.equal(model(x, y), logits)
