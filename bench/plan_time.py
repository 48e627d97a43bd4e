"""How far `fastlocal.plan` is from what happens: the time of a step, its peak bytes, and what planning itself takes.

    python -m fastlocal.bench.plan_time [--only times,peaks,hosts] [--json bench/results/plan.json]

times: this machine is measured (`Device.measure`), the step of every case is planned for it and then timed.
peaks: the planned peak of the full models against every storage that a real step on a CPU has alive.
hosts: seconds and most resident memory of `fastlocal plan` in a process of its own, for large networks.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlocal as fl
from fastlocal import info, models
from fastlocal.blocks.measure import StorageTracker
from fastlocal.engine.plan import Device

VIT = {"img_size": 32, "patch_size": 4, "num_classes": 10}
GPT = {"vocab_size": 8192, "block_size": 128, "n_embd": 256, "n_layer": 6, "n_head": 8, "tie": False}
INFOPRO = {"loss": "cross_entropy", "lam": (1.0, 1.0)}

# model, its options, batch, method, blocks, its options, precision
TIMES: list[tuple[str, dict[str, Any], int, str, int, dict[str, Any], str]] = [
    ("resnet32", {}, 64, "bp", 1, {}, "32-true"),
    ("resnet32", {}, 64, "dgl", 8, {}, "32-true"),
    ("resnet32", {}, 64, "auglocal", 16, {"depth": 2}, "32-true"),
    ("resnet32", {}, 64, "predsim", 8, {}, "32-true"),
    ("resnet32", {}, 64, "dgl", 8, {}, "bf16-mixed"),
    ("resnet110", {}, 32, "bp", 1, {}, "32-true"),
    ("resnet110", {}, 32, "dgl", 16, {}, "32-true"),
    ("resnet110", {}, 32, "auglocal", 16, {"depth": 2}, "bf16-mixed"),
    ("vgg11b", {}, 16, "bp", 1, {}, "32-true"),
    ("vgg11b", {}, 16, "infopro", 3, INFOPRO, "32-true"),
    ("vgg11b", {}, 16, "dgl", 4, {}, "bf16-mixed"),
    ("vit_tiny", VIT, 32, "bp", 1, {}, "32-true"),
    ("vit_tiny", VIT, 32, "dgl", 6, {}, "32-true"),
    ("vit_tiny", VIT, 32, "auglocal", 6, {"depth": 2}, "bf16-mixed"),
    ("gpt", GPT, 8, "bp", 1, {}, "32-true"),
    ("gpt", GPT, 8, "dgl", 3, {}, "32-true"),
    ("gpt", GPT, 8, "auglocal", 4, {"depth": 2}, "bf16-mixed"),
]
_SMALL_VIT = {"img_size": 64, "patch_size": 8, "num_classes": 100}
_GPT2 = {"block_size": 256, "tie": False}
PEAKS: list[tuple[str, dict[str, Any], int, str, int, dict[str, Any]]] = [
    ("resnet110", {}, 16, "bp", 1, {}),
    ("resnet110", {}, 16, "dgl", 16, {}),
    ("resnet110", {}, 16, "auglocal", 16, {"depth": 2}),
    ("resnet110", {}, 16, "predsim", 16, {}),
    ("vit_small", _SMALL_VIT, 8, "bp", 1, {}),
    ("vit_small", _SMALL_VIT, 8, "dgl", 6, {}),
    ("vit_small", _SMALL_VIT, 8, "auglocal", 6, {"depth": 2}),
    ("vit_small", _SMALL_VIT, 8, "predsim", 6, {}),
    ("vgg11b", {}, 8, "bp", 1, {}),
    ("vgg11b", {}, 8, "dgl", 4, {}),
    ("vgg11b", {}, 8, "predsim", 4, {}),
    ("vgg11b", {}, 8, "infopro", 3, INFOPRO),
    ("gpt", _GPT2, 2, "bp", 1, {}),
    ("gpt", _GPT2, 2, "dgl", 4, {}),
    ("gpt", _GPT2, 2, "auglocal", 6, {"depth": 2}),
    ("gpt", _GPT2, 2, "auglocal", 4, {"depth": 2, "form": "imagenet"}),
]
_LARGE_GPT = "--model gpt --model-option n_layer=96 --model-option n_embd=12288 --model-option n_head=96"
_GPT_10B = "--model gpt --model-option n_layer=48 --model-option n_embd=4096 --model-option n_head=32"
HOSTS = [
    "--model vit_b --batch 256 --device h100 --budget 16GiB",
    "--model vit_l --method bp --batch 256",
    "--model vit_huge --method dgl --blocks 8 --batch 256 --precision bf16-mixed",
    "--model resnet152 --method bp --batch 256",
    "--model resnet152 --method dgl --blocks 8 --batch 256",
    f"{_GPT_10B} --method bp --batch 8",
    f"{_GPT_10B} --model-option tie=False --method dgl --blocks 12 --batch 8 --optimizer adam",
    f"{_LARGE_GPT} --method bp --batch 2 --precision bf16-mixed --optimizer adam",
]


def batch_of(model: str, options: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
    """Random images or tokens and targets that the model takes."""
    if model == "gpt":
        tokens = torch.randint(0, options.get("vocab_size", 50257), (rows, options["block_size"]))
        return tokens, tokens
    size, classes = options.get("img_size", 32), options.get("num_classes", 10)
    return torch.randn(rows, 3, size, size), torch.randint(0, classes, (rows,))


def sgd(named: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=1e-3, momentum=0.9)


def measure_times(device: Device, rounds: int) -> Iterator[dict[str, Any]]:
    """Predicted and measured seconds of a step of every case."""
    for name, options, rows, method, blocks, extra, precision in TIMES:
        torch.manual_seed(0)
        x, y = batch_of(name, options, rows)
        model = fl.localize(models.create(name, **options), method, blocks=blocks, sample=x[:2], **extra)
        plan = fl.plan(model, (x, y), device=device, precision=precision)
        engine = fl.Engine(model, sgd, precision=precision)
        seconds = []
        for turn in range(rounds + 2):
            start = time.perf_counter()
            float(engine.step(x, y).losses[-1])
            if turn > 1:
                seconds.append(time.perf_counter() - start)
        case = {
            "model": name,
            "options": options,
            "batch": rows,
            "method": method,
            "blocks": blocks,
            "precision": precision,
        }
        case |= {"predicted": plan.seconds, "seconds": seconds, "launches": plan.launches, "flops": plan.flops}
        print(times_row(case), flush=True)
        yield case


def error_of(case: dict[str, Any]) -> float:
    """Predicted over measured seconds, less one."""
    return case["predicted"] / statistics.median(case["seconds"]) - 1


def times_row(case: dict[str, Any]) -> str:
    middle = statistics.median(case["seconds"])
    return (
        f"{case['model']:10}{case['method']:9}K={case['blocks']:<3} {case['precision']:11}batch {case['batch']:<4}"
        f"{case['predicted'] * 1e3:9.0f} ms predicted {middle * 1e3:9.0f} ms measured {error_of(case):+8.0%}"
    )


def measure_peaks() -> list[dict[str, Any]]:
    """Planned bytes, and those of all storages alive at the peak of a second step."""
    records = []
    for name, options, rows, method, blocks, extra in PEAKS:
        torch.manual_seed(0)
        x, y = batch_of(name, options, rows)
        plan = fl.plan(
            lambda: models.create(name, **options),  # noqa: B023
            x,
            method=method,
            blocks=blocks,
            device="cpu-core",  # the operators that run below
            **extra,
        )
        storages = StorageTracker()
        with storages:
            model = fl.localize(models.create(name, **options), method, blocks=blocks, sample=x[:2], **extra)
            engine = fl.Engine(model, sgd)
            own = x.clone(), y.clone()
            engine.step(own)
            gc.collect()
            storages.mark("step")
            engine.step(own)
        peak = storages.peaks["step"]
        record = {"model": name, "options": options, "batch": rows, "method": method, "blocks": blocks, "extra": extra}
        records.append(record | {"predicted": plan.peak_bytes, "tracked": peak})
        print(f"{name:10} {method:9} K={blocks:<3} {plan.peak_bytes:>14,} planned {peak:>14,} tracked", flush=True)
        del model, engine, own
    return records


_CHILD = """
import resource, sys
from fastlocal import cli
code = cli.main(sys.argv[1:])
print("maxrss", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def measure_host(command: str) -> dict[str, Any]:
    """Seconds and bytes of ``fastlocal plan`` with these arguments in a new process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _CHILD, "plan", *command.split()], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if "maxrss" not in done.stdout:
        raise RuntimeError(f"fastlocal plan {command}: {done.stderr[-2000:]}")
    lines = done.stdout.splitlines()
    found = {"command": f"fastlocal plan {command}", "seconds": seconds, "maxrss": 1024 * int(lines[-1].split()[1])}
    peak = next(line for line in lines if line.startswith("peak"))
    return found | {"peak": peak.partition(" = ")[0], "code": done.returncode}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """The Markdown of docs/plan.md, by the name of its place there."""
    rows = {
        "peaks": ["| model | method | blocks | batch | planned MiB | tracked MiB |", "| --- | --- | ---: | ---: | ---: | ---: |"],
        "times": ["| model | method | blocks | precision | batch | predicted ms | measured ms | error |",
                  "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"],
        "hosts": ["| command | seconds | MiB |", "| --- | ---: | ---: |"],
    }  # fmt: skip
    for r in record.get("peaks", []):
        form = f" ({r['extra']['form']})" if "form" in r["extra"] else ""
        cells = (
            r["model"],
            r["method"] + form,
            r["blocks"],
            r["batch"],
            f"{r['predicted'] / 2**20:,.2f}",
            f"{r['tracked'] / 2**20:,.2f}",
        )
        rows["peaks"].append("| " + " | ".join(map(str, cells)) + " |")
    for r in record["times"]:
        middle = statistics.median(r["seconds"]) * 1e3
        cells = r["model"], r["method"], r["blocks"], r["precision"], r["batch"], f"{r['predicted'] * 1e3:,.0f}"
        more = f"{middle:,.0f}", f"{error_of(r):+.0%}"
        rows["times"].append("| " + " | ".join(map(str, (*cells, *more))) + " |")
    for r in record.get("hosts", []):
        rows["hosts"].append(f"| `{r['command']}` | {r['seconds']:.0f} | {r['maxrss'] / 2**20:,.0f} |")
    texts = {name: "\n".join(lines) for name, lines in rows.items()}
    errors = sorted(abs(error_of(r)) for r in record["times"])
    machine = record["machine"]
    texts["times"] += (
        f"\n\nError: median {statistics.median(errors):.0%}, worst {errors[-1]:.0%}. {record['device']['name']}, torch "
        f"{machine['torch']['version']}; measuring it took {record['device']['seconds']:.0f} s."
    )
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="times,peaks,hosts", help="which of times,peaks,hosts")
    parser.add_argument("--threads", type=int, default=2, help="(2)")
    parser.add_argument("--rounds", type=int, default=5, help="steps timed of every case (5)")
    parser.add_argument("--json", type=Path, help="write what was measured into this file, the other parts kept")
    args = parser.parse_args(argv)
    wanted = args.only.split(",")
    if set(wanted) - {"times", "peaks", "hosts"}:
        parser.error(f"--only: got {args.only!r}; valid are times, peaks, hosts")
    torch.set_num_threads(args.threads)
    record = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    if "times" in wanted:
        start = time.perf_counter()
        device = Device.measure()
        took = time.perf_counter() - start
        print(f"{device.name}: measured in {took:.1f} s, {device.launch * 1e6:.1f} us a launch")
        record["device"] = {"name": device.name, "launch": device.launch, "seconds": took}
        record["machine"] = info.collect()
        record["times"] = []
        for case in measure_times(device, args.rounds):
            record["times"].append(case)
            _write(record, args.json)
        errors = sorted(abs(error_of(case)) for case in record["times"])
        print(f"error: median {statistics.median(errors):.0%}, worst {errors[-1]:.0%}")
    if "peaks" in wanted:
        record["peaks"] = measure_peaks()
    if "hosts" in wanted:
        record["hosts"] = []
        for command in HOSTS:
            record["hosts"].append(measure_host(command))
            print(record["hosts"][-1], flush=True)
    _write(record, args.json)
    return 0


def _write(record: dict[str, Any], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
