"""Small models, their training and their states, for the tests of what is saved of them."""

import random

import numpy as np
import pytest
import torch

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import CheckpointError
from fastlocal.trainer import CheckpointStore

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


def vit(method="dgl", blocks=3, seed=0, dim=8, depth=4, **options):
    torch.manual_seed(seed)
    net = models.create("vit_t", img_size=8, patch_size=4, dim=dim, depth=depth, heads=2, num_classes=4, dropout=0.2)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def resnet(method="dgl", blocks=3, seed=0, **options):
    torch.manual_seed(seed)
    net = models.create("resnet20", width=4, num_classes=4)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def adamw(named):
    return torch.optim.AdamW(named, lr=1e-2)


def sgd(named):
    return torch.optim.SGD(named, lr=1e-2, momentum=0.9)


def train(engine, count, accumulate=1):
    """Losses of ``count`` batches drawn from the global generators, which a resumed run must find as they were."""
    losses = []
    for _ in range(count):
        x = torch.randn(4, 3, 8, 8) * random.uniform(0.9, 1.1) + float(np.random.normal())
        go = engine.step if engine.pending == accumulate - 1 else engine.accumulate
        losses.append(go(x, torch.randint(4, (4,))).losses)
    return losses


def tensors(value, name=""):
    """Every tensor of a nested state, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value.clone()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {n: t for k, v in pairs for n, t in tensors(v, f"{name}/{k}").items()}


def everything(model, engine):
    return tensors({"model": model.state_dict(), "engine": engine.state_dict()})


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


def refused(folder, model, engine=None, match=".", **kwargs):
    before = everything(model, engine) if engine else tensors(model.state_dict())
    torch_state, steps = torch.get_rng_state(), engine and engine.steps
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointStore(folder).load(model, engine, **kwargs)
    assert_same(before, everything(model, engine) if engine else tensors(model.state_dict()))
    assert torch.equal(torch_state, torch.get_rng_state()) and steps == (engine and engine.steps)
    return str(caught.value)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
