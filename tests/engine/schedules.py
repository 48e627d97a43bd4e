"""Every method on small networks, run under a schedule and recorded, so that two runs can be compared bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal import models

Batch = tuple[Tensor, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]
ROWS = (4, 3, 4, 5)  # batches change their size


def cnn(dropout: float = 0.0) -> nn.Module:
    return models.ResNetCIFAR(1, width=4, num_classes=5, dropout=dropout)


def deep_cnn(dropout: float = 0.0) -> nn.Module:
    return models.resnet20(width=4, num_classes=5, dropout=dropout)


def vit(dropout: float = 0.0) -> nn.Module:
    return models.create("vit_tiny", num_classes=5, img_size=8, patch_size=4, dim=8, depth=4, heads=2, dropout=dropout)


def swin(dropout: float = 0.0) -> nn.Module:
    return models.Swin(
        img_size=16, patch_size=2, dim=8, depths=(2, 2), heads=(2, 2), window=4, num_classes=5, drop_path=dropout
    )


def gpt(dropout: float = 0.0) -> nn.Module:
    return models.create("gpt", vocab_size=13, block_size=8, n_layer=4, n_head=2, n_embd=8, dropout=dropout)


def masked(dropout: float = 0.0) -> nn.Module:
    return models.MaskedViT(img_size=16, patch_size=4, dim=16, depth=8, heads=2)


NETS: dict[str, tuple[Callable[[float], nn.Module], int]] = {  # and the side of its images; 0 takes tokens
    "cnn": (cnn, 8),
    "deep cnn": (deep_cnn, 8),
    "vit": (vit, 8),
    "swin": (swin, 16),
    "gpt": (gpt, 0),
    "masked": (masked, 16),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "auglocal": {"blocks": 4, "depth": 1},
    "infopro": {"lam": (5.0, 0.5)},
    "hpff": {"blocks": 4},
    "mlaan": {"blocks": 4},
    "man_plus_plus": {"head": "dgl"},
    "feature_reconstruction": {"first": "image"},
    "localmim": {"blocks": 4},
    "solo": {"depth": 1},
}


def images(count: int, side: int, rows: tuple[int, ...] = ROWS) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        n = rows[i % len(rows)]
        made.append((torch.randn(n, 3, side, side, generator=g), torch.randint(5, (n,), generator=g)))
    return made


def tokens(count: int, rows: tuple[int, ...] = ROWS) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    made = [torch.randint(13, (rows[i % len(rows)], 8), generator=g) for i in range(count)]
    return [(ids, ids.clone()) for ids in made]


def data_of(net: str, count: int = 20, rows: tuple[int, ...] = ROWS) -> list[Batch]:
    side = NETS[net][1]
    if net == "masked":
        return [(x, x) for x, _ in images(count, side, rows)]
    return images(count, side, rows) if side else tokens(count, rows)


def local(method: str, net: str = "cnn", dropout: float = 0.0, mode: str = "paper", **options: Any) -> fl.LocalModel:
    """The same model at every call. ``dropout``: in every other block and its head; with ``own`` where the net has it."""
    torch.manual_seed(0)
    make, side = NETS[net]
    own = options.pop("own", False)
    backbone = make(dropout if own else 0.0)
    how: dict[str, Any] = {"blocks": 3, "mode": mode} | OPTIONS.get(method, {})
    if net == "gpt":
        how["tied"] = "untie"
    if method == "lakd":
        how["teacher"] = make(0.0)
    if method == "localmim":
        how["criterion"] = backbone.criterion
    if method == "feature_reconstruction" and "cnn" not in net:
        how["first"] = "embedding"
    sample = torch.randn(2, 3, side, side) if side else torch.randint(13, (2, 8))
    model = fl.localize(backbone, method, sample=sample, **(how | options))
    if dropout and not own:
        for block in model.blocks[1::2]:
            layers = [s.module for s in block.parameter_slots() if isinstance(s.module, nn.Linear | nn.Conv2d)]
            for layer in (layers[0], layers[-1]):
                layer.register_forward_pre_hook(_Dropped(dropout))
            block.random = True
    return model


class _Dropped:
    """Dropout on what goes into a layer."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(inputs[0], self.p, module.training),)


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adamw(named: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(named, lr=1e-3, weight_decay=0.01)


@dataclass
class Run:
    """What a run gave: by step the losses and hits, at the end every tensor."""

    losses: dict[int, Tensor] = field(default_factory=dict)
    correct: dict[int, Tensor] = field(default_factory=dict)
    order: list[int | None] = field(default_factory=list)
    end: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""

    def note(self, out: Any) -> None:
        self.order.append(out.step)
        if out.step is not None:
            assert out.step not in self.losses, "a step came twice"
            self.losses[out.step], self.correct[out.step] = out.losses.clone(), out.correct.clone()


def engine(model: fl.LocalModel, schedule: str, make: Make = sgd, *, seed: int | None = 0, **options: Any) -> fl.Engine:
    """With ``seed``, tasks seem to take random times, so that the schedule is one of many, the same in every run."""
    options = {"deterministic": True} | options
    if schedule != "sequential":
        options = {"workers": 2} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot serve.*")
        made = fl.Engine(model, make, schedule=schedule, **options)  # type: ignore[arg-type]
    if seed is not None and made._rounds is not None:
        fake_clock(made._rounds, seed)
    return made


def fake_clock(rounds: Any, seed: int) -> None:
    draw, now = random.Random(seed), [0.0]

    def tick() -> float:
        now[0] += draw.choice((0.1, 1.0, 1.0, 3.0))
        return now[0]

    rounds._now = tick


def rates(run: fl.Engine) -> Callable[[], None]:
    """A scheduler of the learning rate that also changes the weight decay."""
    schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda i: 1.0 / (1 + 0.3 * i))

    def step() -> None:
        schedule.step()
        for k, group in enumerate(run.optimizer.param_groups):
            group["weight_decay"] = 1e-3 * (1 + (schedule.last_epoch + k) % 3)

    return step


def tensors(run: fl.Engine) -> dict[str, Tensor]:
    """Parameters, buffers, optimizer state, and what the engine itself holds; copied. Completes the steps in flight."""
    state = run.state_dict()
    found = dict(run.model.state_dict())
    for name, p in run.model.named_parameters():
        for key, value in run.optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                found[f"{key} of {name}"] = value
    found |= {f"scale {k}": s for k, s in enumerate(state["scales"])}
    found |= {f"good {k}": s for k, s in enumerate(state["good"])}
    found["skipped"] = state["skipped"]
    found |= {f"stream {k}": s[0] for k, s in enumerate(state["streams"])}
    assert all(p.grad is None for p in run.model.parameters())
    return {name: t.clone() for name, t in found.items()}


def train(
    run: fl.Engine,
    data: list[Batch],
    *,
    after: Callable[[], None] | None = None,
    each: Callable[[int], None] | None = None,
) -> Run:
    """``after``: once a step, such as `rates`; ``each``: before a step."""
    record = Run()
    step = rates(run) if after is None else after
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        for i, (x, y) in enumerate(data):
            if each is not None:
                each(i)
            record.note(run.step(x, y))
            step()
        for out in run.flush():
            record.note(out)
    record.text = run.explain()
    record.end = tensors(run)
    return record


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise, but for which NaN it is."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def differences(a: Run, b: Run) -> list[str]:
    found = [f"steps: {a.losses.keys() ^ b.losses.keys()}"] if a.losses.keys() != b.losses.keys() else []
    for name in ("losses", "correct", "end"):
        one, two = getattr(a, name), getattr(b, name)
        if one.keys() != two.keys():
            found.append(f"{name}: {list(one.keys() ^ two.keys())[:4]}")
        found += [f"{name} {key}" for key in one if key in two and not same(one[key], two[key])]
    return found


def assert_same(got: Run, expected: Run) -> None:
    assert differences(got, expected) == []
    numbers = [n for n in got.order if n is not None]
    assert numbers == sorted(expected.losses), "outputs are complete and in order"


def in_any_order(run: fl.Engine, data: list[Batch], seed: int, ahead: int = 3) -> Run:
    """Runs the tasks of up to ``ahead`` steps one by one, each time one of those whose dependencies are done."""
    rounds, draw, record = run._rounds, random.Random(seed), Run()
    assert rounds is not None
    rounds.in_flight = max(2, rounds.in_flight)
    tasks, before = rounds._step.tasks, [[] for _ in rounds._step.tasks]
    for u, v, distance in rounds._step.edges:
        before[v].append((u, distance))
    flights: dict[int, Any] = {}
    done: set[tuple[int, int]] = set()
    admitted, step = 0, rates(run)
    with warnings.catch_warnings(), run._deterministic(), run._served(), run.model.passes.applied():
        warnings.simplefilter("ignore")  # the scheduler's step comes before the optimizer's
        while len(record.order) < len(data):
            ready = [
                (t, v)
                for t in flights
                for v in range(len(tasks))
                if (t, v) not in done and all(t < d or (t - d, u) in done for u, d in before[v])
            ]
            if admitted < len(data) and len(flights) < ahead and (not ready or draw.random() < 0.3):
                x, y = data[admitted]
                rounds._next = admitted
                flights[admitted] = rounds._admit(((x,), {}, y))
                admitted += 1
                step()
                continue
            t, v = draw.choice(ready)
            rounds._do(flights[t], tasks[v])
            done.add((t, v))
            oldest = len(record.order)
            if all((oldest, i) in done for i in range(len(tasks))):
                run._completed(flights.pop(oldest).output())
                record.note(run._outputs.popleft())
    record.end = tensors(run)
    return record
