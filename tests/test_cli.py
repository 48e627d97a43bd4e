import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastlocal import models
from fastlocal.cli import main
from fastlocal.engine.engine import Engine
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
    arguments += ["--log-every", "2"]
    assert main(["train", *arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "48 training and 12 test images of 1x8x8, 3 classes" in printed and f"written to {out}: config.json" in printed
    )

    config = json.loads((out / "config.json").read_text())
    assert config["model"]["options"]["depth"] == 1 and len(config["model"]["blocks"]) == 4  # the last two are one
    assert config["optimizer"]["lr"] == 0.1 and config["channels_last"] is True and config["epochs"] == 2
    command = json.loads((out / "command.json").read_text())
    assert command["option"] == {"depth": 1} and command["blocks"] == 5 and command["lr"] is None
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["3", "6"] and "loss_3" in rows[0] and "loss_4" not in rows[0]
    assert f"test accuracy {float(rows[1]['val_accuracy']):.2%} after 2 epochs" in printed
    assert (
        (out / "steps.csv").exists()
        and (out / "timing.csv").exists()
        and len(list(out.glob("checkpoints/step-*"))) == 2
    )

    found = read(out / "checkpoint.safetensors")
    net = models.create("resnet20", width=4, in_channels=1, num_classes=3)
    net.load_state_dict(found.backbone())
    assert found.extra == {"command": command, "epoch": 2, "step": 6}


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
        assert len(config["model"]["blocks"]) == blocks and config["channels_last"] is False
    assert main(["train", *TINY, "--data", data, "--method", "bp", "--epochs", "1", "--optimizer", "adamw"]) == 0
    assert json.loads((tmp_path / "runs/resnet20-tiny-bp-2/config.json").read_text())["optimizer"]["lr"] == 1e-3


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
    options = json.loads((tmp_path / "run/config.json").read_text())["model"]["options"]
    assert len(options["mean"]) == len(options["std"]) == 1 and options["lam"] == [5, 0.5]


@pytest.mark.parametrize("model", ["mlp", "vit_tiny"])
def test_models_get_the_size_of_the_images(data, tmp_path, model):
    sizes = {"mlp": ["hidden=(8,8)"], "vit_tiny": ["patch_size=4", "dim=12", "depth=2"]}[model]
    options = [part for size in sizes for part in ("--model-option", size)]
    arguments = ["--model", model, *options, "--data", data, "--method", "dgl", "--epochs", "1", "--quiet"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run"), "--threads", "1"]) == 0


BAD = {
    "method": (["--method", "augloca"], "no method 'augloca'. Did you mean \"auglocal\""),
    "model": (["--model", "resnet21"], "'resnet21'. Did you mean"),
    "model option": (["--model-option", "widht=4"], "no option 'widht'. Did you mean \"width\"?"),
    "data": (["--data", "gone.npz"], "data: there is no file 'gone.npz'"),
    "option": (["--option", "depht=2"], "depht: not an option of method 'auglocal'. Did you mean \"depth\"?"),
    "option's form": (["--option", "depth"], "--option: got 'depth'; write NAME=VALUE"),
    "mode": (["--mode", "papers"], "'papers'"),
    "blocks": (["--blocks", "11"], "blocks: 11 asked for"),
    "block names": (["--blocks", "layer1.0,layer9"], "layer9"),
    "budget": (["--blocks", "auto"], "memory_budget"),
    "epochs": (["--epochs", "0"], "epochs: got 0; give an integer from 1"),
    "batch size": (["--batch-size", "0"], "batch_size: got 0"),
    "learning rate": (["--lr", "nan"], "lr: got nan"),
    "warmup": (["--warmup-epochs", "-2"], "warmup_epochs: got -2.0"),
    "scheduler": (["--scheduler", "step"], "'step' needs decay_epochs"),
    "scheduler's option": (["--scheduler-option", "power=2"], "'cosine' has no option 'power'"),
    "clip": (["--clip", "0"], "value: got 0.0"),
    "samples": (["--train-samples", "1.5"], "train_samples: got 1.5"),
    "std": (["--std", "0"], "std: got (0.0,)"),
    "mean": (["--mean", "0.1,0.2"], "mean: got (0.1, 0.2); give 1 or 1 numbers"),
    "freeze": (["--freeze", "layer9"], "nothing in the model is called 'layer9'"),
    "pretrained": (["--pretrained", "gone.pt"], "there is no file 'gone.pt'"),
    "recipe": (["--recipe", "auglocal-cifar10-r23"], "there is no 'auglocal-cifar10-r23'. Did you mean"),
    "config": (["--config", "gone.json"], "config: cannot read gone.json"),
    "resume": (["--resume", "gone"], "--resume: gone holds no command.json"),
    "root": (["--root", "."], "with root= a set is loaded by name"),
    "cutmix": (["--cutmix", "-1"], "cutmix: got -1.0"),
    "ema": (["--ema", "2"], "decay"),
    "precision": (["--precision", "8"], "precision: got '8'; valid are '32-true'"),
    "device": (["--device", "toaster"], "device: 'toaster' cannot be used"),
    "size": (["--model", "vgg19", "--model-option", "hidden=8"], "model: vgg19 cannot take 1x8x8 images ("),
    "tokens": (["--model", "gpt"], "model: gpt does not classify images"),
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
        "--warmup-epochs",
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
    assert not (out / "curves.png").exists() and (out / "checkpoint.safetensors").exists()


def same(a, b, *names):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_a_command_repeats_itself(data, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    flags = ["--crop", "1", "--flip", "--cutout", "2", "--mixup", "0.2", "--cutmix", "1", "--smoothing", "0.1"]
    flags += ["--optimizer", "adamw", "--no-decay", "--layer-decay", "0.8", "--scheduler", "onecycle"]
    flags += ["--scheduler-option", "pct_start=0.4", "--clip", "0.02", "--clip-mode", "agc", "--ema", "0.9"]
    flags += [
        "--accumulate",
        "2",
        "--validate-every",
        "2",
        "--recalibrate",
        "1",
        "--train-samples",
        "0.5",
        "--freeze",
        "0",
    ]
    flags += ["--save-every", "1", "--log-every", "1", "--early-stopping", "5", "--mean", "0.4", "--std", "0.3"]
    arguments = [
        *TINY,
        "--data",
        data,
        "--method",
        "dgl",
        "--blocks",
        "3",
        "--epochs",
        "2",
        "--batch-size",
        "8",
        *flags,
    ]
    assert main(["train", *arguments, "--out", str(a)]) == 0
    assert main(["train", "--config", str(a / "command.json"), "--out", str(b), "--quiet"]) == 0
    assert same(a, b, "metrics.csv", "steps.csv", "command.json", "checkpoint.safetensors", "ema.safetensors")
    rows = list(csv.DictReader((a / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 3 and rows[0]["val_accuracy"] == "" and rows[2]["loss"] == "" and rows[2]["ema_accuracy"]
    assert main(["train", "--config", str(a / "command.json"), "--seed", "1", "--out", str(c), "--quiet"]) == 0
    assert not same(a, c, "metrics.csv") and json.loads((c / "command.json").read_text())["seed"] == 1
    assert read(a / "checkpoint.safetensors").extra["command"]["train_samples"] == 0.5
    config = json.loads((a / "config.json").read_text())
    assert config["train"]["samples"] == 24 and config["trainable"] < config["parameters"]


class Killed(Exception):
    pass


def test_resume_goes_on_to_the_same_bytes(data, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--epochs", "2", "--batch-size", "8", "--save-every", "2", "--log-every", "1", "--flip", "--ema", "0.9"]
    arguments = ["train", *TINY, "--data", data, "--method", "dgl", "--blocks", "2", *flags, "--out"]
    assert main([*arguments, str(whole)]) == 0
    real = Engine.step

    def step(engine, *batch):
        if engine.steps == 9:
            raise Killed
        return real(engine, *batch)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(Killed):
        main([*arguments, str(cut)])
    monkeypatch.setattr(Engine, "step", real)
    for wrong, message in {
        ("--lr", "0.3"): "--lr was None and stays so",
        ("--out", "x"): "leave --out out",
        ("--epochs", "3"): "epochs",
    }.items():
        capsys.readouterr()
        before = (cut / "command.json").read_bytes()
        assert main(["train", "--resume", str(cut), *wrong, "--quiet"]) == 2
        assert message in capsys.readouterr().err and (cut / "command.json").read_bytes() == before
    assert main(["train", "--resume", str(cut), "--seed", "0", "--quiet"]) == 0  # what it was
    assert same(whole, cut, "metrics.csv", "steps.csv", "command.json", "checkpoint.safetensors", "ema.safetensors")
    assert main(["train", "--resume", str(cut), "--quiet"]) == 0  # nothing is left to do
    assert same(whole, cut, "metrics.csv", "checkpoint.safetensors")


def test_epochs_can_be_added_where_no_schedule_depends_on_them(data, tmp_path):
    arguments = ["train", *TINY, "--data", data, "--method", "bp", "--scheduler", "none"]
    assert main([*arguments, "--epochs", "2", "--out", str(tmp_path / "two")]) == 0
    assert main([*arguments, "--epochs", "1", "--out", str(tmp_path / "more")]) == 0
    assert main(["train", "--resume", str(tmp_path / "more"), "--epochs", "2", "--quiet"]) == 0
    assert same(tmp_path / "two", tmp_path / "more", "metrics.csv", "command.json", "checkpoint.safetensors")


def test_config_and_flags(data, tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"data": data, "method": "dgl", "blocks": 2, "epochs": 1, "option": {"head": "dgl_mlp"}})
    )
    arguments = ["train", *TINY, "--config", str(file)]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["model"]["options"]["head"] == "dgl_mlp"
    assert main([*arguments, "--method", "auglocal", "--blocks", "3", "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b/command.json").read_text())["option"] == {}  # the other method's are dropped
    for text, message in {
        "{": "is no JSON",
        "[]": "holds list",
        '{"epoch": 1}': 'Did you mean "epochs"?',
        '{"lr": "x"}': "lr: got 'x'",
        (tmp_path / "a/config.json").read_text(): "give the command.json beside it",
    }.items():
        file.write_text(text)
        assert main([*arguments, "--out", str(tmp_path / "c")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_dry_run_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *TINY, "--data", data, "--fast-dev-run"]) == 0
    assert "2 batches: loss " in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


def test_weights_to_begin_with(data, tmp_path):
    arguments = ["train", *TINY, "--data", data, "--method", "bp", "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    start = str(tmp_path / "a/checkpoint.safetensors")
    flags = ["--pretrained", start, "--freeze", "conv1,layer1", "--seed", "1"]
    assert main([*arguments, *flags, "--out", str(tmp_path / "b")]) == 0
    old, new = read(start).backbone(), read(tmp_path / "b/checkpoint.safetensors").backbone()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert "fc.weight" in changed and not any(name.startswith("layer1.") for name in changed)


def test_pictures_in_folders(tmp_path):
    pictures = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "set" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pictures.fromarray(rng.integers(0, 255, (12, 14, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    arguments = ["train", *TINY, "--data", str(tmp_path / "set"), "--size", "8", "--method", "bp", "--epochs", "1"]
    assert main([*arguments, "--test-samples", "2", "--out", str(tmp_path / "a")]) == 0
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["train"]["samples"] == 12 and config["val"]["samples"] == 4
    assert main([*arguments, "--lazy", "--flip", "--out", str(tmp_path / "b")]) == 0
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["train"]["kind"] == "FolderBatches" and config["val"]["samples"] == 6


def test_without_tqdm(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    arguments = [flag for flag in TINY if flag != "--quiet"]
    assert (
        main(["train", *arguments, "--data", data, "--method", "bp", "--epochs", "1", "--out", str(tmp_path / "a")])
        == 0
    )
    assert capsys.readouterr().err == ""


def test_recipes_are_listed_and_shown(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "infopro-cifar10-r32-k4" in out and "paper: 91.42 %" in out and "not reproduced here" in out
    assert main(["recipes", "auglocal-svhn-r32"]) == 0
    out = capsys.readouterr().out
    assert "--border black" in out and "--option depth=2" in out and "--epochs 400" in out
    assert main(["recipes", "auglocal-svhn-r23"]) == 2


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


def test_ctrl_c(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlocal.trainer.settings.load", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "fastlocal: interrupted\n"


def test_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "fastlocal.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("fastlocal ")
