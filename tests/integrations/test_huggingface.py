"""Level A under Hugging Face's Trainer, with its own models unmodified, against the sum of detached losses in that Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl
from fastlocal.errors import IsolationError
from tests.engine.baseline import SumOfLosses, assert_equal, relative_error

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
transformers.logging.set_verbosity_error()

VOCABULARY, LENGTH, CLASSES = 23, 8, 3


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LENGTH, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def gpt2(tie: bool = True) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def dataset(causal: bool, rows: int = 64) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    data = []
    for _ in range(rows):
        ids, mask = torch.randint(VOCABULARY, (LENGTH,)), torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - int(torch.randint(3, ())) :] = 0
        labels = ids.masked_fill(mask == 0, -100) if causal else torch.randint(CLASSES, ())
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return data


def train(model: nn.Module, data: list[dict[str, Tensor]], tmp_path: Any, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        tmp_path, use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.5,
        learning_rate=1e-2, max_steps=5, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=5,
        remove_unused_columns=False, label_names=["labels"], **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    return trainer


def norms(trainer: Any) -> list[float]:
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


class Plain(SumOfLosses):
    accepts_loss_kwargs = False

    @property
    def config(self) -> Any:  # the Trainer turns the key-value cache off there; with it, attention rounds otherwise
        return self.backbone.config


CASES: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "bert-dgl": (bert, "dgl", False),
    "bert-predsim": (bert, "predsim", False),
    "gpt2-dgl": (lambda: gpt2(tie=False), "dgl", True),
    "llama-dgl": (llama, "dgl", True),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_the_sum_of_losses_bitwise(case: str, tmp_path: Any) -> None:
    make, method, causal = CASES[case]
    data = dataset(causal)
    sample = {k: torch.stack([row[k] for row in data[:2]]) for k in data[0]}
    model = fl.localize(make(), method, blocks=3, sample=sample)
    assert "hooks" in model.explain() and len(model.blocks) == 3
    start = copy.deepcopy(model)
    plain = Plain(copy.deepcopy(model))
    ours = train(model, data, tmp_path)
    theirs = train(plain, data, tmp_path)
    assert_equal(model.state_dict(), plain.state_dict())
    assert norms(ours) == norms(theirs) and len(norms(ours)) == 5 and max(norms(ours)) > 0.5
    assert relative_error(dict(model.named_parameters()), dict(start.named_parameters())) > 1e-2
    assert not any(m._forward_hooks for m in model.modules())
    # evaluation is the unmodified network's own: its loss, its logits
    result = ours.predict(data[:8])
    net = model.export()
    assert type(net) is type(make())
    with torch.no_grad():
        batch = {k: torch.stack([row[k] for row in data[:8]]) for k in data[0]}
        out = net.eval()(**batch)
    assert result.metrics["test_loss"] == pytest.approx(float(out.loss), rel=1e-5)
    logits = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
    torch.testing.assert_close(torch.from_numpy(logits), out.logits)


def test_bf16_bitwise(tmp_path: Any) -> None:
    """Accelerate wraps forward in autocast, and rebuilds its output in float32."""
    data = dataset(False)
    sample = {k: torch.stack([row[k] for row in data[:2]]) for k in data[0]}
    model = fl.localize(bert(), "predsim", blocks=3, sample=sample)
    full, plain = copy.deepcopy(model), Plain(copy.deepcopy(model))
    train(model, data, tmp_path, bf16=True)
    train(plain, data, tmp_path, bf16=True)
    assert_equal(model.state_dict(), plain.state_dict())
    train(full, data, tmp_path)
    assert relative_error(dict(full.named_parameters()), dict(model.named_parameters())) > 1e-5, "bf16 did nothing"


def test_tied_embeddings_are_refused_unless_told(tmp_path: Any) -> None:
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    net = gpt2()
    with pytest.raises(
        IsolationError, match=r"tied: .*transformer\.wte\.weight = lm_head\.weight \(blocks 0, 2\).*tied='untie'"
    ):
        fl.localize(net, "dgl", blocks=3, sample={"input_ids": ids})
    assert net.lm_head.weight is net.transformer.wte.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", ["untie", "link"])
def test_tied_gpt2(tied: Any, tmp_path: Any) -> None:
    data = dataset(True)
    sample = {k: torch.stack([row[k] for row in data[:2]]) for k in data[0]}
    net: Any = gpt2()
    keys = list(net.state_dict())
    model = fl.localize(net, "dgl", blocks=3, sample=sample, tied=tied)
    before = net.lm_head.weight.detach().clone()
    plain: Any = Plain(copy.deepcopy(model))

    def copy_weight(*_: Any) -> None:
        plain.backbone.transformer.wte.weight.data.copy_(plain.backbone.lm_head.weight.data)

    if tied == "link":  # the embedding reads the weight that the readout had after the last step
        plain.register_forward_pre_hook(copy_weight)
    train(model, data, tmp_path)
    train(plain, data, tmp_path)
    if tied == "link":
        copy_weight()
    exported: Any = model.export()
    assert_equal(exported.state_dict(), plain.backbone.state_dict())
    assert list(exported.state_dict()) == keys
    wte, head = exported.transformer.wte.weight, exported.lm_head.weight
    assert wte is not head and torch.equal(wte, head) == (tied == "link")
    assert not torch.equal(head, before)
    # what is saved loads again, as the network that was trained
    exported.save_pretrained(tmp_path / "net")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "net").eval()
    ids = data[0]["input_ids"][None]
    torch.testing.assert_close(again(input_ids=ids).logits, exported.eval()(input_ids=ids).logits)


def test_engine_equals_the_trainer_loop() -> None:
    """Level B on the same unmodified network and batches: the parameters of a plain loop over level A."""
    data = dataset(True)
    batches = [{k: torch.stack([row[k] for row in data[i : i + 8]]) for k in data[0]} for i in range(0, 32, 8)]
    a = fl.localize(llama(), "dgl", blocks=3, sample=batches[0])
    b = copy.deepcopy(a)
    make = lambda named: torch.optim.AdamW(named, lr=1e-2)  # noqa: E731
    optimizer, engine = make(a.parameters()), fl.Engine(b, make, backend="reference")
    for batch in batches:
        optimizer.zero_grad()
        out = a(**batch)
        out.loss.backward()
        optimizer.step()
        step = engine.step(batch)
        assert torch.equal(step.losses, out.losses) and torch.equal(step.correct, out.correct)
    assert_equal(b.state_dict(), a.state_dict())


def test_the_causal_loss_is_the_networks_own() -> None:
    net = llama()
    ids = torch.randint(VOCABULARY, (4, LENGTH))
    model = fl.localize(net, "dgl", blocks=2, sample={"input_ids": ids})
    own = net.train()(input_ids=ids, labels=ids).loss
    assert torch.equal(model(input_ids=ids, labels=ids).losses[-1], own.detach())
    probabilities = F.softmax(net(input_ids=ids).logits[:, :-1], -1)
    assert own.item() == pytest.approx(-probabilities.gather(-1, ids[:, 1:, None]).log().mean().item(), rel=1e-5)
