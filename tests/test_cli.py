import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlocal import models
from fastlocal.cli import main
from fastlocal.trainer import read

TINY = ["--model", "resnet20", "--model-option", "width=4", "--quiet", "--threads", "1"]


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.integers(0, 60, (60, 8, 8)) + 90 * y[:, None, None]).astype(np.uint8)
    path = tmp_path / "tiny.npz"
    np.savez(path, x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    return str(path)


def test_train_writes_everything(data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*TINY, "--data", data, "--blocks", "5", "--option", "depth=1", "--epochs", "2", "--batch-size", "16"]
    assert main(["train", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "48 training and 12 test images of 1x8x8, 3 classes" in printed and f"written to {out}: config.json" in printed
    )

    config = json.loads((out / "config.json").read_text())
    assert (
        config["resolved"]["options"]["depth"] == 1 and len(config["resolved"]["blocks"]) == 4
    )  # the last two are one
    assert config["lr"] == 0.1 and config["channels_last"] is True and config["epochs"] == 2
    rows = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert len(rows) == 2 and rows[0]["steps"] == "3" and "loss_3" in rows[0] and "loss_4" not in rows[0]

    found = read(out / "checkpoint.safetensors")
    net = models.create("resnet20", width=4, in_channels=1, num_classes=3)
    net.load_state_dict(found.backbone())
    assert found.extra["resolved"] == config["resolved"]


def test_the_same_command_gives_the_same_numbers(data, tmp_path):
    for name in ("a", "b", "c"):
        seed = "1" if name == "c" else "0"
        assert (
            main(
                [
                    "train",
                    *TINY,
                    "--data",
                    data,
                    "--method",
                    "dgl",
                    "--epochs",
                    "1",
                    "--seed",
                    seed,
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    a, b, c = (read(tmp_path / name / "checkpoint.safetensors").tensors for name in ("a", "b", "c"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_default_blocks_and_folders(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for method, blocks in (("dgl", 10), ("bp", 1)):
        assert main(["train", *TINY, "--data", data, "--method", method, "--epochs", "1", "--no-channels-last"]) == 0
        config = json.loads((tmp_path / f"runs/resnet20-tiny-{method}/config.json").read_text())
        assert len(config["resolved"]["blocks"]) == blocks and config["channels_last"] is False
    assert main(["train", *TINY, "--data", data, "--method", "bp", "--epochs", "1", "--optimizer", "adamw"]) == 0
    assert json.loads((tmp_path / "runs/resnet20-tiny-bp-2/config.json").read_text())["lr"] == 1e-3


def test_methods_that_see_the_image_are_told_its_normalisation(data, tmp_path):
    arguments = [
        *TINY,
        "--data",
        data,
        "--method",
        "infopro",
        "--blocks",
        "2",
        "--option",
        "lam=5,0.5",
        "--epochs",
        "1",
    ]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 0
    options = json.loads((tmp_path / "run/config.json").read_text())["resolved"]["options"]
    assert len(options["mean"]) == len(options["std"]) == 1 and options["lam"] == [5, 0.5]


@pytest.mark.parametrize("model", ["mlp", "vit_tiny"])
def test_models_get_the_size_of_the_images(data, tmp_path, model):
    sizes = {"mlp": ["hidden=(8,8)"], "vit_tiny": ["patch_size=4", "dim=12", "depth=2"]}[model]
    options = [part for size in sizes for part in ("--model-option", size)]
    arguments = ["--model", model, *options, "--data", data, "--method", "dgl", "--epochs", "1", "--quiet"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), "--threads", "1"]) == 0


BAD = {
    "method": (["--method", "augloca"], "no method 'augloca'. Did you mean \"auglocal\"?"),
    "model": (["--model", "resnet21"], "'resnet21'. Did you mean"),
    "model option": (["--model-option", "widht=4"], "no option 'widht'. Did you mean \"width\"?"),
    "data": (["--data", "gone.npz"], "data: there is no file 'gone.npz'"),
    "option": (["--option", "depht=2"], "depht: not an option of method 'auglocal'. Did you mean \"depth\"?"),
    "option's form": (["--option", "depth"], "--option: got 'depth'; write NAME=VALUE"),
    "mode": (["--mode", "papers"], "'papers'"),
    "blocks": (["--blocks", "11"], "blocks: 11 asked for"),
    "block names": (["--blocks", "layer1.0,layer9"], "layer9"),
    "budget": (["--blocks", "auto"], "memory_budget"),
    "epochs": (["--epochs", "0"], "--epochs: got 0"),
    "batch size": (["--batch-size", "0"], "batch_size: got 0"),
    "learning rate": (["--lr", "nan"], "--lr: got nan"),
    "warmup": (["--warmup", "2"], "--warmup: got 2.0"),
    "precision": (["--precision", "8"], "precision: got '8'; valid are '32-true'"),
    "device": (["--device", "toaster"], "--device: 'toaster' cannot be used"),
    "size": (["--model", "vgg19", "--model-option", "hidden=8"], "--model: vgg19 cannot take 1x8x8 images ("),
    "tokens": (["--model", "gpt"], "--model: gpt does not classify images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(data, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    assert main(["train", "--data", data, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastlocal: ") and message in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "runs").exists(), "a refused command leaves nothing behind"


def test_a_finished_run_is_not_written_over(data, tmp_path, capsys):
    arguments = ["train", *TINY, "--data", data, "--method", "bp", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    assert main([*arguments[:-1], str(tmp_path / "file" / "run")]) == 2
    assert "--out: cannot make the folder" in capsys.readouterr().err


def test_a_diverging_run_ends_in_one_line(data, tmp_path, capsys):
    arguments = [
        "train",
        *TINY,
        "--data",
        data,
        "--method",
        "dgl",
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 2
    assert "not finite at step" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_without_matplotlib_the_rest_is_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "run"
    assert main(["train", *TINY, "--data", data, "--method", "bp", "--epochs", "1", "--out", str(out)]) == 0
    assert "no curves.png: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.safetensors", "config.json", "log.csv"]


def test_lists(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "auglocal" in out and "depth=2" in out
    assert main(["models"]) == 0
    assert "resnet1202" in (out := capsys.readouterr().out) and "1,730,714" in out
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"]["version"] == str(torch.__version__)


def test_bench(capsys):
    assert main(["bench"]) == 0
    assert "ledger" in capsys.readouterr().out
    assert main(["bench", "demoo"]) == 2
    assert 'Did you mean "demo"?' in capsys.readouterr().err
    assert main(["bench", "demo", "--epochs", "0"]) == 2
    assert "--epochs: got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:  # what stands behind the name belongs to the bench
        main(["bench", "demo", "--help"])
    assert exit_.value.code == 0 and "fastlocal bench demo" in capsys.readouterr().out


def test_ctrl_c(data, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlocal.data.load", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "fastlocal: interrupted\n"


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "fastlocal.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("fastlocal ")
