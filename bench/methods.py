"""One table of all training methods: what is isolated, what they cost, how they predict, how they were checked.

    fastlocal bench methods [--markdown] [--record]

Methods are those of the registry, so a new one appears by itself. Costs are counts of one step of fastlocal's engine in the
form that it has on a GPU (`fastlocal.bench.ledger`), beside end-to-end backprop of PyTorch on the same network and, where it
is known, the official code. Those of ResNets come from bench/results/ledger.json, the others from bench/results/methods.json,
which ``--record`` writes anew (a minute). See docs/methods_table.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.bench import ledger
from fastlocal.errors import ArgumentError
from fastlocal.methods import get_method, list_methods
from fastlocal.models.masked_vit import MaskedViT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench") / "results" / "methods.json"
LEDGER = Path("bench") / "results" / "ledger.json"
BATCH = 8


@dataclass(frozen=True)
class Network:
    """A network to count a method on.

    ``make`` builds it, ``batch`` makes inputs and targets of that many samples (targets None where the input is all there is).
    """

    name: str
    blocks: int
    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor | None]]


def _images(size: int, rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, size, size), torch.randint(0, 10, (rows,))


def _tokens(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (rows, 64)), torch.randint(0, 256, (rows, 64))


def _pixels(rows: int) -> tuple[Tensor, None]:
    return torch.rand(rows, 3, 64, 64), None


NETWORKS = {
    net.name: net
    for net in (
        Network("R32", 16, lambda: fl.models.resnet32(), functools.partial(_images, 32)),
        Network("R110", 55, lambda: fl.models.resnet110(), functools.partial(_images, 32)),
        Network(
            "ViT",  # 8 layers of width 192 on 64 tokens
            4,
            lambda: fl.models.vit_tiny(num_classes=10, img_size=32, patch_size=4, depth=8),
            functools.partial(_images, 32),
        ),
        Network(
            "GPT",  # 8 layers of width 128 on 64 tokens
            4,
            lambda: fl.models.gpt(vocab_size=256, block_size=64, n_layer=8, n_head=4, n_embd=128, tie=False),
            _tokens,
        ),
        Network(
            "masked ViT",  # 8 layers of width 128 on 64 patches
            4,
            lambda: MaskedViT(img_size=64, patch_size=8, dim=128, depth=8, heads=4, decoder_dim=64, decoder_heads=4),
            _pixels,
        ),
    )
}


# What a method needs beside its defaults.
NEEDED: dict[str, Callable[[Network], dict[str, Any]]] = {"lakd": lambda net: {"teacher": net.make()}}


@dataclass(frozen=True)
class Line:
    """A method on a network: the costs of its step, and those of end-to-end backprop in PyTorch there.

    Attributes:
        case: the ledger's name of it, without the network.
        head_parameters, parameters: of the heads and of the network, in numbers.
        readout: how it predicts.
        cost, bp: of the engine's step, and of backprop's: what `fastlocal.bench.ledger` records of it.
        official: what is known of the official code's step.
    """

    method: str
    net: str
    case: str
    trained_blocks: int
    head_parameters: int
    parameters: int
    readout: str
    cost: dict[str, Any]
    bp: dict[str, Any]
    official: dict[str, Any] | None = None
    batch: int = BATCH


# ------------------------------------------------------------------------------------------------------------- measuring


def build(method: str, net: Network, rows: int = BATCH) -> tuple[fl.LocalModel, Tensor, Tensor | None]:
    """The localized network and a batch, always the same. Raises ArgumentError where the method does not take the network."""
    torch.manual_seed(0)
    x, y = net.batch(rows)
    module = net.make()
    options = NEEDED.get(method, lambda _: {})(net)
    criterion: Any = getattr(module, "criterion", None) if y is None else None
    blocks = 1 if method == "bp" else net.blocks
    return fl.localize(module, method, blocks=blocks, sample=x[:2], criterion=criterion, **options), x, y


def measure(method: str, net: Network, bp: dict[str, Any]) -> Line:
    """Raises ArgumentError where the method does not take the network."""
    model, x, y = build(method, net)
    heads = sum(p.numel() for p in model.heads.parameters())
    own = sum(p.numel() for p in model.backbone.parameters())
    predicts = ledger.readout(model, x)
    cost = plain(ledger.engine_cost(model, x, y))
    return Line(method, net.name, f"K{net.blocks}", len(model.blocks), heads, own, predicts, cost, bp)


def plain(cost: ledger.Cost) -> dict[str, Any]:
    record = asdict(cost)
    del record["by_op"]
    return record


def networks_of(method: str) -> list[Line]:
    """A method on both ResNets, or on all other networks that it takes."""
    found: list[Line] = []
    for name, net in NETWORKS.items():
        if found and name in ("ViT", "masked ViT"):
            break  # it is one for convolutional networks, or for whole images and texts
        try:
            found.append(measure(method, net, backprop(name)))
        except ArgumentError:
            continue
    return found


@functools.lru_cache
def backprop(name: str) -> dict[str, Any]:
    """End-to-end backprop of PyTorch on a network: the plain loop."""
    model, x, y = build("bp", NETWORKS[name])
    return plain(ledger.plain_cost(model, x, y))


# --------------------------------------------------------------------------------------------------------------- records


def from_ledger(root: Path = ROOT) -> list[Line]:
    """Lines of the ledger's cases on ResNets."""
    path = root / LEDGER
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    short = {"resnet32": "R32", "resnet110": "R110"}
    bp = {short[row["model"]]: row["plain"] for row in record["rows"] if row["method"] == "bp"}
    return [
        Line(
            row["method"],
            short[row["model"]],
            row["name"].removeprefix(f"{short[row['model']]} "),
            row["trained_blocks"],
            row["head_parameters"],
            row["parameters"],
            row["readout"],
            row["engine"],
            bp[short[row["model"]]],
            row["official"],
            row["batch"],
        )
        for row in record["rows"]
    ]


def lines(root: Path = ROOT) -> list[Line]:
    """All recorded lines: of the ledger, then of the other methods."""
    path = root / RESULTS
    others = json.loads(path.read_text())["lines"] if path.exists() else []
    return [*from_ledger(root), *(Line(**line) for line in others)]


def record(root: Path = ROOT) -> list[Line]:
    """Measures every registered method that the ledger has not, and writes the record. Returns its lines."""
    known = {line.method for line in from_ledger(root)}
    found = [line for m in list_methods() if m["name"] not in known for line in networks_of(m["name"])]
    path = root / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"torch": torch.__version__, "lines": [asdict(line) for line in found]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return found


@dataclass(frozen=True)
class Checked:
    """What the tests compare a method with: official runs of three steps, and other numbers of the official code."""

    runs: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)


def checked(root: Path = ROOT) -> dict[str, Checked]:
    """By method: the cases of tests/methods/oracles.py whose file is there, and other golden files that are named after it."""
    data = root / "tests" / "data"
    sys.path.insert(0, str(root))
    try:
        cases = importlib.import_module("tests.methods.oracles").CASES
    finally:
        sys.path.remove(str(root))
    found: dict[str, Checked] = {method["name"]: Checked() for method in list_methods()}
    for name, case in cases.items():
        if (data / "oracles" / f"{name}.json.gz").exists():
            found[case.method].runs.append(name)
    for path in sorted([*data.glob("*.json"), *(data / "models").glob("*.json")]):
        method = next((name for name in found if path.stem.startswith(f"{name}_")), None)
        if (
            method is not None and {"losses", "cases"} & json.loads(path.read_text()).keys()
        ):  # not only names and shapes
            found[method].numbers.append(path.stem)
    return found


# ---------------------------------------------------------------------------------------------------------------- tables


def isolation(method: str) -> str:
    """What no gradient crosses, in words."""
    recipe = get_method(method)()
    if method == "bp":
        return "nothing: one block"
    if not recipe.isolated:
        return "nothing: one backward of the sum of all losses"
    if recipe.window > 1:
        return f"each block; a loss reaches {recipe.window} blocks"
    return "each block"


def method_rows(root: Path = ROOT) -> list[list[str]]:
    """The first table, from the registry, the tests and the record; the first row is the heading."""
    tested, known = checked(root), lines(root)
    rows = [["method", "paper", "what is isolated", "heads", "parameters of the heads", "inference", "checked against"]]
    for method in list_methods():
        name = method["name"]
        of_method = [line for line in known if line.method == name]
        sizes = [f"{line.head_parameters / line.parameters:.2g} ({line.net} {line.case})" for line in of_method[:1]]
        code = f"[{method['repository']}](https://github.com/{method['repository']})" if method["repository"] else ""
        readouts = sorted({line.readout for line in of_method})
        rows.append(
            [
                f"[`{name}`](methods.md#{name})",
                method["paper"] + (f"; {code}" if code else ""),
                isolation(name),
                method["summary"] if name != "bp" else "none",
                ", ".join(sizes) if name != "bp" else "-",
                ", ".join(readouts) or "-",
                status(tested[name], bool(code)),
            ]
        )
    return rows


def status(tested: Checked, published: bool) -> str:
    """How a method was checked, in words."""
    parts = []
    if tested.runs:
        parts.append(f"{len(tested.runs)} official run{'s' * (len(tested.runs) > 1)} of three steps in float64")
    if tested.numbers:
        parts.append(f"numbers of the official code ({', '.join(tested.numbers)})")
    return ", ".join(parts) or (
        "own specification; its official code was not run" if published else "own specification"
    )


def cost_rows(root: Path = ROOT) -> list[list[str]]:
    """The second table: one row for each recorded line; the first row is the heading."""
    rows = [
        [
            "network",
            "method",
            "MACs of BP's",
            "launches: fastlocal",
            "of BP's",
            "official",
            "fastlocal / official",
            "saved MiB/sample: fastlocal",
            "of BP's",
            "official",
            "fastlocal / official",
            "passes of a block: forward/full/gradient only",
        ]
    ]
    order = {name: i for i, name in enumerate(NETWORKS)}
    for line in sorted(lines(root), key=lambda line: order[line.net]):
        cost, bp, official = line.cost, line.bp, line.official
        mib = cost["saved_bytes"] / line.batch / 2**20
        rows.append(
            [
                line.net,
                f"`{line.method}`" + (f", {line.case}" if line.method != "bp" else ""),
                f"{cost['macs'] / bp['macs']:.2f}",
                f"{cost['gradients']:,}",
                f"{cost['gradients'] / bp['gradients']:.2f}",
                f"{official['launches']:,}" if official else "-",
                f"{cost['gradients'] / official['launches']:.2f}" if official else "-",
                f"{mib:.2f}",
                f"{cost['saved_bytes'] / bp['saved_bytes']:.2f}",
                f"{official['saved_mib']:.2f}" if official else "-",
                f"{mib / official['saved_mib']:.2f}" if official else "-",
                "/".join(map(ledger.span, (cost["forward"], cost["backward"], cost["handed"]))),
            ]
        )
    return rows


def to_text(rows: list[list[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def to_markdown(rows: list[list[str]], left: int) -> str:
    """The first ``left`` columns are aligned left."""
    rule = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fastlocal bench methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="as in docs/methods_table.md")
    parser.add_argument("--record", action="store_true", help="measure the methods that the ledger has not, first")
    args = parser.parse_args(argv)
    if not (ROOT / "tests" / "methods" / "oracles.py").exists():
        parser.error(f"there are no tests in {ROOT}, which say what was checked; run it in the source tree")
    if args.record:
        torch.set_num_threads(1)  # small networks: more threads gain nothing
        record()
    tables = method_rows(), cost_rows()
    lefts = len(tables[0][0]), 2
    print("\n\n".join(to_markdown(t, n) if args.markdown else to_text(t) for t, n in zip(tables, lefts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
