"""Every oracle in float64 through the reference step, level A and level B (the numbers of the official implementations)."""

import pytest
import torch

import fastlocal as fl
from fastlocal.ops._dispatch import as_on_gpu
from fastlocal.reference import train_step
from tests.methods.oracles import CASES, FULL_SIZE, StepRecord, check

SMALL = [name for name in CASES if name not in FULL_SIZE]


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def reference(model, optimizer):
    opt = optimizer(list(model.parameters()))

    def run(x, y):
        model.train()
        seen = {}
        handle = opt.register_step_pre_hook(lambda *_: seen.update(gradients(model)))
        losses = train_step(model, (x, y), opt)
        handle.remove()
        return StepRecord(losses, None, None, seen)

    return run


def level_a(model, optimizer):
    opt = optimizer(list(model.parameters()))

    def run(x, y):
        model.train()
        opt.zero_grad()
        out = model(x, y, return_logits=True)
        out.loss.backward()
        taken = gradients(model)
        opt.step()
        return StepRecord(list(out.losses), None, out.logits, taken)

    return run


def level_b(model, optimizer):
    engine = fl.Engine(model, lambda named: optimizer([p for _, p in named]), backend="auto")

    def run(x, y):
        model.train()
        out = engine.step(x, y)
        return StepRecord(list(out.losses), None, out.logits, None)

    return run


def as_on_a_gpu(make_step):
    """The same with the operators that a GPU's step calls."""

    def make(model, optimizer):
        run = make_step(model, optimizer)

        def run_there(x, y):
            with as_on_gpu():
                return run(x, y)

        return run_there

    make.__name__ = f"{make_step.__name__}_as_on_a_gpu"
    return make


STEPS = [reference, level_a, level_b, as_on_a_gpu(level_b)]


@pytest.mark.parametrize("make_step", STEPS)
@pytest.mark.parametrize("name", SMALL)
def test_official_numbers(name, make_step):
    worst = check(name, fl.localize, make_step)
    assert {"loss", "parameter norm", "parameter sum", "eval logits"} <= set(worst)
    assert ("gradient" in worst) == ("level_b" not in make_step.__name__)  # level B has freed them by then


@pytest.mark.parametrize("make_step", STEPS)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_official_numbers_at_full_size(name, make_step):
    torch.set_num_threads(1)
    check(name, fl.localize, make_step)
