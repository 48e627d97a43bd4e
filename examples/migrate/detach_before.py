"""A hand-made local-learning loop: four blocks, detach() between them, a head and an optimizer for each."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WIDTHS = (32, 32, 64, 64)


def conv(inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def loaders() -> tuple[DataLoader, DataLoader]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    train, test = TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])
    return DataLoader(train, 32, shuffle=True), DataLoader(test, 256)


def main(epochs: int = 3, steps: int | None = None) -> list[list[float]]:
    torch.manual_seed(0)
    train, test = loaders()
    blocks = nn.ModuleList(conv(a, b) for a, b in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True))
    classifier = head(WIDTHS[-1])
    heads = nn.ModuleList([*(head(width) for width in WIDTHS[:-1]), classifier])
    optimizers = [
        torch.optim.SGD([*block.parameters(), *aux.parameters()], lr=0.05, momentum=0.9)
        for block, aux in zip(blocks, heads, strict=True)
    ]
    history = []
    for epoch in range(epochs):
        for index, (x, y) in enumerate(train):
            if index == steps:
                break
            losses = []
            h = x
            for block, aux, optimizer in zip(blocks, heads, optimizers, strict=True):
                h = block(h)
                loss = F.cross_entropy(aux(h), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                h = h.detach()
                losses.append(loss.item())
            history.append(losses)
        net = nn.Sequential(*blocks, classifier).eval()
        with torch.no_grad():
            hits = torch.cat([net(x).argmax(1) == y for x, y in test])
        net.train()
        print(f"epoch {epoch}: losses {[round(v, 3) for v in history[-1]]}, test {hits.float().mean():.3f}")
    return history


if __name__ == "__main__":
    main()
