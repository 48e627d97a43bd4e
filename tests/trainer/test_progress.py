import re
import subprocess
import sys

import pytest
import torch

from fastlocal.engine.memory import peak_bytes
from fastlocal.trainer.progress import Bar, losses_text, skipped_text


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([0.314], ".31"),
        ([2.3, 0.996, 12.4, 0.004], "2.3 1.0 12 | last .00"),
        ([9.96, float("nan")], "10 | last nan"),
    ],
)
def test_losses_text(losses, text):
    assert losses_text(losses) == text


def test_of_many_blocks_some_are_shown_with_their_numbers():
    text = losses_text([k / 100 for k in range(55)])
    assert text.startswith("0:.00 ") and " 53:.53 | last .54" in text and text.count(":") == 11


def test_a_disabled_bar_is_silent(capsys):
    with Bar(2, "run", enabled=False) as bar:
        bar.step([1.0])
    assert capsys.readouterr() == ("", "")


def test_losses_that_were_not_read_keep_the_last_ones(capsys):
    with Bar(2, "run") as bar:
        bar.step([1.0, 2.0])
        bar.step(None)
    assert "2/2" in (err := capsys.readouterr().err) and "loss 1.0 | last 2.0" in err


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([], ""),
        ([0, 0.0, 0], ""),
        ([0, 0, 3.0], "skipped 3 (block 2)"),
        ([1, 0, 3.0], "skipped 4 (blocks 0, 2)"),
        ([1.0] * 55, "skipped 55 (blocks 0, 1, 2, 3, ...)"),
    ],
)
def test_skipped_text(counts, text):
    assert skipped_text(counts) == text


def test_peak_memory_grows_with_the_process():
    code = (
        "import torch\nfrom fastlocal.engine.memory import peak_bytes\nbefore = peak_bytes()\n"
        "x = torch.ones(512, 2**18)\ndel x\nprint(before, peak_bytes(torch.device('cpu')))"
    )
    before, after = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert 2**29 < after < max(before, 2**29) + 2**30  # a child starts with the peak of its parent
    assert peak_bytes(torch.device("meta")) is None


def test_on_a_cuda_device_its_allocator_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    bar = Bar(2, enabled=False)
    bar._losses = [1.0]
    assert bar.text() == "loss 1.0  peak 1.5 GiB"


def test_all_there_is_to_say(capsys):
    with Bar(5, "run", split="val", device=torch.device("cpu")) as bar:
        bar.step([1.0, 2.0], samples=100)
        bar.skipped = [0, 3]
        bar.accuracy, bar.ema_accuracy = 0.931, 0.9345
        bar.step(None, samples=50)
    err = capsys.readouterr().err
    assert "2/5" in err and re.search(r"[\d.]+(it/s|s/it)", err)
    last = err.rsplit("\r", 1)[-1]
    assert re.search(
        r"loss 1.0 \| last 2.0  [\d.]+[kM]? samples/s  skipped 3 \(block 1\)  peak [\d.]+ [MG]iB  val 93.1%  EMA 93.5%",
        last,
    )


def test_samples_a_second_are_steps_a_second_times_samples_a_step(capsys, monkeypatch):
    with Bar(4, "run") as bar:
        for samples in (10, 20, 10, 20):
            bar.step(None, samples=samples)
        monkeypatch.setattr(bar, "_rate", lambda: 100.0)
        assert bar.text().startswith("1.5k samples/s")
        monkeypatch.setattr(bar, "_rate", lambda: 2e5)
        assert bar.text().startswith("3M samples/s")
    with Bar(4, "run") as bar:
        bar.step([1.0])
        assert "samples" not in bar.text() and "skipped" not in bar.text() and "%" not in bar.text()


def test_the_number_of_steps_need_not_be_known(capsys):
    with Bar(None, "run") as bar:
        for _ in range(3):
            bar.step([0.5])
    last = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert last.startswith("run 3 steps ") and "loss .50" in last and "%" not in last


def test_a_resumed_bar_starts_where_it_was(capsys):
    with Bar(10, "run", done=7) as bar:
        bar.step([0.5])
    assert "8/10" in capsys.readouterr().err
