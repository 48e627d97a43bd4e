"""The timing bench runs every variant in turns and records what it measured."""

import json
import sys

import pytest
import torch
from torch import nn

from fastlocal.bench import step_time
from fastlocal.errors import ArgumentError


def test_it_prints_and_records_every_variant(tmp_path, capsys):
    file = tmp_path / "times.jsonl"
    options = "--model resnet20 --method dgl --blocks 3 --batch 2 --rounds 2 --threads 1"
    assert step_time.main([*options.split(), "--option", "head=auglocal", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert len(record["seconds"]) == 5
    assert all(len(times) == 2 and min(times) > 0 for times in record["seconds"].values())
    assert all(name in printed for name in record["seconds"])
    assert record["case"]["option"] == ["head=auglocal"]


REPOSITORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs
        self.fc = nn.Linear(3 * 32 * 32, kwargs["class_num"])

    def forward(self, x, y, ixx_1, ixy_1, ixx_2, ixy_2):
        assert (self.kwargs["wx"], ixx_1, ixy_1) == (0.001, 5, 0.5) and x.cuda() is x
        logits = self.fc(x.flatten(1))
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        return logits, loss


def resnet20(**kwargs):
    return Net(**kwargs)
"""


def test_an_official_network_takes_turns_too(tmp_path, capsys, monkeypatch):
    for owner in (torch.Tensor, nn.Module):  # put back afterwards
        monkeypatch.setattr(owner, "cuda", owner.cuda)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "Exp on CIFAR" / "network"
    folder.mkdir(parents=True)
    (folder / "resnetInfoPro_HPFF.py").write_text(REPOSITORY)
    options = [
        "--model",
        "resnet20",
        "--method",
        "hpff",
        "--blocks",
        "4",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert step_time.main([*options, "--official", str(tmp_path)]) == 0
    lines = {line[:34].strip(): line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert lines["official code, fp32 NCHW"][-1] == "1.00"
    assert len(lines) == 6


def test_what_the_official_code_calls_a_run():
    assert step_time.rival("auglocal", 55, {"depth": 3}).arguments["local_module_num"] == 52
    assert step_time.rival("infopro", 16, {"loss": "cross_entropy"}).arguments["rule"] == "InfoPro"
    assert step_time.rival("infopro", 16, {}).arguments["local_loss_mode"] == "contrast"
    assert step_time.rival("man_plus_plus", 16, {"head": "dgl"}).file.endswith("resnetDGL_MANPP")
    with pytest.raises(ArgumentError, match="no official network"):
        step_time.rival("lopt", 4, {})


def test_a_folder_without_the_network_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="checkout"):
        step_time.main(["--model", "resnet20", "--method", "man", "--blocks", "4", "--official", str(tmp_path)])
