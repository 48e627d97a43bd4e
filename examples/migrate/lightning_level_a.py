"""lightning_before.py with local learning: two lines change, Lightning stays."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 32, depth: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.layers = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(self.stem(x)).mean((2, 3)))


class Classifier(L.LightningModule):
    def __init__(self, epochs: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = fl.localize(Net(), "dgl", blocks=4, sample=torch.zeros(2, 1, 8, 8))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss = self.net(x, y).loss
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        logits = self.net(x)
        self.log_dict({"val_loss": F.cross_entropy(logits, y), "val_accuracy": (logits.argmax(1) == y).float().mean()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams.epochs)]


def loaders() -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    train, test = TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])
    return DataLoader(train, 32, shuffle=True), DataLoader(test, 256)


def main(epochs: int = 3, folder: str = "runs/lightning", steps: int | None = None) -> float:
    L.seed_everything(0, verbose=False)
    best = ModelCheckpoint(monitor="val_accuracy", mode="max")
    stop = EarlyStopping("val_accuracy", mode="max", patience=5)
    trainer = L.Trainer(
        max_epochs=epochs, limit_train_batches=steps, precision="bf16-mixed", accumulate_grad_batches=2,
        gradient_clip_val=1.0, callbacks=[best, stop], logger=CSVLogger(folder), log_every_n_steps=10,
        default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(epochs), *loaders())
    accuracy = float(best.best_model_score)
    print(f"best validation accuracy {accuracy:.3f}, {best.best_model_path}")
    return accuracy


if __name__ == "__main__":
    main()
