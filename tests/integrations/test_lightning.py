"""Level A under Lightning's Trainer with automatic optimisation: the parameters of the sum of detached losses, bit for bit."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl
from fastlocal import models
from tests.engine.baseline import assert_equal, losses_by_units, relative_error

L = pytest.importorskip("lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(L.LightningModule):
    """What a user has; the one line that fastlocal changes is the loss."""

    def __init__(self, model: fl.LocalModel, optimizer: str = "sgd"):
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.validated: list[Any] = []
        self.norms: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(*batch).loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.model(batch[0]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:  # before clipping
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "local":
            optimizer: Any = fl.LocalOptimizer(self.model, lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9))
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class ReturnsTheOutput(Classifier):
    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(*batch)  # a mapping with "loss"


class SumOfDetachedLosses(Classifier):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return torch.stack(losses_by_units(self.model, *batch)).sum()


def resnet20() -> fl.LocalModel:
    net = models.create("resnet20", width=4)
    return fl.localize(net, "auglocal", blocks=6, depth=2, sample=torch.randn(2, 3, 8, 8))


def vit() -> fl.LocalModel:
    net = models.create("vit_tiny", num_classes=10, img_size=8, patch_size=4, dim=16, depth=4, heads=2, dropout=0.1)
    return fl.localize(net, "predsim", blocks=3, sample=torch.randn(2, 3, 8, 8))


def fit(module: Any, tmp_path: Any, precision: str) -> None:
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(10, (64,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and devices
        trainer = L.Trainer(
            max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.5, precision=precision, accelerator="cpu", devices=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, num_sanity_val_steps=1,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, 8), DataLoader(data, 32))
    assert trainer.global_step == 8  # 2 epochs of 8 batches, 2 to a step


@pytest.mark.parametrize("make", [resnet20, vit])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_automatic_optimisation_bitwise(make: Any, precision: str, tmp_path: Any) -> None:
    model = make()
    ours, plain = Classifier(copy.deepcopy(model)), SumOfDetachedLosses(copy.deepcopy(model))
    fit(ours, tmp_path, precision)
    fit(plain, tmp_path, precision)
    assert_equal(ours.model.state_dict(), plain.model.state_dict())
    assert ours.norms == plain.norms and min(ours.norms) > 0.5, "every step was clipped"
    assert relative_error(dict(ours.model.named_parameters()), dict(model.named_parameters())) > 1e-2
    assert len(ours.validated) == 5 and all(isinstance(out, Tensor) for out in ours.validated)


def test_local_optimizer_and_returned_output(tmp_path: Any) -> None:
    """`LocalOptimizer` in place of the plain one, and the whole output in place of its loss.

    Lightning clips in the order of the optimizer's groups, here by block, so its norm differs in the last bit.
    """
    model = vit()
    ours, plain = ReturnsTheOutput(copy.deepcopy(model), "local"), SumOfDetachedLosses(copy.deepcopy(model))
    fit(ours, tmp_path, "bf16-mixed")
    fit(plain, tmp_path, "bf16-mixed")
    assert relative_error(ours.model.state_dict(), plain.model.state_dict()) < 1e-6


def test_fabric(tmp_path: Any) -> None:
    model = vit()
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    plain = torch.optim.AdamW(other.parameters(), lr=1e-3)
    torch.manual_seed(2)
    for _ in range(3):
        x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
        rng = torch.get_rng_state()
        optimizer.zero_grad()
        fabric.backward(wrapped(x, y).loss)
        optimizer.step()
        torch.set_rng_state(rng)
        plain.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(losses_by_units(other, x, y)).sum()
        loss.backward()
        plain.step()
    assert_equal(model.state_dict(), other.state_dict())
    assert torch.isfinite(F.softmax(model.eval()(x), -1)).all()
