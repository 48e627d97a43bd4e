import csv
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.bench.loop import Loop
from fastlocal.data import Batches, Images
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError
from fastlocal.reference import train_step
from fastlocal.trainer import accuracy, cosine


def images(count: int = 40) -> Images:
    """Two classes, dark and bright."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 1, 4, 4), generator=generator)
    x = (noise + 100 * y.view(-1, 1, 1, 1)).to(torch.uint8)
    return Images(x, y, x[:10], y[:10], 2, torch.tensor([0.4]), torch.tensor([0.25]), "two")


def local_model() -> LocalModel:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, 8), nn.ReLU()) for a in (16, 8)]
    net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 2))
    return fl.localize(net, "dgl", blocks=["1"], sample=torch.zeros(2, 1, 4, 4))


def sgd(named):
    return torch.optim.SGD(named, lr=0.2)


def parts(batch_size: int = 8) -> tuple[Batches, Batches]:
    return Batches(images(), batch_size=batch_size), Batches(images(), train=False, batch_size=4)


def test_it_learns_and_writes_its_history(tmp_path):
    engine = fl.Engine(local_model(), sgd)
    loop = Loop(engine, *parts(), scheduler=cosine(engine.optimizer, 30))
    for _ in range(6):
        loop.epoch()
    history = loop.history
    assert history.test_accuracy == 1.0 and history.epochs[0].losses[1] > history.epochs[-1].losses[1]
    assert all(len(epoch.step_seconds) == epoch.steps == 5 for epoch in history.epochs)
    assert history.steps_per_second > 0 and engine.steps == 30

    history.write(tmp_path / "log.csv")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    assert [float(row["loss_1"]) for row in rows] == pytest.approx([e.losses[1] for e in history.epochs], abs=1e-5)
    assert float(rows[0]["lr"]) == pytest.approx(0.2) and float(rows[-1]["lr"]) < 0.02


def test_the_logged_losses_are_the_means_of_the_steps():
    model = local_model()
    engine = fl.Engine(model, sgd)
    seen = []
    loop = Loop(engine, *parts())
    result = loop.epoch(seen.append)
    assert result.losses == pytest.approx(torch.tensor(seen).mean(0).tolist(), abs=1e-6)
    assert len(seen) == 5 and loop.history.epochs == [result]


def test_a_plain_step_takes_the_place_of_an_engine():
    results = []
    for plain in (False, True):
        model = local_model()
        if plain:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
            step = lambda x, y, m=model, o=optimizer: train_step(m, (x, y), o)  # noqa: E731
        else:
            step = fl.Engine(model, sgd, backend="reference")
        loop = Loop(step, *parts(), model=model)
        results.append(([loop.epoch().losses for _ in range(2)], model))
    (a, model_a), (b, model_b) = results
    assert a == b
    assert all(torch.equal(p, q) for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True))


def test_a_plain_step_needs_its_model():
    with pytest.raises(ArgumentError, match=r"^model: .*pass the LocalModel"):
        Loop(lambda x, y: [], *parts())


def test_accuracy_counts_and_puts_the_mode_back():
    model = local_model().train()
    _, test = parts()
    model.eval()
    expected = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.epoch(0)) / 10
    model.train()
    assert accuracy(model, test) == expected and model.training
    assert 0 <= accuracy(model, test, torch.bfloat16) <= 1


def test_training_stops_when_the_engine_asks():
    engine = fl.Engine(local_model(), sgd, nonfinite="stop")
    with torch.no_grad():
        next(engine.model.backbone.parameters()).fill_(float("nan"))
    assert Loop(engine, *parts()).epoch().steps == 1 and engine.should_stop


def test_importing_needs_no_optional_package():
    names = ("tqdm", "sklearn", "matplotlib", "safetensors", "triton", "torchvision")
    code = (
        f"import sys\nfor name in {names}: sys.modules[name] = None\n"
        "import fastlocal.cli, fastlocal.data, fastlocal.trainer, fastlocal.bench.demo, fastlocal.bench.plots"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
