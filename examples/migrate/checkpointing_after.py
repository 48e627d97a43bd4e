"""The ViT of checkpointing_before.py, trained by local learning in K blocks."""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import fastlocal as fl

DEPTH, WIDTH, HEADS = 12, 64, 4


class Block(nn.Module):
    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.recompute else self.run(x)

    def run(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.classifier = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


def loaders() -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(y)
    train, test = TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(test, 256)


def main(
    epochs: int = 3, steps: int | None = None, blocks: int = 4, recompute: bool = False, backend: str = "auto"
) -> tuple[list[list[float]], float]:
    torch.manual_seed(0)
    train, test = loaders()
    Block.recompute = recompute
    net = ViT()
    method = "dgl" if blocks > 1 else "bp"
    model = fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 1, 8, 8))
    engine = fl.Engine(model, lambda named: torch.optim.AdamW(named, lr=1e-3, weight_decay=0.05), backend=backend)
    history = []
    for epoch in range(epochs):
        for index, (x, y) in enumerate(train):
            if index == steps:
                break
            history.append(engine.step(x, y).losses.tolist())
        net.eval()
        with torch.no_grad():
            accuracy = torch.cat([net(x).argmax(1) == y for x, y in test]).float().mean().item()
        net.train()
        print(f"epoch {epoch}: losses {[round(v, 3) for v in history[-1]]}, test {accuracy:.3f}")
    return history, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing inside the blocks, too")
    args = parser.parse_args()
    main(args.epochs, blocks=args.blocks, recompute=args.recompute)
