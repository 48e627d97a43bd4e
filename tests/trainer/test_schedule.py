import math

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.errors import ArgumentError
from fastlocal.trainer import cosine


def test_warm_up_then_cosine_on_every_block():
    model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "dgl", blocks=2, sample=torch.zeros(2, 4))
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.5))
    scheduler = cosine(engine.optimizer, 12, warmup=2)
    seen = []
    for _ in range(12):
        rates = {group["lr"] for inner in engine.optimizer.blocks for group in inner.param_groups}
        assert len(rates) == 1
        seen += rates
        engine.step(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))
        scheduler.step()
    expected = [1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert seen == pytest.approx([0.5 * factor for factor in expected])
    assert scheduler.get_last_lr()[0] == pytest.approx(0)


def test_the_state_of_a_schedule_continues_it():
    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine(optimizer, 10, 2)

    optimizer, scheduler = make()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other, resumed = make()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for o, s in ((optimizer, scheduler), (other, resumed)):
        o.step()
        s.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr() != [1.0]


@pytest.mark.parametrize(("steps", "warmup", "name"), [(0, 0, "steps"), (5, 6, "warmup"), (5, -1, "warmup")])
def test_bad_numbers(steps, warmup, name):
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        cosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), steps, warmup)
