"""lightning_before.py with fastlocal's Trainer in place of Lightning's."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl
from fastlocal.trainer import EarlyStopping


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


def loaders() -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    train, test = TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])
    return DataLoader(train, 32, shuffle=True), DataLoader(test, 256)


def main(epochs: int = 3, folder: str = "runs/fastlocal", steps: int | None = None) -> float:
    torch.manual_seed(0)
    model = fl.localize(Net(), "dgl", blocks=4, sample=torch.zeros(2, 1, 8, 8))
    trainer = fl.Trainer(
        model, lambda named: torch.optim.SGD(named, lr=0.05, momentum=0.9, weight_decay=5e-4),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        precision="bf16-mixed", accumulate=2, clip=1.0, monitor="val_accuracy",
        callbacks=[EarlyStopping("val_accuracy", mode="max", patience=5)], folder=folder, log_every=10, progress=False,
    )  # fmt: skip
    history = trainer.fit(*loaders(), epochs=epochs, limit=steps)
    accuracy = max(row["val_accuracy"] for row in history)
    print(f"best validation accuracy {accuracy:.3f}, {trainer.folder}")
    return accuracy


if __name__ == "__main__":
    main()
