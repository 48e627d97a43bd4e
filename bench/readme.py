"""Fills the generated parts of README.md and docs/ from the recorded results and the registry of methods.

    python -m fastlocal.bench.readme [--check] [--demo runs/demo]

A part stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. ``--demo`` first takes over what `make demo`
wrote: its table.json becomes bench/results/demo.json, its picture docs/demo.png.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlocal.bench import accuracy, demo, kernels, ledger, schedules
from fastlocal.bench import methods as method_table
from fastlocal.errors import ArgumentError
from fastlocal.methods import list_methods

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- begin: (\w+) -->\n)(.*?)(<!-- end: (\w+) -->)", re.DOTALL)
OFFICIAL, PLAIN = "official code, fp32 NCHW", "plain loop, fp32 NCHW"


def fill(text: str, root: Path = ROOT) -> str:
    """A page with its generated parts written anew.

    Raises:
        ArgumentError: a part that nobody generates, or one that does not end.
    """

    def part(match: re.Match[str]) -> str:
        name = match[2]
        if name not in PARTS or match[5] != name:
            raise ArgumentError(f"page: part {name!r} (ended by {match[5]!r}) is none of {', '.join(PARTS)}")
        return f"{match[1]}{PARTS[name](root)}\n{match[4]}"

    filled, count = PART.subn(part, text)
    if count != text.count("<!-- begin: "):
        raise ArgumentError("page: a part begins and does not end; close it with <!-- end: NAME -->")
    return filled


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and the pages in docs/."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def table(rows: list[list[str]], left: int = 1) -> str:
    """Markdown; the first row is the heading, the first ``left`` columns are aligned left."""
    rule = ["---"] * left + ["---:"] * (len(rows[0]) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


# ------------------------------------------------------------------------------------------------------------- the parts


def demo_part(root: Path) -> str:
    record = _json(root / "bench" / "results" / "demo.json")
    if record is None:
        return "No run is recorded here yet. `make demo` measures it and prints the table."
    picture = "![training curves, accuracy, memory and speed of the three methods](docs/demo.png)"
    about = f"{_cores(record['machine'])}, {record['training_seconds']:.0f} s in all. `{record['command']}`"
    parts = [
        *([picture] if (root / "docs" / "demo.png").exists() else []),
        f"ResNet-20 on scikit-learn's digits, batch {record['rows'][0]['batch_size']}. {about}",
        demo.table(record["rows"], markdown=True),
        *record["notes"],
    ]
    return "\n\n".join(parts)


def ledger_part(root: Path) -> str:
    record = _json(root / "bench" / "results" / "ledger.json")
    if record is None:
        return "No run is recorded here yet. `python -m fastlocal.bench.ledger` prints the table."
    heads = ["", "MMAC/image", "launches: official", "plain loop", "fastlocal"]
    heads += ["whole step: plain loop", "fastlocal", "saved MiB/image: official", "fastlocal"]
    rows = [heads, *(_ledger_cells(row) for row in record["rows"] if row["official"])]
    about = f"`python -m fastlocal.bench.ledger --batch {record['batch']}`, torch {record['torch']}: counts, not times."
    return f"{about}\n\n{table(rows)}"


def _ledger_cells(row: dict[str, Any]) -> list[str]:
    official, plain, engine = row["official"], row["plain"], row["engine"]
    return [
        row["name"],
        f"{engine['macs'] / row['batch'] / 1e6:.0f}",
        f"{official['launches']:,}",
        f"{plain['gradients']:,}",
        f"{engine['gradients']:,}",
        f"{_launches(plain):,}",
        f"{_launches(engine):,}",
        f"{official['saved_mib']:.2f}",
        f"{engine['saved_bytes'] / row['batch'] / 2**20:.2f}",
    ]


def _launches(cost: dict[str, Any]) -> int:
    return cost["gradients"] + cost["optimizer"] + cost["safety"]


LONG_RUN = 3  # rounds from which a run has a table of its own


def step_time_part(root: Path) -> str:
    path = root / "bench" / "results" / "step_time.jsonl"
    if not path.exists():
        return "No run is recorded here yet. `python -m fastlocal.bench.step_time` measures and prints a table."
    latest: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        command = _step_time_command(record["case"])
        latest.pop(command, None)  # the newest of a command stands, in the order of recording
        latest[command] = record
    long = [_step_time_table(*item) for item in latest.items() if item[1]["case"]["rounds"] >= LONG_RUN]
    short = {command: record for command, record in latest.items() if record["case"]["rounds"] < LONG_RUN}
    return "\n\n".join([*long, _short_runs(short)] if short else long)


def _short_runs(latest: dict[str, dict[str, Any]]) -> str:
    """One table of runs too short for one of their own: speed against the official code (the plain loop where there is none)."""
    names = [name for name in next(iter(latest.values()))["seconds"] if name.startswith("fastlocal")]
    rows = [["run", "rounds", "base", "ms a step", *names]]
    for command, record in latest.items():
        times = {name: statistics.median(seconds) for name, seconds in record["seconds"].items()}
        base = OFFICIAL if OFFICIAL in times else PLAIN
        case = record["case"]
        rows.append(
            [
                f"`{command.partition('--model ')[2].partition(' --rounds')[0]}`",
                str(case["rounds"]),
                base.partition(",")[0],
                f"{1000 * times[base]:,.0f}",
                *(f"{times[base] / times[name]:.2f}" for name in names),
            ]
        )
    head = "Shorter runs of `python -m fastlocal.bench.step_time --model ...`, speed against the base in fp32 and NCHW:\n\n"
    return head + table(rows)


def _step_time_command(case: dict[str, Any]) -> str:
    options = "".join(f" --option {option}" for option in case["option"])
    official = " --official DIR" if case["official"] else ""
    return (
        f"python -m fastlocal.bench.step_time --model {case['model']} --method {case['method']} --blocks {case['blocks']}"
        f"{options} --batch {case['batch']} --rounds {case['rounds']} --threads {case['threads']}{official}"
    )


def _step_time_table(command: str, record: dict[str, Any]) -> str:
    case, machine = record["case"], record["machine"]
    middle = {name: statistics.median(seconds) for name, seconds in record["seconds"].items()}
    against = [(text, name) for text, name in (("official code", OFFICIAL), ("plain loop", PLAIN)) if name in middle]
    rows = [["", "ms a step", *(f"speed against the {text}" for text, _ in against)]]
    for name, seconds in middle.items():
        rows.append([name, f"{seconds * 1e3:,.0f}", *(f"{middle[base] / seconds:.2f}" for _, base in against)])
    title = (
        f"{case['model']}, {case['method']}, {case['blocks']} blocks, batch {case['batch']}, median of "
        f"{case['rounds']} steps that take turns. {machine['cpu']['name']}, {case['threads']} threads, torch "
        f"{machine['torch']['version']}. `{command}`"
    )
    return f"{title}\n\n{table(rows)}"


def schedules_part(root: Path) -> str:
    records = schedules.read(root / "bench" / "results" / "schedules.jsonl")
    if not records:
        return "No run is recorded here yet. `python -m fastlocal.bench.schedules` measures and prints a table."
    machine, threads = records[-1]["machine"], records[-1]["threads"]
    about = (
        'Speed over `schedule="sequential"` in the same run, medians of steps that take turns (over 1 is faster); the most bytes '
        "alive beyond weights, optimizer state and batch; what the executor costs the host in a step. "
        'Where `"auto"` chose the sequential step it runs nothing else, so its figure there shows how far two runs of the same are '
        "apart on this machine. "
        f"{machine['cpu']['name']}, {threads} threads, torch {machine['torch']['version']}. "
        "`python -m fastlocal.bench.schedules`"
    )
    return f"{about}\n\n{table(schedules.rows(records))}"


def _accuracy(rows: Callable[[list[dict[str, Any]]], list[list[str]]], left: int = 1) -> Callable[[Path], str]:
    """A part that is one table of the recorded accuracies."""

    def part(root: Path) -> str:
        found = rows(accuracy.read(root / accuracy.RESULTS))
        if len(found) == 1:
            return (
                "No run is recorded here yet. `python -m fastlocal.bench.accuracy --suite methods` trains and records."
            )
        return table(found, left)

    return part


def accuracy_part(root: Path) -> str:
    records = accuracy.read(root / accuracy.RESULTS)
    shown = _accuracy(accuracy.summary_rows)(root)
    return f"{shown}\n\n{accuracy.conditions(records)}" if accuracy.compared(records) else shown


def accuracy_conditions_part(root: Path) -> str:
    return accuracy.conditions(accuracy.read(root / accuracy.RESULTS))


def accuracy_commands_part(root: Path) -> str:
    records = accuracy.read(root / accuracy.RESULTS)
    groups = [*accuracy.compared(records).values(), accuracy.against_blocks(records)]
    cases = [accuracy.Case(**runs[0]["case"]) for of_case in groups for runs in of_case.values()]  # type: ignore[attr-defined]
    commands = dict.fromkeys(case.command(f"{case.data}.npz") for case in cases)
    return "\n".join(["```", *commands, "```"]) if commands else "No run is recorded here yet."


def methods_part(root: Path) -> str:
    rows = [["name", "what trains a block", "options and defaults", "paper", "official code"]]
    for method in list_methods():
        options = ", ".join(f"`{name}={value!r}`" for name, value in method["options"].items()) or "none"
        code = f"[{method['repository']}](https://github.com/{method['repository']})" if method["repository"] else "-"
        rows.append([f"`{method['name']}`", method["summary"], options, method["paper"], code])
    return table(rows, left=5)


def papers_part(root: Path) -> str:
    return "\n".join(f"- `{method['name']}`: {method['paper']}" for method in list_methods())


def ledger_full_part(root: Path) -> str:
    if not (root / "bench" / "results" / "ledger.json").exists():
        return "No run is recorded here yet. `python -m fastlocal.bench.ledger` prints the table."
    return ledger.to_markdown(ledger.read(root))


def method_table_part(root: Path) -> str:
    return table(method_table.method_rows(root), left=7)


def method_costs_part(root: Path) -> str:
    return table(method_table.cost_rows(root), left=2)


def kernels_part(root: Path) -> str:
    record = _json(root / "bench" / "results" / "kernels.json")
    if record is None:
        return "No kernels are recorded here yet."
    return f"Compiled by Triton {record['triton']}:\n\n{table(kernels.summary(record['rows']))}"


PARTS: dict[str, Callable[[Path], str]] = {
    "demo": demo_part,
    "ledger": ledger_part,
    "ledger_full": ledger_full_part,
    "method_table": method_table_part,
    "method_costs": method_costs_part,
    "kernels": kernels_part,
    "step_time": step_time_part,
    "schedules": schedules_part,
    "methods": methods_part,
    "accuracy": accuracy_part,
    "accuracy_conditions": accuracy_conditions_part,
    "accuracy_full": _accuracy(accuracy.full_rows, left=3),
    "accuracy_all": _accuracy(accuracy.everything_rows, left=3),
    "accuracy_heads": _accuracy(accuracy.head_rows, left=3),
    "accuracy_blocks": _accuracy(accuracy.block_rows),
    "accuracy_rates": _accuracy(accuracy.rate_rows, left=3),
    "accuracy_commands": accuracy_commands_part,
    "papers": papers_part,
}


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _cores(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}, torch {machine['torch']}"


def take_over(folder: Path, root: Path = ROOT) -> None:
    """Copies a demo's record and picture to where the pages find them.

    Raises:
        ArgumentError: the folder holds no finished run.
    """
    for source, target in (("table.json", "bench/results/demo.json"), ("demo.png", "docs/demo.png")):
        if not (folder / source).is_file():
            raise ArgumentError(f"--demo: {folder} has no {source}; run `make demo` first, with matplotlib installed")
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / source, root / target)


def main(arguments: list[str] | None = None) -> int:
    """Writes the pages; 1 where ``--check`` finds one that is not what it would write."""
    parser = argparse.ArgumentParser(
        prog="python -m fastlocal.bench.readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="write nothing, and fail where a page would change")
    either.add_argument("--demo", type=Path, metavar="DIR", help="folder that `make demo` wrote")
    options = parser.parse_args(arguments)
    if not (ROOT / "README.md").exists():
        parser.error(f"there is no README.md in {ROOT}; run it in the source tree")
    try:
        if options.demo:
            take_over(options.demo)
        stale = [page for page in pages() if fill(page.read_text()) != page.read_text()]
    except ArgumentError as error:
        parser.error(str(error))
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'differs from the records' if options.check else 'written'}")
        if not options.check:
            page.write_text(fill(page.read_text()))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
