"""Registers, shared memory and spills of every Triton kernel, for GPUs that are not there: compiled, not run.

    fastlocal bench kernels [--for 80 90 100] [--only NAME] [--record FILE]

The launches are those of the operators in fastlocal.bench.operators at the sizes below, in float32 and bfloat16; each is
compiled for compute capability 8.0, 9.0 and 10.0 as Triton's JIT would specialise it. Needs Triton (its own ptxas) and no
device. See docs/kernels.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlocal.bench import operators
from fastlocal.bench.operators import Case, Head, Loss, Norm, NormConv, Pairs, Update

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16)
MAX_REGISTERS = 255
RECORD = Path(__file__).resolve().parent / "results" / "kernels.json"
Row = dict[str, Any]


def cases() -> tuple[Case, ...]:
    """Few rows: what a kernel is compiled for are its channels, positions, classes, layout and dtype. A kernel that no
    case here launches is missing in the record, and a test says so."""
    return operators.existing(
        Head(4, 16, 32, 10),
        Head(4, 64, 8, 100, channels_last=True),
        Head(4, 512, 7, 1000),
        Head(4, 64, 7, 50_000),
        Head(5000, 4, 2, 10),  # many rows: those that count are counted in a launch of their own
        Norm("bn_act", 8, 16, 32, residual=True),
        Norm("bn_act", 8, 64, 8, residual=True, channels_last=True),
        Norm("bn_act", 64, 4, 32, residual=True),
        Norm("bn_act", 64, 4, 32, channels_last=True),
        Norm("bn_act", 8, 16, 32, residual=True, training=False),
        Norm("bn_act", 8, 64, 8, channels_last=True, training=False),
        Norm("bn_act_pool", 8, 16, 32, residual=True),
        Norm("bn_act_pool", 8, 64, 8, residual=True, channels_last=True),
        Norm("bn_act_pool", 64, 4, 32, residual=True),
        Norm("bn_act_pool", 64, 4, 32, channels_last=True),
        NormConv(8, 16, 8),
        NormConv(64, 4, 32, channels_last=True),
        Update("fused_sgd_", "block"),
        Update("fused_sgd_", "block", average=True, clipped=True),
        Update("fused_adamw_", "block"),
        Update("fused_adamw_", "block", average=True, clipped=True),
        Update("ema_update_", "block"),
        Pairs("supervised_contrastive_loss", 128, 128),
        Pairs("similarity_matching_loss", 128, 256),
        Pairs("similarity_matching_loss", 128, 64, 8),
        Pairs("similarity_matching_loss", 4, 64, 32),
        Loss("goodness_loss", 128, 64, 8),
        Loss("class_goodness_cross_entropy", 128, 160, 8),
        Loss("norm_linear_cross_entropy", 128, 512),
        Loss("reconstruction_loss", 128, 3, 32),
    )


class Launch(NamedTuple):
    """A launch that was recorded, and the case that it belongs to."""

    kernel: str
    case: Case
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches(wanted: Sequence[Case] | None = None, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Launch]:
    """What the cases launch, in the dtypes; of launches that compile to the same code only the first."""
    from fastlocal.bench import ahead  # Triton is optional

    seen = set()
    for case in cases() if wanted is None else wanted:
        for dtype in dtypes:
            this = dataclasses.replace(case, dtype=dtype)  # type: ignore[type-var]
            inputs = this.inputs("cpu")
            with ahead.recording() as recorders:
                if this.explain(inputs, "triton") is None:  # this operator or size has no kernel
                    continue
                this.ours("triton")(*inputs)
            for name, recorder in recorders.items():
                for arguments, options in recorder.calls:
                    key = name, repr(ahead.specialized(recorder.kernel, arguments, options))
                    if key not in seen:
                        seen.add(key)
                        yield Launch(name, this, recorder.kernel, arguments, options)


def compiled(launch: Launch, capability: int, work: Path) -> Row:
    """One line of the record."""
    from fastlocal.bench import ahead

    used = ahead.compile_for(capability, launch.function, launch.arguments, launch.options, work)
    return {
        "kernel": launch.kernel,
        "operator": launch.case.operator,
        "size": launch.case.size,
        "dtype": str(launch.case.dtype)[6:],
        "capability": capability,
        "warps": launch.options.get("num_warps", 4),
        **used._asdict(),
    }


def wrong(row: Row) -> str | None:
    """What is wrong with a line, or None: a spilled register, too many of them, more shared memory than there is."""
    from fastlocal.bench.ahead import SHARED_LIMIT

    what = f"{row['kernel']} ({row['operator']} {row['size']}, {row['dtype']}, sm_{row['capability']})"
    if row["spilled"]:
        return f"{what}: spills {row['spilled']} bytes"
    if not 0 < row["registers"] <= MAX_REGISTERS:
        return f"{what}: {row['registers']} registers"
    if row["shared"] > SHARED_LIMIT[row["capability"]]:
        return f"{what}: {row['shared']} bytes of shared memory"
    return None


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each kernel: variants, warps, most registers for each GPU, most shared memory, bytes spilled."""
    found = [["kernel", "variants", "warps", *(f"registers sm_{c}" for c in CAPABILITIES), "shared bytes", "spilled"]]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel]
        warps = sorted({row["warps"] for row in own})
        most = [max((row["registers"] for row in own if row["capability"] == c), default=None) for c in CAPABILITIES]
        found.append(
            [
                f"`{kernel}`",
                str(len({(row["size"], row["dtype"], row["operator"]) for row in own})),
                ", ".join(map(str, warps)),
                *("-" if m is None else str(m) for m in most),
                str(max(row["shared"] for row in own)),
                str(sum(row["spilled"] for row in own)),
            ]
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a kernel spills or needs too much, or where none of the cases launches it; 2 without Triton."""
    parser = argparse.ArgumentParser(
        prog="fastlocal bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--for", dest="capabilities", type=int, nargs="+", default=CAPABILITIES, choices=CAPABILITIES)
    parser.add_argument("--only", metavar="NAME", help="kernels with this in their name")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help=f"write the record (of this project: {RECORD.name})"
    )
    args = parser.parse_args(argv)
    try:
        import triton

        from fastlocal.bench import ahead
    except ImportError as error:
        print(f"Triton is not installed: {error}")
        return 2
    if ahead.cuobjdump() is None:
        print("neither Triton nor the system has cuobjdump, which reads the registers of a kernel")
        return 2
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for launch in launches():
            if args.only is None or args.only in launch.kernel:
                rows += [compiled(launch, capability, Path(work)) for capability in args.capabilities]
    lines = summary(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))))
    bad = [text for text in map(wrong, rows) if text]
    if args.only is None:
        bad += [f"{name}: no case launches it" for name in ahead.kernels() if name not in {r["kernel"] for r in rows}]
    print(*bad, sep="\n")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        about = {"triton": triton.__version__, "torch": str(torch.__version__)}
        text = ",\n".join(json.dumps(row) for row in rows)
        args.record.write_text(json.dumps(about)[:-1] + f', "rows": [\n{text}\n]}}\n')
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
