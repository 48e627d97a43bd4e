"""fl.Trainer on scikit-learn's digits, with a run that can be killed and resumed: python examples/trainer_example.py [--resume]

Press Ctrl-C at any time, then run it again with --resume: the files in the folder end as if it had never stopped.
"""

import argparse

import torch

import fastlocal as fl
from fastlocal import data, models
from fastlocal.trainer import EarlyStopping, early_exit, optimizers


def main(
    epochs: int = 5, folder: str = "runs/trainer_example", resume: bool = False, limit: int | None = None
) -> float:
    torch.manual_seed(0)
    images = data.load("digits")
    train, test = data.Batches(images, batch_size=64, seed=0), data.Batches(images, train=False, batch_size=256)
    x, _ = next(test.epoch(0))
    model = fl.localize(models.create("resnet20", in_channels=images.shape[0]), "dgl", blocks=4, sample=x[:2])
    trainer = fl.Trainer(
        model, optimizers.sgd(0.05, weight_decay=5e-4), scheduler=("cosine", {"warmup_epochs": 1}), clip=5.0, ema=0.99,
        mixing=data.Mixing(smoothing=0.1), callbacks=[EarlyStopping("val_accuracy", patience=10)], folder=folder,
        save_every=10, monitor="val_accuracy", progress=limit is None,
    )  # fmt: skip
    history = trainer.fit(train, test, epochs=epochs, resume=resume, limit=limit)
    for point in early_exit(model, test, thresholds=(0.7, 0.9)):
        print(f"leaving at confidence {point.threshold}: accuracy {point.accuracy:.3f}, MACs {point.macs:,.0f}")
    print(
        f"blocks {[round(a or 0, 3) for a in trainer.evaluate(test).accuracies]}, EMA {history[-1]['ema_accuracy']:.3f}"
    )
    return history[-1]["val_accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", default="runs/trainer_example")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    print(f"test accuracy {main(args.epochs, args.folder, args.resume):.3f}")
