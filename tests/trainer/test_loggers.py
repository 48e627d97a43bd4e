from __future__ import annotations

import csv
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlocal.errors import ArgumentError, BackendError
from fastlocal.trainer.loggers import CSVLogger, Logger, Loggers, TensorBoardLogger, WandbLogger, scalars


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path / "run")
    values = [0.1 + 0.2, 1e-300, float("inf"), 2.0, -0.0, 1 / 3]
    for k, value in enumerate(values):
        log.epoch({"epoch": k, "loss": value, "note": 'a,"b"\nc'})
    log.epoch({"epoch": torch.tensor(6), "loss": torch.tensor(0.1), "note": None})
    log.epoch({"epoch": np.int64(7), "loss": np.float64(0.25)})
    lines = rows_of(tmp_path / "run" / "metrics.csv")
    assert [float(r["loss"]) for r in lines[:6]] == values and str(float(lines[4]["loss"])) == "-0.0"
    assert [r["epoch"] for r in lines] == [str(k) for k in range(8)]
    assert lines[0]["note"] == 'a,"b" c' and lines[6]["note"] == lines[7]["note"] == ""
    assert float(lines[6]["loss"]) == torch.tensor(0.1).item() and lines[7]["loss"] == "0.25"
    assert not (tmp_path / "run" / "steps.csv").exists()


def test_a_new_column_is_an_error_that_names_it(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path)
    log.step({"step": 1, "loss": 0.5})
    with pytest.raises(ArgumentError, match=r"^row: steps.csv has no column 'extra'; .*\(step, loss\)"):
        log.step({"step": 2, "loss": 0.5, "extra": 1})
    again = CSVLogger(tmp_path, resume=True)  # the columns are read from the file
    with pytest.raises(ArgumentError, match="no column 'other'"):
        again.step({"other": 1})
    again.step({"loss": 0.25})
    assert rows_of(tmp_path / "steps.csv")[1] == {"step": "", "loss": "0.25"}


def fill(log: Any, start: int, stop: int) -> None:
    for i in range(start, stop):
        log.step({"step": i, "loss": 1 / (i + 1)})
        log.timing({"step": i, "seconds": 0.5})
        if i % 3 == 2:
            log.epoch({"epoch": i // 3, "accuracy": i / 7})


def test_rewound_files_are_those_of_a_run_that_was_not_killed(tmp_path: Path) -> None:
    whole = CSVLogger(tmp_path / "whole")
    fill(whole, 0, 12)
    killed = CSVLogger(tmp_path / "killed")
    fill(killed, 0, 7)
    state = killed.state()
    assert state == {name: (tmp_path / "killed" / name).stat().st_size for name in ("metrics.csv", "steps.csv")}
    fill(killed, 7, 10)
    with open(tmp_path / "killed" / "steps.csv", "ab") as file:
        file.write(b"10,0.0909")  # torn by the kill
    with open(tmp_path / "killed" / "timing.csv", "ab") as file:
        file.write(b"10")
    with pytest.raises(ArgumentError, match=r"^folder: .*holds metrics.csv of another training"):
        CSVLogger(tmp_path / "killed")
    resumed = CSVLogger(tmp_path / "killed", resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.rewind(state)
    fill(resumed, 7, 12)
    for name in ("metrics.csv", "steps.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    times = [r["step"] for r in rows_of(tmp_path / "killed" / "timing.csv")]
    assert times == [str(i) for i in (*range(10), *range(7, 12))]  # all rows but the torn one are kept


def test_rewound_to_nothing_it_starts_anew(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path)
    nothing = log.state()
    assert nothing == {"metrics.csv": 0, "steps.csv": 0}
    fill(log, 0, 4)
    before = (tmp_path / "steps.csv").read_bytes()
    log.rewind(nothing)
    assert (tmp_path / "steps.csv").read_bytes() == b""
    log.step({"other": 1})  # the columns are free again
    log.rewind({})
    fill(log, 0, 4)
    assert (tmp_path / "steps.csv").read_bytes() == before


def test_files_that_do_not_fit_the_checkpoint(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path)
    fill(log, 0, 6)
    state = log.state()
    steps = (tmp_path / "steps.csv").read_bytes()
    (tmp_path / "steps.csv").write_bytes(steps[:-4])  # shorter, and torn
    (tmp_path / "metrics.csv").unlink()
    with pytest.warns(RuntimeWarning, match="rows are missing") as found:
        CSVLogger(tmp_path, resume=True).rewind(state)
    assert len([w for w in found if "rows are missing" in str(w.message)]) == 2
    assert (tmp_path / "steps.csv").read_bytes() == b"".join(steps.splitlines(True)[:-1])
    with pytest.warns(RuntimeWarning, match="no line ends at byte 20"):
        CSVLogger(tmp_path, resume=True).rewind({"steps.csv": 20})
    assert (tmp_path / "steps.csv").read_bytes() == b"".join(steps.splitlines(True)[:2])


def test_overwrite_and_a_deleted_file(tmp_path: Path) -> None:
    fill(CSVLogger(tmp_path), 0, 3)
    log = CSVLogger(tmp_path, overwrite=True)
    assert not list(tmp_path.iterdir())
    fill(log, 0, 2)
    (tmp_path / "steps.csv").unlink()
    fill(log, 2, 3)
    assert (tmp_path / "steps.csv").read_text() == f"step,loss\n2,{1 / 3!r}\n"


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys, itertools\nfrom fastlocal.trainer.loggers import CSVLogger\nlog = CSVLogger(sys.argv[1])\n"
        "for i in itertools.count():\n    log.step({'step': i, 'loss': i / 3})\n    if i == 200: print('go', flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    CSVLogger(tmp_path, resume=True)
    lines = rows_of(tmp_path / "steps.csv")
    assert len(lines) > 200 and [(int(r["step"]), float(r["loss"])) for r in lines] == [
        (i, i / 3) for i in range(len(lines))
    ]


# --- loggers that fail -----------------------------------------------------------------------------------------------


class Recorder(Logger):
    def __init__(self, fail_at: str = ""):
        self.calls: list[Any] = []
        self.fail_at = fail_at

    def _note(self, name: str, value: Any = None) -> None:
        if name == self.fail_at:
            raise ValueError("no connection")
        self.calls.append((name, value))

    def start(self, config: dict[str, Any]) -> None:
        self._note("start", config)

    def epoch(self, row: Any) -> None:
        self._note("epoch", row)

    def step(self, row: Any) -> None:
        self._note("step", row)

    def close(self) -> None:
        self._note("close")

    def state(self) -> dict[str, Any]:
        return {"calls": len(self.calls)}

    def rewind(self, state: dict[str, Any]) -> None:
        del self.calls[state["calls"] :]


def test_a_logger_that_raises_is_left_out_with_one_warning() -> None:
    good, bad = Recorder(), Recorder("step")
    loggers = Loggers([bad, good])
    loggers.start({"epochs": 2})
    with pytest.warns(RuntimeWarning, match=r"^Recorder.step\(\) failed \(ValueError: no connection\)") as found:
        for i in range(3):
            loggers.step({"step": i})
    loggers.epoch({"epoch": 0})
    loggers.timing({"seconds": 1.0})
    loggers.close()
    assert len(found) == 1 and list(loggers) == [good] and len(loggers) == 1
    assert [name for name, _ in good.calls] == ["start", "step", "step", "step", "epoch", "close"]
    assert [name for name, _ in bad.calls] == ["start", "close"]


def test_an_interruption_is_no_failure() -> None:
    class Interrupted(Recorder):
        def step(self, row: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loggers([Interrupted()]).step({})


def test_the_smallest_logger_will_do() -> None:
    class Small:
        def start(self, config: Any) -> None: ...
        def epoch(self, row: Any) -> None: ...
        def step(self, row: Any) -> None: ...
        def close(self) -> None: ...

    loggers = Loggers([Small()])
    loggers.timing({"seconds": 1})
    assert loggers.state() == {}
    loggers.rewind({"Small": {}})
    for wrong in (CSVLogger, 3, "folder"):
        with pytest.raises(ArgumentError, match=r"^loggers: .* is no logger"):
            Loggers([wrong])


def test_states_go_back_to_their_loggers(tmp_path: Path) -> None:
    one, two, log = Recorder(), Recorder(), CSVLogger(tmp_path)
    loggers = Loggers([one, log, two])
    loggers.step({"step": 0})
    two.step({})
    state = loggers.state()
    assert state == {"Recorder": {"calls": 1}, "CSVLogger": log.state(), "Recorder#2": {"calls": 2}}
    for _ in range(3):
        loggers.step({"step": 1})
    loggers.rewind(state)
    assert loggers.state() == state
    loggers.step({"step": 1})
    loggers.rewind({})  # knows none of them
    assert loggers.state() != state


def test_a_full_disk_leaves_whole_lines_and_training_goes_on(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, warnings\nfrom fastlocal.trainer.loggers import CSVLogger, Loggers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "loggers = Loggers([CSVLogger(sys.argv[1])])\n"
        "with warnings.catch_warnings(record=True) as found:\n    warnings.simplefilter('always')\n"
        "    for i in range(200): loggers.step({'step': i, 'loss': i / 3})\n"
        "assert len(found) == 1 and 'CSVLogger.step() failed' in str(found[0].message), found\n"
        "assert len(loggers) == 0 and loggers.state()['CSVLogger']['steps.csv'] > 900\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    data = (tmp_path / "steps.csv").read_bytes()
    assert data.endswith(b"\n") and 900 < len(data) <= 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").symlink_to("/dev/full")
    with pytest.raises(OSError):
        CSVLogger(tmp_path).step({"step": 1})


# --- optional packages -----------------------------------------------------------------------------------------------


def test_names_of_scalars() -> None:
    row = {"step": 5, "loss_0": 0.5, "val_accuracy_12": torch.tensor(0.25), "lr": 0.1, "name": "x", "none": None}
    assert scalars(row) == {"step": 5.0, "block/0/loss": 0.5, "block/12/val_accuracy": 0.25, "lr": 0.1}


@pytest.mark.parametrize(
    ("make", "module"), [(TensorBoardLogger, "torch.utils.tensorboard"), (lambda folder: WandbLogger(), "wandb")]
)
def test_a_missing_package_is_named(monkeypatch: Any, tmp_path: Path, make: Any, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=r"needs the package (tensorboard|wandb) .*pip install"):
        make(tmp_path)


def log_a_resumed_run(make: Any) -> None:
    """Five steps, killed after the second was saved; then on from there."""
    log = make()
    log.start({"method": "dgl", "lr": 0.1})
    for i in range(1, 3):
        log.step({"step": i, "loss_0": float(i), "lr": 0.1})
    log.epoch({"epoch": 0, "val_loss_0": 0.5, "note": None})
    state = log.state()
    for i in range(3, 6):
        log.step({"step": i, "loss_0": 100.0})
    log.close()
    log = make()
    log.rewind(state)
    log.start({"method": "dgl", "lr": 0.1})
    for i in range(3, 5):
        log.step({"step": i, "loss_0": float(i)})
    log.timing({"step": 4, "seconds": 2.0})
    log.close()


def test_tensorboard_with_a_stand_in(monkeypatch: Any, tmp_path: Path) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None = None):
            written.append(("open", purge_step))

        def add_text(self, name: str, text: str, step: int) -> None:
            written.append((name, step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log_a_resumed_run(lambda: TensorBoardLogger(tmp_path))
    assert [w for w in written if w[0] == "open"] == [("open", None), ("open", 3)]
    assert [w[1:] for w in written if w[0] == "block/0/loss"] == [
        (1.0, 1), (2.0, 2), (100.0, 3), (100.0, 4), (100.0, 5), (3.0, 3), (4.0, 4),
    ]  # fmt: skip
    assert ("epoch/block/0/val_loss", 0.5, 2) in written and ("timing/seconds", 2.0, 4) in written


def test_tensorboard_for_real(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_resumed_run(lambda: TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("block/0/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("epoch/block/0/val_loss")] == [(2, 0.5)]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_wandb_with_a_stand_in(monkeypatch: Any, tmp_path: Path) -> None:
    runs: list[Any] = []

    class Run:
        def __init__(self, **options: Any):
            self.options, self.rows, self.id = options, [], options["id"] or "new-id"
            runs.append(self)

        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, row: dict[str, float]) -> None:
            self.rows.append(row)

        def finish(self) -> None: ...

    module = types.ModuleType("wandb")
    module.init = Run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    log_a_resumed_run(lambda: WandbLogger("locals", folder=tmp_path, mode="offline"))
    assert [run.options["id"] for run in runs] == [None, "new-id"]
    assert all(run.options["resume"] == "allow" and run.options["mode"] == "offline" for run in runs)
    assert runs[0].options["project"] == "locals" and runs[0].options["config"] == {"method": "dgl", "lr": 0.1}
    assert runs[1].rows[0] == {"step": 3.0, "block/0/loss": 3.0}
    assert runs[1].rows[-1] == {"step": 4.0, "timing/seconds": 2.0}
    named = WandbLogger(run_id="mine")
    named.step({"step": 1, "loss_0": 1.0})
    assert runs[2].options["id"] == "mine"


def test_wandb_for_real_and_offline(monkeypatch: Any, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_a_resumed_run(lambda: WandbLogger("locals", folder=tmp_path, mode="offline"))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    name = (tmp_path / "wandb-run.txt").read_text().strip()
    assert runs and all(run.name.endswith(name) for run in runs)
