import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import load, read, save


def local_model(seed: int = 0, method: str = "dgl", blocks: int = 3, **options):
    torch.manual_seed(seed)
    net = models.create("resnet20", width=4, in_channels=1)
    return fl.localize(net, method, blocks=blocks, sample=torch.randn(2, 1, 8, 8), **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_round_trip(tmp_path):
    model = local_model().to(memory_format=torch.channels_last)
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    engine.step(x, y)
    path = tmp_path / "new" / "model.safetensors"
    save(path, model, {"epochs": 3})
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing stays beside it"

    other = local_model(seed=1)
    assert load(path, other) == {"epochs": 3}
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(other).values(), strict=True))
    torch.testing.assert_close(other.eval()(x), model.eval()(x))

    net = models.create("resnet20", width=4, in_channels=1)
    found = read(path)
    net.load_state_dict(found.backbone())
    torch.testing.assert_close(net.eval()(x), model.eval()(x))
    assert found.about["method"] == "dgl" and len(found.about["blocks"]) == 3


def test_tied_weights(tmp_path):
    torch.manual_seed(0)
    net = models.create("gpt", vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)
    tokens = torch.randint(11, (2, 8))
    model = fl.localize(net, "bp", sample=tokens)
    save(tmp_path / "gpt.safetensors", model)
    before = model.eval()(tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load(tmp_path / "gpt.safetensors", model)
    assert torch.equal(model(tokens), before)


def test_an_old_file_survives_a_failed_save(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save(path, local_model(), {"epochs": 1})
    with pytest.raises(ArgumentError, match=r"^extra: .*JSON"):
        save(path, local_model(), {"bad": object()})

    def broken(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(CheckpointError, match=r"^path: .*cannot be written \(disk full\)"):
        save(path, local_model(), {"epochs": 2})
    assert read(path).extra == {"epochs": 1} and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"method": "predsim"}, "method 'dgl', the model 'predsim'"),
        ({"head": "dgl_mlp"}, "has options"),
        ({"blocks": 4}, "has blocks"),
        ({"mode": "official"}, "mode 'paper', the model 'official'"),
    ],
)
def test_another_model_is_refused_and_unchanged(tmp_path, made, message):
    path = tmp_path / "model.safetensors"
    save(path, local_model())
    other = local_model(seed=1, **made)
    before = state(other)
    with pytest.raises(CheckpointError, match=f"^path: .*{message}"):
        load(path, other)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), state(other).values(), strict=True))


def test_other_shapes_and_names_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, local_model())
    torch.manual_seed(0)
    wide = fl.localize(
        models.create("resnet20", width=8, in_channels=1), "dgl", blocks=3, sample=torch.randn(2, 1, 8, 8)
    )
    with pytest.raises(CheckpointError, match=r"^path: backbone\.\S+ is torch.float32 \["):
        load(path, wide)
    more = local_model()
    more.backbone.extra = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"lacks backbone\.extra\.bias"):
        load(path, more)


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        read(path)
    save(path, local_model())
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is truncated or no checkpoint"):
            read(path)
    torch.save({"weight": torch.zeros(1)}, path)  # a pickle is never opened as one
    with pytest.raises(CheckpointError, match="is truncated or no checkpoint"):
        read(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        read(path)


def test_any_reader_of_safetensors_can_open_it(tmp_path):
    path = tmp_path / "model.safetensors"
    model = local_model()
    save(path, model)
    assert load_file(path).keys() == model.state_dict().keys()
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert json.loads(header["__metadata__"]["fastlocal"])["about"]["method"] == "dgl"
