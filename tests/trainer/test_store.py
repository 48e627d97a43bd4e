import json
import math
import random
import shutil
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import CheckpointStore, _files, load, read, store
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


CNN = {"build": resnet, "optimizer": sgd}
INFOPRO = {"method": "infopro", "lam": (5.0, 0.5)}
RESUMED = {
    "dgl": {},
    "dgl, CNN": {**CNN},
    "auglocal": {"method": "auglocal"},
    "auglocal, CNN": {**CNN, "method": "auglocal"},
    "bp": {"method": "bp", "blocks": 1},
    "bp, CNN": {**CNN, "method": "bp", "blocks": 1},
    "predsim": {"method": "predsim"},
    "predsim, CNN": {**CNN, "method": "predsim"},
    "infopro, contrast": {**CNN, **INFOPRO},
    "infopro, cross-entropy": {**CNN, **INFOPRO, "loss": "cross_entropy"},
}
ENGINES = {
    "one stream": {"deterministic": False},
    "one stream, CNN": {**CNN, "deterministic": False},
    "AdamW as it was written": {"backend": "reference"},
    "fused AMSGrad": {"optimizer": lambda named: torch.optim.AdamW(named, lr=1e-2, amsgrad=True, fused=True)},
    "fused Nesterov": {**CNN, "optimizer": lambda named: torch.optim.SGD(named, 1e-2, 0.9, nesterov=True, fused=True)},
    "foreach": {**CNN, "optimizer": lambda named: torch.optim.SGD(named, lr=1e-2, momentum=0.9, foreach=True)},
    "RMSprop": {"optimizer": lambda named: torch.optim.RMSprop(named, lr=1e-3, momentum=0.9, centered=True)},
    "all blocks at the end": {**CNN, "update": "end"},
    "clipped": {"clip": 0.1},
    "in an accumulation": {"accumulate": 2},
    "in an accumulation, CNN": {**CNN, "accumulate": 2, "clip": 0.1},
    "in an accumulation, one stream": {"accumulate": 5, "deterministic": False},
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_goes_on_bitwise(tmp_path, case, precision):
    resume(tmp_path, precision=precision, **case)


@pytest.mark.parametrize("case", ENGINES.values(), ids=ENGINES)
def test_a_resumed_run_goes_on_bitwise_whatever_the_engine(tmp_path, case):
    resume(tmp_path, **case)


def resume(tmp_path, build=vit, optimizer=adamw, accumulate=1, **options):
    """Six batches in one go, and three and three with a new model, engine and generators: equal to the last byte."""
    made = {"deterministic": True, "memory_format": "channels_last"}
    made |= {k: options.pop(k) for k in ("precision", "deterministic", "backend", "update", "clip") if k in options}

    def start(seed):
        model = build(seed=seed, **options)
        torch.manual_seed(seed + 7), random.seed(seed + 7), np.random.seed(seed + 7)
        return model, fl.Engine(model, optimizer, **made, seed=seed)

    model, engine = start(0)
    straight = train(engine, 6, accumulate)
    wanted = everything(model, engine)
    CheckpointStore(tmp_path / "straight").save(6, model, engine, {"epoch": 2})

    model, engine = start(0)
    first = train(engine, 3, accumulate)
    kept = CheckpointStore(tmp_path / "resumed")
    kept.save(3, model, engine, {"epoch": 1, "position": 12})
    train(engine, 1, accumulate)  # what happened after the save does not matter

    model, engine = start(1)
    loaded = kept.load(model, engine)
    assert (loaded.step, loaded.extra, loaded.skipped) == (3, {"epoch": 1, "position": 12}, [])
    assert engine.steps == 3 // accumulate and engine.pending == 3 % accumulate
    assert torch.equal(torch.stack(straight), torch.stack(first + train(engine, 3, accumulate)))
    assert len({tuple(losses.tolist()) for losses in straight}) == 6 and engine.steps == 6 // accumulate
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


def test_numbers_that_json_lacks(tmp_path):
    """The files stay strict JSON, which any reader takes."""
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1, 2**70, np.float32(0.1), np.int64(3), True]
    extra = {"values": values, "keys": {float("inf"): 1, 2.5: (None,), False: '\ud800\n"é'}, "numpy": np.bool_(True)}
    path = CheckpointStore(tmp_path).save(0, vit(), extra=extra, metric=float("nan"))
    for name in ("state.json", "manifest.json"):
        json.loads((path / name).read_text(), parse_constant=pytest.fail)
    loaded = CheckpointStore(tmp_path).load(vit())
    got = loaded.extra["values"]
    plain = [v.item() if isinstance(v, np.generic) else v for v in values]
    assert list(map(repr, got)) == list(map(repr, plain)), "of the same types, signs and digits"
    assert loaded.extra["keys"] == extra["keys"] and [type(k) for k in loaded.extra["keys"]] == [float, float, bool]
    assert loaded.extra["numpy"] is True
    [saved] = CheckpointStore(tmp_path).list()
    assert math.isnan(saved.metric)


def test_tensors_of_every_form(tmp_path):
    base = torch.randn(4, 6)
    extra = {
        "tied": [base, base],
        "alias": (base[1:], base.view(-1)[3:5]),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "empty": [torch.zeros(0), torch.zeros(0, 3), torch.zeros(2, 0, dtype=torch.bool)],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "not finite": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
    }
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    dtypes += (torch.uint8, torch.uint16, torch.bool, torch.float8_e4m3fn)
    extra |= {str(d): (torch.randn(7) * 3).abs().to(d) for d in dtypes}
    CheckpointStore(tmp_path).save(0, vit(), extra=extra)
    base.zero_()  # what is saved are copies
    got = CheckpointStore(tmp_path).load(vit()).extra
    assert got.keys() == extra.keys()
    a, b = tensors(extra), tensors(got)
    assert a.keys() == b.keys()
    for name in a:
        assert b[name].is_contiguous() and not b[name].requires_grad
        if name.split("/")[1] not in ("tied", "alias", "transposed", "strided"):
            assert _files.about(_files.to_host(a[name])) == _files.about(b[name]), name
    assert torch.equal(got["tied"][0], got["tied"][1]) and bool(got["tied"][0].any())
    assert torch.equal(got["alias"][0], got["tied"][0][1:])
    assert torch.equal(got["alias"][1], got["tied"][0].view(-1)[3:5])
    assert torch.equal(got["transposed"].t()[:, ::2], got["strided"])
    got["tied"][0].zero_()
    assert bool(got["tied"][1].any()), "values, not aliases, come back"
    for bad in (torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex128), torch.zeros(2, device="meta")):
        with pytest.raises(
            ArgumentError, match=r"^extra\.0: cannot be saved, for it is a tensor of .*give a dense one"
        ):
            CheckpointStore(tmp_path).save(1, vit(), extra=[bad])


def test_what_a_trainer_adds(tmp_path):
    """Large tensors stand in state.safetensors, each with its digest; tied weights come back into a tied model."""

    def gpt(seed):
        torch.manual_seed(seed)
        net = models.create("gpt", vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8)
        return fl.localize(net, "bp", sample=torch.zeros(2, 8, dtype=torch.long))

    model = gpt(0)
    engine = fl.Engine(model, adamw)
    averaged = halved(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(engine.optimizer, 0.1, total_steps=10)
    extra = {
        "epoch": 1,
        "batch": 17,
        "sums": {"loss": torch.randn(1).double(), "count": torch.tensor(68)},
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "_anneal_func"},
        "ema": {"decay": 0.999, "model": averaged.state_dict()},
        "callbacks": [{"best": float("inf"), "waited": 0}, {}],
        "logs": {"metrics.csv": 1234, "steps.csv": 0},
    }
    path = CheckpointStore(tmp_path).save(17, model, engine, extra)
    held = {n for n in safe_open(path / "state.safetensors", "pt").keys() if n.startswith("extra.")}  # noqa: SIM118
    ema = {f"extra.ema.model.{name}" for name in averaged.state_dict()}
    assert held == ema | {"extra.sums.loss", "extra.sums.count"}
    described = json.loads((path / "manifest.json").read_text())["files"]["state.safetensors"]["tensors"]
    assert all(len(described[name]["sha256"]) == 64 for name in held)

    other = gpt(1)
    loaded = CheckpointStore(tmp_path).load(other, fl.Engine(other, adamw)).extra
    other.load_state_dict(loaded["ema"].pop("model"))
    assert_same(tensors(dict(averaged.state_dict())), tensors(dict(other.state_dict())))
    extra["ema"].pop("model")
    assert_same(tensors(extra), tensors(loaded))
    assert str(loaded) == str(extra)


def halved(model):
    averaged = deepcopy(model)
    with torch.no_grad():
        for p in averaged.parameters():
            p.mul_(0.5)
    return averaged


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
