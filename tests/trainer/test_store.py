import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import fastlocal as fl
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import CheckpointStore, load, read, store
from tests.trainer.states import FILES, adamw, assert_same, everything, refused, resnet, sgd, tensors, train, vit


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    model = vit()
    engine = fl.Engine(model, adamw, deterministic=True)
    for step in (1, 2):
        train(engine, 1)
        CheckpointStore(folder).save(step, model, engine, {"epoch": step})
    return folder


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "copy")


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["dgl", "auglocal"])
@pytest.mark.parametrize(("build", "optimizer"), [(vit, adamw), (resnet, sgd)])
def test_a_resumed_run_goes_on_bitwise(tmp_path, build, optimizer, method, precision):
    def rebuild(seed):
        model = build(method, seed=seed)
        made = {"precision": precision, "deterministic": True, "memory_format": "channels_last"}
        return model, fl.Engine(model, optimizer, **made, seed=seed)

    def start():
        model, engine = rebuild(0)
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        return model, engine

    model, engine = start()
    straight = train(engine, 6)
    wanted = everything(model, engine)
    CheckpointStore(tmp_path / "straight").save(6, model, engine, {"epoch": 2})

    model, engine = start()
    first = train(engine, 3)
    kept = CheckpointStore(tmp_path / "resumed")
    kept.save(3, model, engine, {"epoch": 1, "position": 12})
    train(engine, 1)  # what happened after the save does not matter

    model, engine = rebuild(1)
    random.seed(1), np.random.seed(1)
    loaded = kept.load(model, engine)
    assert (loaded.step, loaded.extra, loaded.skipped) == (3, {"epoch": 1, "position": 12}, [])
    assert torch.equal(torch.stack(straight), torch.stack(first + train(engine, 3))) and engine.steps == 6
    assert_same(wanted, everything(model, engine))

    kept.save(6, model, engine, {"epoch": 2})
    for name in FILES:
        a, b = (tmp_path / run / "step-00000006" / name for run in ("straight", "resumed"))
        assert a.read_bytes() == b.read_bytes(), name


def test_scales_counters_and_strides_come_back(tmp_path):
    model = resnet()
    engine = fl.Engine(model, sgd, precision="16-mixed", nonfinite="skip", memory_format="channels_last")
    train(engine, 1)
    engine.step(torch.full((4, 3, 8, 8), torch.inf), torch.zeros(4, dtype=torch.long))
    wanted = engine.state_dict()
    assert float(wanted["skipped"].sum()) > 0
    CheckpointStore(tmp_path).save(2, model, engine)
    model = resnet(seed=1)
    engine = fl.Engine(model, sgd, precision="16-mixed", nonfinite="skip", memory_format="channels_last")
    CheckpointStore(tmp_path).load(model, engine)
    assert_same(tensors(wanted), tensors(engine.state_dict()))
    for p, state in engine.optimizer.state.items():
        assert state["momentum_buffer"].stride() == p.stride(), "a fused step needs the parameter's strides"


def test_extra_comes_back_as_it_was(tmp_path, two):
    model = vit()
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=0.1), [2, 5])
    state = {k: v for k, v in scheduler.state_dict().items() if not k.startswith("_")}
    extra = {
        "a": (1, [2.5, None]),
        3: {"~": True},
        "x.y": torch.arange(3),
        "x": {"y": torch.zeros(0)},
        "schedule": state,
    }
    extra |= {
        "inf": float("inf"),
        "lr": np.float64(0.1),
        "c": Counter({4: 2}),
        "half": torch.ones((), dtype=torch.bfloat16),
    }
    CheckpointStore(tmp_path).save(0, model, extra=extra)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    got = CheckpointStore(tmp_path).load(model).extra
    assert torch.equal(torch.get_rng_state(), before), "without an engine the generators stay"
    assert_same(tensors(extra), tensors(got))
    for value in (extra, got):
        del value["x.y"], value["x"], value["half"]
    assert got == extra and type(got["a"]) is tuple and type(got["c"]) is Counter
    for bad in (object(), {"deep": [{1, 2}]}, np.zeros(2)):
        with pytest.raises(ArgumentError, match=r"^extra\S*: cannot be saved, for it is (object|set|ndarray)"):
            CheckpointStore(tmp_path).save(1, model, extra=bad)
    assert [s.step for s in CheckpointStore(tmp_path).list()] == [0]


def test_the_model_file_is_one_of_its_own(two):
    model = vit(seed=1)
    load(two / "step-00000002" / "model.safetensors", model)
    assert_same(tensors(read(two / "step-00000002" / "model.safetensors").tensors), tensors(dict(model.state_dict())))
    assert sorted(p.name for p in (two / "step-00000002").iterdir()) == FILES


# --- another model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"method": "predsim"}, "method 'dgl', the model 'predsim'"),
        ({"blocks": 2}, "has blocks"),
        ({"head": "dgl_mlp"}, "has options"),
        ({"dim": 16}, r"is torch.float32 \["),
        ({"depth": 5}, "has blocks"),
    ],
)
def test_another_model_is_refused(two, model, match):
    other = vit(seed=1, **model)
    refused(two, other, fl.Engine(other, adamw, deterministic=True), match=f"^path: .*{match}")


def test_another_engine_is_refused(two, tmp_path):
    model = vit(seed=1)
    refused(two, model, fl.Engine(model, sgd, deterministic=True), match=r"^engine: .*has optimizers \['AdamW'")
    refused(two, model, fl.Engine(model, adamw), match=r"^engine: .*has deterministic True, the engine False")
    engine = fl.Engine(model, adamw, deterministic=True, precision="bf16-mixed")
    refused(two, model, engine, match=r"^engine: .*precision '32-true'")
    CheckpointStore(tmp_path).save(0, model)
    refused(tmp_path, model, engine, match=r"^engine: .*no engine's state")
    for call in (CheckpointStore(tmp_path).load, lambda m, e: CheckpointStore(tmp_path).save(1, m, e)):
        with pytest.raises(ArgumentError, match=r"^engine: trains another model"):
            call(vit(), engine)
    assert CheckpointStore(two).load(model).step == 2, "the model alone fits"


def test_another_number_of_blocks(tmp_path):
    model = vit(blocks=4)
    units = [block.name for block in model.blocks]
    CheckpointStore(tmp_path).save(5, model, fl.Engine(model, adamw))
    wanted = model.state_dict()

    fewer = vit(blocks=2, seed=1)
    assert [b.name for b in fewer.blocks[:-1]] == [units[1]], "cut where the checkpoint's second block ended"
    engine = fl.Engine(fewer, adamw)
    loaded = CheckpointStore(tmp_path).load(fewer, engine, heads="match")
    assert loaded.heads == [units[1]] and engine.steps == 0
    assert loaded.left == [
        f"the checkpoint's head 0 ('{units[0]}') has no place",
        f"the checkpoint's head 2 ('{units[2]}') has no place",
        "the engine's state, which belongs to all heads together",
    ]
    got = fewer.state_dict()
    assert all(torch.equal(t, wanted[n.replace("heads.0.", "heads.1.")]) for n, t in got.items())

    more = vit(blocks=5, seed=1)
    before = tensors(dict(more.state_dict()))
    loaded = CheckpointStore(tmp_path).load(more, heads="match")
    own = [b.name for b in more.blocks]
    assert loaded.heads == [u for u in own[:-1] if u in units[:-1]]
    assert loaded.left == [
        f"the head of block {k} ('{u}') stays as it is: the checkpoint has none there"
        for k, u in enumerate(own[:-1])
        if u not in units[:-1]
    ]
    for name, t in more.state_dict().items():
        kept = name.startswith("heads.") and own[int(name.split(".")[1])] not in units[:-1]
        assert torch.equal(t, before[f"/{name}"]) if kept else name.startswith("heads.") or torch.equal(t, wanted[name])

    same = vit(blocks=4, seed=2)
    loaded = CheckpointStore(tmp_path).load(same, fl.Engine(same, adamw), heads="match")
    assert loaded.left == [] and loaded.heads == units[:-1]
    assert_same(tensors(dict(wanted)), tensors(dict(same.state_dict())))

    CheckpointStore(tmp_path / "cnn").save(5, resnet())
    other = resnet(head="dgl_mlp", seed=1)
    loaded = CheckpointStore(tmp_path / "cnn").load(other, heads="match")
    assert loaded.heads == [] and sum("has other tensors" in text for text in loaded.left) == 2
    assert "options: the checkpoint has " in loaded.left[-1]
    refused(tmp_path, vit("predsim", blocks=4), heads="match", match=r"^path: .*has method 'dgl'.*backbone\(\)")
    refused(tmp_path, vit(blocks=4, dim=16), heads="match", match=r"^path: backbone\.\S+ is \(torch.float32")
    with pytest.raises(ArgumentError, match=r"^heads: got 'any'"):
        CheckpointStore(tmp_path).load(other, heads="any")


# --- saving ----------------------------------------------------------------------------------------------------------


def test_retention(tmp_path):
    model, kept = vit(), CheckpointStore(tmp_path, keep_last=2, keep_best=1)
    assert kept.latest() is None and kept.list() == []
    for step, metric in enumerate([0.1, 0.9, 0.3, float("nan"), None, 0.2]):
        kept.save(step, model, metric=metric)
    assert [(s.step, s.metric) for s in kept.list()] == [(1, 0.9), (4, None), (5, 0.2)]
    assert kept.latest() == store.Saved(5, tmp_path / "step-00000005", 0.2)
    lower = CheckpointStore(tmp_path, keep_last=1, keep_best=2, better="lower")
    lower.save(6, model, metric=0.5)
    assert [s.step for s in lower.list()] == [5, 6]
    lower.save(5, model, metric=0.0)  # a run that goes back: what lies ahead is left alone
    assert [(s.step, s.metric) for s in lower.list()] == [(5, 0.0), (6, 0.5)]


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(copy):
    path = copy / "step-00000002" / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    model, kept = vit(), CheckpointStore(copy, keep_last=2)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert kept.load(model).step == 1
    kept.save(3, model)
    assert [s.step for s in kept.list()] == [1, 2, 3]
    kept.save(2, model)  # written anew: whole
    assert kept.load(model, step=2).step == 2


def test_arguments(tmp_path):
    for kwargs in ({"keep_last": 0}, {"keep_best": -1}, {"keep_last": True}, {"better": "more"}):
        with pytest.raises(ArgumentError, match=f"^{next(iter(kwargs))}: got"):
            CheckpointStore(tmp_path, **kwargs)
    for step in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match=r"^step: got"):
            CheckpointStore(tmp_path).save(step, vit())
    with pytest.raises(ArgumentError, match=r"^metric: got Tensor"):
        CheckpointStore(tmp_path).save(1, vit(), metric=torch.ones(()))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written"):
        CheckpointStore(tmp_path / "file").save(1, vit())
