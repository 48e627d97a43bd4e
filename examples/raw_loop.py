"""A plain PyTorch loop on scikit-learn's digits, trained block by block: python examples/raw_loop.py [--level b]

Lines that differ from an end-to-end script are marked. Level A keeps the loop as it is; at level B the engine owns the step, and
each block is updated and freed before the next one's head starts.
"""

import argparse

import torch

import fastlocal as fl  # changed
from fastlocal import data, models


def accuracy(net: torch.nn.Module, test: data.Batches) -> float:
    net.eval()
    with torch.no_grad():
        hits = [(net(x).argmax(1) == y).float() for x, y in test.epoch(0)]
    net.train()
    return torch.cat(hits).mean().item()


def main(epochs: int = 3, level: str = "a", steps: int | None = None) -> float:
    torch.manual_seed(0)
    images = data.load("digits")
    train, test = data.Batches(images, batch_size=64), data.Batches(images, train=False, batch_size=256)
    net = models.create("resnet20", in_channels=images.shape[0])
    x, _ = next(test.epoch(0))
    model = fl.localize(net, "auglocal", blocks=10, depth=2, sample=x[:2])  # changed
    print(model.summary())

    def make(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=5e-4)

    engine = fl.Engine(model, optimizer=make) if level == "b" else None
    optimizer = make(model.parameters()) if engine is None else engine.optimizer  # changed: net -> model
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for step, (x, y) in enumerate(train.epoch(epoch)):
            if step == steps:
                break
            if engine is not None:
                losses = engine.step(x, y).losses
            else:
                out = model(x, y)  # changed: was loss = F.cross_entropy(net(x), y)
                optimizer.zero_grad()
                out.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                losses = out.losses
        schedule.step()
        print(
            f"epoch {epoch}: loss of each block {[round(v, 2) for v in losses.tolist()]}, test {accuracy(net, test):.3f}"
        )
    return accuracy(model.export(), test)  # the plain backbone, trained; the heads are gone


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--level", choices=["a", "b"], default="a")
    args = parser.parse_args()
    print(f"test accuracy {main(args.epochs, args.level):.3f}")
