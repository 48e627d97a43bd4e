import json
import shlex
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import fastlocal as fl
from fastlocal import models
from fastlocal.bench import accuracy, readme
from fastlocal.bench.accuracy import Case
from fastlocal.data import load
from fastlocal.errors import ArgumentError
from fastlocal.methods import list_methods

SMALL = {"feat_mult": 1 / 16, "num_hidden": 16}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Grey 16x16 pictures of two classes, dark and bright, that anything learns."""
    draw = np.random.default_rng(0)
    arrays = {}
    for key, count in (("train", 120), ("test", 40)):
        y = np.arange(count) % 2
        arrays[f"y_{key}"] = y
        arrays[f"x_{key}"] = (draw.integers(0, 80, (count, 16, 16)) + 160 * y[:, None, None]).astype(np.uint8)
    at = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(at, **arrays)
    return at


def tiny(**changes):
    return replace(Case("tiny", train=80, test=40, epochs=3, batch_size=8, precision="32-true", lr=0.05), **changes)


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (tiny(), 1),
        (tiny(method="dgl", blocks=3), 3),
        (tiny(model="vgg8b", model_option=SMALL, method="predsim", optimizer="adam", lr=0.01), 8),
        (tiny(model="vgg8b", model_option=SMALL, method="auglocal", option={"depth": 2}, convolutions=True), 4),
        (
            tiny(
                model="vgg8b",
                model_option=SMALL,
                method="infopro",
                option=accuracy.OPTIONS["infopro"],
                convolutions=True,
            ),
            6,
        ),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_a_run_learns_and_records_every_head(path, case, blocks):
    record = accuracy.run(load(path), case)
    assert record["blocks"] == blocks == len(record["accuracies"]) == len(record["losses"])
    assert record["accuracy"] == record["accuracies"][-1] == record["curve"][-1]["accuracy"] > 0.9
    assert len(record["curve"]) == 3 and record["samples"] == {"train": 80, "test": 40, "shape": [1, 16, 16]}
    assert record["curve"][-1]["loss"] == record["losses"][-1] < record["curve"][0]["loss"]
    assert record["case"] == asdict(case) and json.loads(json.dumps(record)) == record


def test_a_run_repeats(path):
    images = load(path)
    case = tiny(method="dgl", blocks=2, crop=2, flip=True)
    first, again = accuracy.run(images, case), accuracy.run(images, case)
    other = accuracy.run(images, replace(case, seed=1))
    assert first["curve"] == again["curve"] and first["losses"] == again["losses"]
    assert first["losses"] != other["losses"]


def test_the_part_is_balanced_and_held_out_images_are_not_trained_on(path):
    images = load(path)
    chosen = accuracy.part(images, tiny())
    assert torch.bincount(chosen.y_train).tolist() == [40, 40] and torch.bincount(chosen.y_test).tolist() == [20, 20]
    assert torch.equal(chosen.x_train, images.x_train[:80]) and torch.equal(chosen.mean, images.mean)
    held = accuracy.part(images, tiny(held_out=True))
    assert torch.equal(held.x_test, images.x_train[80:]) and torch.equal(held.y_test, images.y_train[80:])
    with pytest.raises(ArgumentError, match=r"--train: class 0 has 60 images, not 61; give at most 120"):
        accuracy.part(images, tiny(train=122))
    with pytest.raises(ArgumentError, match=r"--test: class 0 has 60 images, not 70; give at most 40"):
        accuracy.part(images, tiny(train=80, test=60, held_out=True))
    with pytest.raises(ArgumentError, match=r"--train: got 81; give a multiple of the 2 classes"):
        accuracy.part(images, tiny(train=81))


def test_convolutions_is_the_same_network_cut_elsewhere():
    torch.manual_seed(0)
    inner = models.vgg8b(**SMALL).eval()
    net = accuracy.Convolutions(inner)
    x = torch.randn(2, 3, 32, 32)
    h = x
    for name, unit in net.units():
        assert net.get_submodule(name) is unit
        h = unit(h)
    assert len(net.units()) == len(net.widths) == 6
    assert torch.equal(net.readout(h), inner(x)) and torch.equal(net(x), inner(x))
    with pytest.raises(ArgumentError, match="--convolutions: is for vgg8b and vgg11b, not resnet20"):
        accuracy.network(Case("tiny", convolutions=True), load("digits"))


@pytest.mark.parametrize("name", ["methods", "blocks", "all"])
def test_the_printed_command_is_the_case(name):
    for data in accuracy.SETS:
        for case in accuracy.suite(name, data):
            words = shlex.split(case.command("x.npz"))[3:]
            assert accuracy._case(accuracy._parser().parse_args(words), data) == case


def test_methods_of_one_suite_share_all_but_rate_and_options():
    for data in accuracy.SETS:
        for model in accuracy.NETS:
            cases = [case for case in accuracy.suite("methods", data) if case.model == model]
            assert [case.method for case in cases] == ["bp", "predsim", "auglocal", "infopro"]
            same = {"method": "", "option": {}, "convolutions": False, "optimizer": "", "lr": 0.0}
            assert len({json.dumps(asdict(replace(case, **same))) for case in cases}) == 1


def test_the_suite_of_all_methods_has_every_registered_one(path, monkeypatch):
    """Localized, not trained: `test_runs_of_the_suite_of_all_methods` trains a few."""
    registered = {known["name"] for known in list_methods()}
    for data in accuracy.SETS:
        cases = accuracy.everything(data)
        assert {case.method for case in cases.values()} == registered - set(accuracy.WITHOUT_ACCURACY)
        assert set(accuracy.WITHOUT_ACCURACY) <= registered
        assert [cases[name].method for name in ("BP", "greedy", "BP, ViT")] == ["bp", "infopro", "bp"]
        same = {"method": "", "blocks": None, "option": {}, "optimizer": "", "lr": 0.0}
        for model in accuracy.NARROW:
            of_net = [replace(case, **same) for case in cases.values() if case.model == model]
            assert len(of_net) > 1 and len({json.dumps(asdict(case)) for case in of_net}) == 1

    monkeypatch.setattr(fl.methods.base, "_REGISTRY", dict(fl.methods.base._REGISTRY))

    @fl.methods.register
    class Later(fl.methods.get_method("dgl")):
        name = "later"

    assert accuracy.everything("cifar10")["later"] == replace(accuracy.everything("cifar10")["DGL"], method="later")


def test_plain_greedy_is_a_linear_classifier_behind_each_block(path):
    case = replace(accuracy.everything("tiny")["greedy"], train=20, test=10, epochs=1, batch_size=10)
    model, history, seconds = accuracy._train(
        accuracy.part(load(path), case), case, {**case.option, "mean": [0.5], "std": [0.5]}, False
    )
    assert len(model.heads) == 15 and seconds > 0 and len(history) == 1
    assert all(head.decoder is None and len(head.classifier) == 2 for head in model.heads)
    assert [type(m).__name__ for m in model.heads[3].classifier] == ["AvgPool", "Linear"]


@pytest.mark.parametrize("name", ["LAKD", "HPFF", "LoPT", "feature reconstruction"])
def test_runs_of_the_suite_of_all_methods(path, name, monkeypatch):
    """A teacher that is trained first; a map of odd size; heads without scores; heads that read their block's input."""
    monkeypatch.setattr(accuracy, "NARROW", {"resnet32": {"width": 2}, "vit_tiny": accuracy.NARROW["vit_tiny"]})
    trained = []
    train = accuracy._train
    monkeypatch.setattr(
        accuracy, "_train", lambda images, case, *rest: (trained.append(case.method), train(images, case, *rest))[1]
    )
    case = replace(accuracy.everything("tiny")[name], train=20, test=10, epochs=1, batch_size=10, precision="32-true")
    record = accuracy.run(load(path), case)
    assert trained == (["bp", "lakd"] if name == "LAKD" else [case.method])
    assert record["case"] == asdict(case) and json.loads(json.dumps(record)) == record
    assert len(record["accuracies"]) == record["blocks"] == {"HPFF": 15, "LAKD": 16}.get(name, 4)
    assert all(loss == loss for loss in record["losses"])
    without = {"LoPT": 3, "HPFF": 1}.get(name, 0)
    assert record["accuracies"].count(None) == without and record["accuracy"] == record["accuracies"][-1]


def test_the_table_of_all_methods():
    def made_of(name, value, seed=0, data="cifar10"):
        case = replace(accuracy.everything(data)[name], seed=seed)
        return {"case": asdict(case), "blocks": 3, "accuracy": value}

    records = [
        made_of("BP", 0.7),
        made_of("BP", 0.8, seed=1),
        made_of("greedy", 0.5),
        made_of("greedy", 0.4, seed=1),
        made_of("MAN", 0.6, seed=1),
        made_of("MAN", 0.65),
        made_of("BP, ViT", 0.5),
        made_of("LoPT", 0.45),
        made_of("HPFF", 0.5, data="fashion_mnist"),
        {
            **made_of("MAN", 0.99),
            "case": asdict(replace(accuracy.everything("cifar10")["MAN"], epochs=9)),
        },  # another run
    ]
    assert accuracy.everything_rows(records)[1:] == [
        ["CIFAR-10", "ResNet-32", "BP", "3", "75.0", "70.0, 80.0", "-", "+30.0"],
        ["CIFAR-10", "ResNet-32", "greedy", "3", "45.0", "50.0, 40.0", "-30.0", "-"],
        ["CIFAR-10", "ResNet-32", "MAN", "3", "62.5", "65.0, 60.0", "-12.5", "+17.5"],
        ["CIFAR-10", "ViT", "BP", "3", "50.0", "50.0", "-", "-"],
        ["CIFAR-10", "ViT", "LoPT", "3", "45.0", "45.0", "-5.0", "-"],
        ["Fashion-MNIST", "ResNet-32", "HPFF", "3", "50.0", "50.0", "-", "-"],
    ]


def test_several_seeds_of_a_suite(path, monkeypatch, capsys):
    short = [tiny(epochs=1), tiny(epochs=1, method="dgl", blocks=2)]
    monkeypatch.setattr(accuracy, "suite", lambda name, data: short)
    assert accuracy.main(["--data", str(path), "--suite", "all", "--seeds", "4", "7", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--seed ")[1] for line in lines] == ["4", "4", "7", "7"]
    assert ["--method dgl" in line for line in lines] == [False, True] * 2


def test_main_appends_and_leaves_out_what_is_there(path, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "accuracy.jsonl"
    words = ["--data", str(path), "--quiet", "--json", str(out)]
    single = [
        "--model",
        "resnet20",
        "--method",
        "bp",
        "--epochs",
        "1",
        "--train",
        "20",
        "--test",
        "10",
        "--batch-size",
        "10",
    ]
    assert accuracy.main([*words, *single, "--seed", "3"]) == 0
    assert "--seed 3" in capsys.readouterr().out
    short = [tiny(epochs=1, train=20, test=10), tiny(epochs=1, train=20, test=10, method="dgl", blocks=2)]
    monkeypatch.setattr(accuracy, "suite", lambda name, data: short)
    assert accuracy.main([*words, "--suite", "methods"]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert accuracy.main([*words, "--suite", "methods"]) == 0  # nothing is left to do
    assert len(out.read_text().splitlines()) == 3
    assert accuracy.main([*words, *single, "--seed", "3"]) == 0  # a single run is always done; the newest stands
    assert len(out.read_text().splitlines()) == 4 and len(accuracy.read(out)) == 3
    capsys.readouterr()
    assert accuracy.main(["--data", str(path), "--suite", "methods", "--list"]) == 0
    assert capsys.readouterr().out.count("python -m fastlocal.bench.accuracy") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data: give a .npz file"),
        (["--data", "nowhere.npz"], "there is no file 'nowhere.npz'"),
        (["--data", "digits", "--lr", "nan"], "--lr: got nan"),
        (["--data", "digits", "--epochs", "0"], "--epochs: got 0"),
        (["--data", "digits", "--optimizer", "lion"], "valid are 'sgd', 'adam'"),
        (["--data", "digits", "--option", "depth"], "write NAME=VALUE"),
        (["--data", "digits", "--seeds", "1", "2"], "--seeds: is for --suite"),
        (["--draw", "x"], "--draw: needs the records"),
        (["--draw", "x", "--json", "nowhere.jsonl"], "holds no run of BP"),
    ],
)
def test_bad_arguments_are_one_line(words, message, capsys):
    assert accuracy.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def made(data, model, method, value, *, blocks=None, count=3, **changes):
    optimizer, lr = accuracy.RATES[model, method]
    case = Case(data, model=model, method=method, blocks=blocks, **({"optimizer": optimizer, "lr": lr} | changes))
    heads = [value - 0.1] * (count - 1) + [value]
    return {
        "case": asdict(case),
        "blocks": count,
        "samples": {"train": 6_000, "test": 3_000},
        "accuracy": value,
        "accuracies": heads,
        "curve": [{"accuracy": value - 0.2}, {"accuracy": value}],
        "machine": {"cpu": "A CPU", "torch": "2.13.0", "commit": "abc"},
    }


@pytest.fixture
def records():
    return [
        made("cifar10", "resnet20", "bp", 0.7, count=1),
        made("cifar10", "resnet20", "bp", 0.72, count=1, seed=1),
        made("cifar10", "resnet20", "bp", 0.99, count=1, epochs=100),  # of another size
        made("cifar10", "resnet20", "auglocal", 0.65),
        made("cifar10", "resnet20", "auglocal", 0.69, seed=1),
        made("cifar10", "resnet20", "auglocal", 0.99, lr=5.0),  # at another rate
        made("cifar10", "resnet20", "auglocal", 0.99, seed=2),  # which the others have not
        made("cifar10", "resnet20", "predsim", 0.5),
        made("cifar10", "resnet20", "predsim", 0.52, seed=1),
        made("cifar10", "resnet20", "dgl", 0.68, blocks=2, count=2),
        made("cifar10", "resnet20", "dgl", 0.6, blocks=4, count=4),
        made("cifar10", "resnet20", "bp", 0.2, count=1, held_out=True, lr=0.03),
        made("fashion_mnist", "vgg8b", "bp", 0.9, count=1),
        made("fashion_mnist", "vgg8b", "predsim", 0.905),
        made("fashion_mnist", "resnet20", "predsim", 0.9),  # nothing to compare with
    ]


def test_tables(records):
    assert accuracy.summary_rows(records) == [
        ["", "BP", "PredSim", "AugLocal", "InfoPro"],
        ["CIFAR-10, ResNet-20", "71.0", "51.0 (-20.0; -19.66)", "67.0 (-4.0; -0.65)", "-"],
        ["Fashion-MNIST, VGG8b", "90.0", "90.5 (+0.5; -0.12)", "-", "-"],
    ]
    full = {(row[0], row[1], row[2]): row[3:] for row in accuracy.full_rows(records)}
    assert full["CIFAR-10", "ResNet-20", "AugLocal"][:4] == ["3", "67.0", "65.0, 69.0", "-4.0"]
    assert full["Fashion-MNIST", "VGG8b", "PredSim"][:4] == ["3", "90.5", "90.5", "+0.5"]
    assert (
        full["CIFAR-10", "ResNet-20", "AugLocal"][4] == "-0.65"
        and full["Fashion-MNIST", "VGG8b", "PredSim"][4] == "-0.12"
    )
    assert full["CIFAR-10", "ResNet-20", "BP"][1:] == ["71.0", "70.0, 72.0", "-", "-", "", ""]
    assert ["CIFAR-10, ResNet-20", "AugLocal", "57.0, 57.0, 67.0"] in accuracy.head_rows(records)
    blocks = {row[0]: row[1:] for row in accuracy.block_rows(records)}
    assert blocks["1 (BP)"] == ["70.0", "-", "92.63", "-"]
    assert blocks["4"] == ["60.0", "-10.0", "88.52", "-4.11"] and blocks["16"][:2] == ["-", "-"]
    assert accuracy.rate_rows(records)[1:] == [["ResNet-20", "BP", "SGD 0.03: 20.0"]]
    assert "6,000 training and 3,000 test images" in accuracy.conditions(records)


def test_pictures(records, tmp_path):
    pytest.importorskip("matplotlib")
    paths = accuracy.draw(records, tmp_path)
    assert [path.name for path in paths] == ["accuracy_curves.png", "accuracy_heads.png", "accuracy_blocks.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000 for path in paths)


def test_parts_of_the_pages(records, tmp_path):
    names = [name for name in readme.PARTS if name.startswith("accuracy")]
    page = "\n".join(f"<!-- begin: {name} -->\nold\n<!-- end: {name} -->" for name in names)
    empty = readme.fill(page, tmp_path)
    assert "old" not in empty and empty.count("No run is recorded here yet") == 7
    for record in records:
        accuracy.append(tmp_path / accuracy.RESULTS, record)
    text = readme.fill(page, tmp_path)
    assert "| CIFAR-10, ResNet-20 | 71.0 | 51.0 (-20.0; -19.66) | 67.0 (-4.0; -0.65) | - |" in text
    assert "--data fashion_mnist.npz --model vgg8b --method predsim" in text and "--held-out" not in text
    assert readme.fill(text, tmp_path) == text
