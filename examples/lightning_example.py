"""Lightning's Trainer on scikit-learn's digits: python examples/lightning_example.py

Automatic optimisation, gradient accumulation, clipping and mixed precision work unchanged. Lines that differ from an end-to-end
script are marked.
"""

import argparse
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl  # changed
from fastlocal import data, models


class Classifier(L.LightningModule):
    def __init__(self, net: torch.nn.Module, sample: torch.Tensor):
        super().__init__()
        self.net = fl.localize(net, "dgl", blocks=4, sample=sample)  # changed: was self.net = net

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        x, y = batch
        loss = self.net(x, y).loss  # changed: was F.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        logits = self.net(x)  # in eval mode the plain backbone
        self.log_dict(
            {"val_loss": F.cross_entropy(logits, y), "val_acc": (logits.argmax(1) == y).float().mean()}, prog_bar=True
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)


def main(epochs: int = 5, steps: int | None = None) -> float:
    L.seed_everything(0)
    images = data.load("digits")
    sets = [next(data.Batches(images, train=train, batch_size=10_000).epoch(0)) for train in (True, False)]
    train, test = (
        DataLoader(TensorDataset(x, y), 32, shuffle=i == 0, drop_last=i == 0) for i, (x, y) in enumerate(sets)
    )
    net = models.create("resnet20", in_channels=images.shape[0])
    trainer = L.Trainer(
        max_epochs=epochs, limit_train_batches=steps, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed",
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Classifier(net, sets[0][0][:2]), train, test)
    return float(trainer.callback_metrics["val_acc"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    print(f"test accuracy {main(parser.parse_args().epochs):.3f}")
