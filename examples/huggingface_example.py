"""Hugging Face's Trainer and its own GPT-2, unmodified, on the bytes of Python's library: python examples/huggingface_example.py

No download: the network comes from a configuration. Gradient accumulation, clipping and the schedule work unchanged. Lines that
differ from an end-to-end script are marked.
"""

import argparse
import inspect
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fastlocal as fl  # changed

LENGTH = 64


def text() -> torch.Tensor:
    """Byte values of some sources, cut into rows of LENGTH."""
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, tempfile)).encode()
    return torch.tensor(list(source[: len(source) // LENGTH * LENGTH])).view(-1, LENGTH)


def main(steps: int = 200) -> float:
    torch.manual_seed(0)
    rows = text()
    data = [{"input_ids": row, "labels": row} for row in rows[torch.randperm(len(rows))]]
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0
    )
    net = GPT2LMHeadModel(config)
    # changed: the input embedding, tied to the readout in another block, becomes a copy that follows it
    model = fl.localize(net, "dgl", blocks=3, sample={"input_ids": rows[:2]}, tied="link")
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_grad_norm=1.0,
            learning_rate=2e-3, lr_scheduler_type="cosine", logging_steps=20, save_strategy="no", report_to=[],
            remove_unused_columns=False, label_names=["labels"],  # changed: the wrapper's forward takes any keyword
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data[:-64], eval_dataset=data[-64:])  # changed: net -> model
        trainer.train()
        return trainer.evaluate()["eval_loss"]  # of the plain network; net.save_pretrained(...) works as ever


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    print(f"evaluation loss {main(parser.parse_args().steps):.3f} nats a byte; uniform guessing has 5.545")
