"""What one training step costs, counted and not timed: kernel launches, block passes, multiply-accumulates, bytes.

    fastlocal bench ledger [--model resnet32] [--batch 8] [--json FILE] [--markdown] [--ops]

For backprop and every method on the CIFAR ResNets: the plain loop (``fastlocal.reference.train_step`` and one SGD),
fastlocal's engine, and the figures of the official implementations beside them. The counts are those of
``fastlocal.blocks.measure``: the same number at every run, without a GPU. The engine is counted in the form that it has
on a GPU: with the fused operators, whose every kernel counts, and no value read back. See docs/ledger.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.blocks.heads import CascadeHead, NoHead
from fastlocal.blocks.measure import BlockPasses, LaunchCounter, MacCounter, SavedBytes, StorageTracker
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.reference import train_step

ROOT = Path(__file__).resolve().parents[1]
# With foreach, as torch chooses by itself on a GPU.
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
MIB = 2**20


@dataclass(frozen=True)
class Official:
    """One step of the official code, counted by the same tools at batch 8: forward and backwards, no optimizer.

    Its multiply-accumulates are known to a million, its saved bytes to 0.01 MiB.
    """

    mmacs: int
    launches: int
    saved_mib: float


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    method: str
    blocks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    official: Official | None = None


def _cases(
    model: str, short: str, blocks: int, mlaan: int, depths: tuple[int, int], official: dict[str, Official]
) -> list[Case]:
    """Backprop, InfoPro with 16 blocks, and the other methods at ``blocks`` (``mlaan``: MLAAN's count of them)."""
    rows: list[tuple[str, str, int, dict[str, Any]]] = [
        ("BP", "bp", 1, {}),
        ("InfoPro K16 contrast", "infopro", 16, {}),
        *((f"AugLocal K{blocks} d{d}", "auglocal", blocks, {"depth": d}) for d in depths),
        (f"DGL K{blocks}, AugLocal's head", "dgl", blocks, {"head": "auglocal"}),
        (f"PredSim K{blocks}, AugLocal's form", "predsim", blocks, {"variant": "auglocal"}),
        (f"InfoPro-CE K{blocks}", "infopro", blocks, {"loss": "cross_entropy"}),
        # where paper and code differ in what a step computes, what the code does
        (f"MAN K{blocks}", "man", blocks, {"mode": "official"}),
        (f"DGL+MAN++ K{blocks}", "man_plus_plus", blocks, {"mode": "official", "head": "dgl"}),
        (f"HPFF K{blocks}", "hpff", blocks, {"mode": "official"}),
        (f"MLAAN K{mlaan}", "mlaan", mlaan, {"mode": "official"}),
        (f"DGL K{blocks}", "dgl", blocks, {}),
        (f"PredSim K{blocks}", "predsim", blocks, {}),
    ]
    return [Case(f"{short} {name}", model, method, k, options, official.get(name)) for name, method, k, options in rows]


CASES = [
    *_cases(
        "resnet32",
        "R32",
        16,
        15,
        (2, 5),
        {
            "BP": Official(69, 268, 2.37),
            "InfoPro K16 contrast": Official(154, 1783, 0.56),
            "AugLocal K16 d2": Official(174, 951, 0.55),
            "AugLocal K16 d5": Official(241, 1128, 0.99),
            "DGL K16, AugLocal's head": Official(71, 1063, 0.34),
            "PredSim K16, AugLocal's form": Official(105, 1363, 0.38),
            "InfoPro-CE K16": Official(153, 958, 0.56),
            "MAN K16": Official(317, 1776, 1.25),
            "DGL+MAN++ K16": Official(252, 2151, 1.08),
            "HPFF K16": Official(356, 2922, 1.63),
            "MLAAN K15": Official(448, 2289, 1.75),
        },
    ),
    *_cases(
        "resnet110",
        "R110",
        55,
        54,
        (3, 5),
        {
            "BP": Official(253, 892, 8.06),
            "InfoPro K16 contrast": Official(338, 2407, 1.06),
            "AugLocal K55 d3": Official(794, 3918, 0.67),
            "AugLocal K55 d5": Official(1119, 4994, 0.99),
            "DGL K55, AugLocal's head": Official(259, 3754, 0.34),
            "PredSim K55, AugLocal's form": Official(381, 4834, 0.38),
            "InfoPro-CE K55": Official(573, 3376, 0.56),
            "MAN K55": Official(1197, 6495, 1.25),
            "DGL+MAN++ K55": Official(921, 7572, 1.08),
            "HPFF K55": Official(1390, 11268, 1.63),
            "MLAAN K54": Official(1720, 8640, 1.75),
        },
    ),
]


@dataclass
class Cost:
    """One step, the second one (the first allocates optimizer state).

    Attributes:
        gradients: launches of forward, losses and backwards.
        optimizer: launches of the update.
        safety: launches that keep a block with a non-finite loss or gradient as it was; the plain loop has none.
        saved_bytes: peak of what autograd holds for backward, parameters and buffers left out.
        storage_bytes: peak of all storages made in the step: activations, gradients, temporaries.
        macs: multiply-accumulates of the forward.
        forward, backward, handed: fewest and most passes of any unit or head: forwards, backwards with gradients of its
            weights, and backwards without, which hand a gradient down to the block before.
        work: what the units' passes amount to, on average: 1 for a forward, 2 for a backward, 1 for one without gradients of
            weights.
        by_op: launches by part and operator.
    """

    gradients: int
    optimizer: int
    safety: int
    saved_bytes: int
    storage_bytes: int
    macs: int
    forward: tuple[int, int]
    backward: tuple[int, int]
    handed: tuple[int, int]
    work: float
    by_op: dict[str, dict[str, int]]

    @property
    def launches(self) -> int:
        return self.gradients + self.optimizer + self.safety


@dataclass
class Row:
    case: Case
    batch: int
    trained: int  # blocks, after AugLocal has joined its tail
    parameters: int  # of the network
    head_parameters: int
    readout: str
    plain: Cost
    engine: Cost

    def record(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        costs = {"plain": asdict(self.plain), "engine": asdict(self.engine)}
        for cost in costs.values():
            del cost["by_op"]
        about = {"trained_blocks": self.trained, "parameters": self.parameters, "head_parameters": self.head_parameters}
        return {**asdict(self.case), "batch": self.batch, **about, "readout": self.readout, **costs}


def build(case: Case, batch: int) -> tuple[fl.LocalModel, Tensor, Tensor]:
    """The model of a case and a batch of random images, always the same."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    net = fl.models.create(case.model)
    return fl.localize(net, case.method, blocks=case.blocks, sample=x[:2], **case.options), x, y


def measure(case: Case, batch: int = 8) -> Row:
    """Runs two steps of the plain loop and two of the engine, and counts the second of each."""
    model, x, y = build(case, batch)
    own, heads = (sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.heads))
    about = (len(model.blocks), own, heads, readout(model, x))
    return Row(case, batch, *about, plain_cost(model, x, y), engine_cost(model, x, y))


def readout(model: fl.LocalModel, x: Tensor) -> str:
    """ "the network" where evaluation is the network's own forward, bit for bit; else "the method's own"."""
    model.eval()
    outputs = []
    with torch.no_grad():
        for module in (model, model.backbone):
            torch.manual_seed(0)
            out = module(x)
            outputs.append([out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)])
    model.train()
    same = all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    return "the network" if same else "the method's own"


def plain_cost(model: fl.LocalModel, x: Tensor, y: Tensor | None) -> Cost:
    """A step of ``fastlocal.reference.train_step`` with one SGD. ``y`` is None where the input is all there is."""
    optimizer = SGD(model.parameters(), foreach=True)
    batch = x if y is None else (x, y)
    cost = _count(model, lambda: train_step(model, batch, optimizer), {"optimizer": [(optimizer, "step")]})
    optimizer.zero_grad()
    return cost


def engine_cost(model: fl.LocalModel, x: Tensor, y: Tensor | None, **options: Any) -> Cost:
    """A step of ``fastlocal.Engine(model, ..., **options)`` as on a GPU: its operators, and nothing is read back."""
    batch = (x,) if y is None else (x, y)
    engine = fl.Engine(model, lambda named: SGD(named), **options)
    guard = engine._guard
    guard.waits = True
    parts: dict[str, list[tuple[Any, str]]] = {
        "optimizer": [(engine.optimizer, "step_block")],
        "safety": [(guard, "begin"), (guard, "check"), (guard, "end")],
    }
    with as_on_gpu():
        return _count(model, lambda: engine.step(*batch), parts)


def _count(model: fl.LocalModel, step: Callable[[], Any], parts: dict[str, list[tuple[Any, str]]]) -> Cost:
    """Counts a step; what the named methods of ``parts`` launch is booked there, everything else under "gradients"."""
    step()
    counter, macs, storages = LaunchCounter(), MacCounter(), StorageTracker()
    saved = SavedBytes([*model.parameters(), *model.buffers()])
    units, heads = _units_and_heads(model)
    passes = Passes(units | heads)
    booked: dict[str, Counter[str]] = {"gradients": counter.by_op, "optimizer": Counter(), "safety": Counter()}
    for part, methods in parts.items():
        for owner, name in methods:
            setattr(owner, name, _booking(getattr(owner, name), counter, booked[part]))
    try:
        gc.collect()  # garbage in cycles must not die at a time of its own inside the step
        with counter, macs, storages, saved, passes:
            step()
    finally:
        for methods in parts.values():
            for owner, name in methods:
                delattr(owner, name)  # the class's own is there again
    return Cost(
        **{part: sum(ops.values()) for part, ops in booked.items()},
        saved_bytes=saved.peak,
        storage_bytes=storages.peak,
        macs=macs.total,
        forward=_least_and_most(passes.forward, passes._modules),
        backward=_least_and_most(passes.backward, passes._modules),
        handed=_least_and_most(passes.handed, passes._modules),
        work=sum(passes.forward[u] + 2 * passes.backward[u] + passes.handed[u] for u in units) / len(units),
        by_op={part: dict(ops) for part, ops in booked.items()},
    )


def _booking(fn: Callable[..., Any], counter: LaunchCounter, ops: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        before, counter.by_op = counter.by_op, ops
        try:
            return fn(*args, **kwargs)
        finally:
            counter.by_op = before

    return call


class Passes(BlockPasses):
    """`BlockPasses`, with ``backward`` for the passes that give the module's weights their gradients and ``handed`` for those
    that do not, by the first parameter of each module that trains.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__(modules)
        self.handed: Counter[str] = Counter()
        self._calls = _Calls()
        self._trained: set[tuple[str, int]] = set()

    def __enter__(self) -> Passes:
        super().__enter__()
        self.backward = self._calls  # type: ignore[assignment]
        for name, module in self._modules.items():
            first = next((p for p in module.parameters() if p.requires_grad), None)
            if first is not None:
                self._hooks.append(first.register_post_accumulate_grad_hook(functools.partial(self._trains, name)))
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.backward = Counter(call[0] for call in self._calls if call in self._trained)
        self.handed = Counter(call[0] for call in self._calls if call not in self._trained)

    def _trains(self, name: str, parameter: Tensor) -> None:
        self._trained.add((name, torch._C._current_graph_task_id()))


class _Calls(list[tuple[str, int]]):
    """Where a Counter would add one: names, with the number of the call of backward that they were seen in."""

    def update(self, names: Iterable[str]) -> None:
        self.extend((name, torch._C._current_graph_task_id()) for name in names)


def _units_and_heads(model: fl.LocalModel) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    modules = dict(model.backbone.named_modules())
    names = [name for block in model.blocks for name in block.units]
    # The stem of a ResNet is a method; its convolution stands for it. Nothing stands for a transformer's embedding.
    found = {name: modules.get("conv1" if name == "stem" else name) for name in names}
    units = {name: module for name, module in found.items() if module is not None} or {"network": model.backbone}
    heads: dict[str, nn.Module] = {}
    for k, head in enumerate(model.heads):
        if isinstance(head, CascadeHead):  # its two halves run, each on an activation of its own
            parts = {f"heads.{k}.own": head.own, f"heads.{k}.shared": head.shared}
            heads |= {name: part for name, part in parts.items() if part is not None}
        elif not isinstance(head, NoHead):
            heads[f"heads.{k}"] = head
    return units, heads


def _least_and_most(counts: Mapping[str, int], names: Iterable[str]) -> tuple[int, int]:
    numbers = [counts[name] for name in names]
    return min(numbers), max(numbers)


# --- the table ------------------------------------------------------------------------------------------------------

GROUPS: dict[str, list[str]] = {
    "": ["case"],
    "passes fwd/full/dgrad": ["plain", "fastlocal"],
    "MMAC/image": ["official", "fastlocal"],
    "launches, forward + backwards": ["official", "plain", "fastlocal", "/official"],
    "launches, whole step": ["plain", "fastlocal", "of it safety", "/plain"],
    "saved MiB/image": ["official", "fastlocal"],
    "storages MiB/image": ["plain", "fastlocal"],
}


def cells(row: Row) -> list[str]:
    """The texts of one line, in the order of GROUPS."""
    official, plain, engine = row.case.official, row.plain, row.engine
    per_image = row.batch * MIB

    return [
        row.case.name,
        *("/".join(map(span, (cost.forward, cost.backward, cost.handed))) for cost in (plain, engine)),
        f"{official.mmacs}" if official else "-",
        f"{engine.macs / row.batch / 1e6:.0f}",
        f"{official.launches}" if official else "-",
        f"{plain.gradients}",
        f"{engine.gradients}",
        f"{engine.gradients / official.launches:.2f}" if official else "-",
        f"{plain.launches}",
        f"{engine.launches}",
        f"{engine.safety}",
        f"{engine.launches / plain.launches:.2f}",
        f"{official.saved_mib:.2f}" if official else "-",
        f"{engine.saved_bytes / per_image:.2f}",
        f"{plain.storage_bytes / per_image:.2f}",
        f"{engine.storage_bytes / per_image:.2f}",
    ]


def span(passes: Sequence[int]) -> str:
    """Fewest and most, as one number where they are equal."""
    least, most = passes
    return str(least) if least == most else f"{least}-{most}"


def read(root: Path = ROOT) -> list[Row]:
    """The recorded rows, without launches by operator."""
    record = json.loads((root / "bench" / "results" / "ledger.json").read_text())
    rows = []
    for row in record["rows"]:
        case = Case(*(row[key] for key in ("name", "model", "method", "blocks", "options")))
        if row["official"]:
            case = replace(case, official=Official(**row["official"]))
        about = (row[key] for key in ("batch", "trained_blocks", "parameters", "head_parameters", "readout"))
        rows.append(Row(case, *about, *(Cost(**row[side], by_op={}) for side in ("plain", "engine"))))
    return rows


def to_text(rows: list[Row]) -> str:
    """An aligned table under two lines of headings."""
    lines = [[name for names in GROUPS.values() for name in names], *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    title, at = [], 0
    for group, names in GROUPS.items():
        width = sum(widths[at : at + len(names)]) + 2 * (len(names) - 1)
        widths[at] += max(0, len(group) - width)
        title.append(group.rjust(max(width, len(group))))
        at += len(names)
    table = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in ["  ".join(title), *table])


def to_markdown(rows: list[Row]) -> str:
    heads = [f"{group}: {name}" if group else name for group, names in GROUPS.items() for name in names]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def operators(row: Row) -> str:
    """Launches of the plain loop and of the engine by operator, the largest first."""
    lines = [f"{row.case.name}: launches by operator, plain and fastlocal"]
    for part in row.plain.by_op:
        plain, engine = row.plain.by_op[part], row.engine.by_op[part]
        for op in sorted(plain.keys() | engine.keys(), key=lambda op: -plain.get(op, 0) - engine.get(op, 0)):
            lines.append(f"  {part:10} {op:55} {plain.get(op, 0):6} {engine.get(op, 0):6}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastlocal bench ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = sorted({case.model for case in CASES})
    parser.add_argument("--model", choices=models, help="both by default, which takes a minute or two")
    parser.add_argument("--batch", type=int, default=8, help="images, at least 2; official figures are of 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there too")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--ops", action="store_true", help="then launches by operator")
    args = parser.parse_args(argv)
    if args.batch < 2:
        parser.error(f"--batch: got {args.batch}; BatchNorm needs at least 2 images")
    torch.set_num_threads(1)  # small images: more threads gain nothing, and on busy cores they lose much
    rows = [measure(case, args.batch) for case in CASES if args.model in (None, case.model)]
    print((to_markdown if args.markdown else to_text)(rows))
    if args.ops:
        print("", *map(operators, rows), sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"batch": args.batch, "torch": torch.__version__, "rows": [row.record() for row in rows]}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
