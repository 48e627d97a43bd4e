import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

import fastlocal as fl
from fastlocal import models
from fastlocal.errors import ArgumentError, CheckpointError
from fastlocal.trainer import CheckpointStore, load, read, store

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


def vit(method="dgl", blocks=3, seed=0, dim=8, depth=4, **options):
    torch.manual_seed(seed)
    net = models.create("vit_t", img_size=8, patch_size=4, dim=dim, depth=depth, heads=2, num_classes=4, dropout=0.2)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def resnet(method="dgl", blocks=3, seed=0, **options):
    torch.manual_seed(seed)
    net = models.create("resnet20", width=4, num_classes=4)
    return fl.localize(net, method, blocks=blocks, sample=torch.zeros(2, 3, 8, 8), **options)


def adamw(named):
    return torch.optim.AdamW(named, lr=1e-2)


def sgd(named):
    return torch.optim.SGD(named, lr=1e-2, momentum=0.9)


def train(engine, steps):
    """Losses of ``steps`` steps on batches drawn from the global generators, which a resumed run must find as they were."""
    losses = []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8) * random.uniform(0.9, 1.1) + float(np.random.normal())
        losses.append(engine.step(x, torch.randint(4, (4,))).losses)
    return losses


def tensors(value, name=""):
    """Every tensor of a nested state, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value.clone()}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {n: t for k, v in pairs for n, t in tensors(v, f"{name}/{k}").items()}


def everything(model, engine):
    return tensors({"model": model.state_dict(), "engine": engine.state_dict()})


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


def refused(folder, model, engine=None, match=".", **kwargs):
    before = everything(model, engine) if engine else tensors(model.state_dict())
    torch_state, steps = torch.get_rng_state(), engine and engine.steps
    with pytest.raises(CheckpointError, match=match) as caught:
        CheckpointStore(folder).load(model, engine, **kwargs)
    assert_same(before, everything(model, engine) if engine else tensors(model.state_dict()))
    assert torch.equal(torch_state, torch.get_rng_state()) and steps == (engine and engine.steps)
    return str(caught.value)


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


# --- damage ----------------------------------------------------------------------------------------------------------


class Victim:
    """Sees that damage to step 2 is named and that step 1 is loaded in its place."""

    def __init__(self, folder):
        self.folder, self.newest = folder, folder / "step-00000002"
        self.model = vit(seed=1)
        self.engine = fl.Engine(self.model, adamw, deterministic=True)
        CheckpointStore(folder).load(self.model, self.engine, step=1)
        self.older = everything(self.model, self.engine)
        CheckpointStore(folder).load(self.model, self.engine, step=2)

    def check(self, name, match=""):
        # An explicit step is refused, and nothing has changed: the model is still that of step 2 or of step 1.
        message = refused(self.folder, self.model, self.engine, step=2, match=r"^step: .*damaged")
        assert name in message and "load another step" in message
        with pytest.warns(RuntimeWarning, match="newer ones are damaged: step-00000002"):
            loaded = CheckpointStore(self.folder).load(self.model, self.engine)
        assert loaded.step == 1 and loaded.extra == {"epoch": 1}
        [(path, reason)] = loaded.skipped
        assert path == self.newest and name in reason
        assert_same(self.older, everything(self.model, self.engine))
        return message


def test_every_flipped_bit_is_noticed(copy):
    victim, rng, named = Victim(copy), random.Random(0), 0
    for i in range(200):
        path = victim.newest / FILES[i % 4]
        whole = path.read_bytes()
        at = (0, len(whole) - 1)[i // 4] if i < 8 else rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        message = victim.check(path.name)
        named += ", in tensor " in message
        path.write_bytes(whole)
    assert named > 50, "where a tensor's bytes were hit, it is named"
    assert CheckpointStore(copy).load(victim.model, victim.engine).step == 2


def test_the_damaged_tensor_is_named(copy):
    victim = Victim(copy)
    path = victim.newest / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + start])
    name = "heads.1.readout.weight" if "heads.1.readout.weight" in header else sorted(header)[-1]
    raw[8 + start + header[name]["data_offsets"][0]] ^= 4
    path.write_bytes(raw)
    assert f"model.safetensors is not as it was written (its digest differs), in tensor {name}" in victim.check(name)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_tensors_are_verified_as_well_as_files(copy, name):
    """A write that went wrong in memory gives a file with a digest that fits it."""
    victim = Victim(copy)
    path = victim.newest / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    manifest = json.loads((victim.newest / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] |= store._measure(path)
    (victim.newest / "manifest.json").write_bytes(store._seal(manifest))
    assert f"{name}: tensor " in victim.check(name)


@pytest.mark.parametrize("name", FILES)
def test_truncated_deleted_swapped_and_longer_files(copy, name):
    victim, rng = Victim(copy), random.Random(1)
    path = victim.newest / name
    whole = path.read_bytes()
    for length in (0, 1, 8, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))):
        path.write_bytes(whole[:length])
        victim.check(name)
    path.write_bytes(whole + b"\0")
    victim.check(name)
    path.unlink()
    assert f"{name} is missing" in victim.check(name)
    path.mkdir()
    victim.check("")
    path.rmdir()
    shutil.copy(copy / "step-00000001" / name, path)
    victim.check("manifest.json is that of step 1" if name == "manifest.json" else name)


def test_renamed_folders_and_other_formats(copy):
    shutil.move(copy / "step-00000002", copy / "step-00000003")
    assert "is that of step 2; the folder was renamed" in refused(copy, vit(), step=3)
    shutil.move(copy / "step-00000003", copy / "step-00000002")
    path = copy / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_bytes(store._seal(manifest | {"format": 2}))
    assert "format 2; this version of fastlocal reads 1" in refused(copy, vit(), step=2)
    for manifest in ({"format": 1}, {"format": 1, "step": 2, "files": []}):
        path.write_bytes(store._seal(manifest))
        assert "manifest.json is no manifest" in refused(copy, vit(), step=2)
    path.write_text("[" * 100_000)
    assert "manifest.json is no manifest" in refused(copy, vit(), step=2)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("known", [False, True], ids=["plain", "with a manifest that vouches for it"])
def test_a_pickle_in_disguise_is_never_opened(copy, tmp_path, monkeypatch, name, known):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    victim = Victim(copy)
    path = victim.newest / name
    path.write_bytes(pickle.dumps(Bomb()))
    if known and name != "manifest.json":
        manifest = json.loads((victim.newest / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"][name] |= store._measure(path)
        (victim.newest / "manifest.json").write_bytes(store._seal(manifest))
    victim.check("cannot be read" if known and name != "manifest.json" else name)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb is a real one"


def test_none_is_whole(copy, tmp_path):
    for step in (1, 2):
        (copy / f"step-0000000{step}" / "state.json").unlink()
    message = refused(copy, vit(), match=r"^folder: no whole checkpoint")
    assert message.count("state.json is missing") == 2 and "start from the beginning" in message
    refused(tmp_path / "nowhere", vit(), match="it has none")
    refused(copy, vit(), step=7, match=r"^step: .*no checkpoint of step 7; it has \[1, 2\]")


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


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def raising(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("where", "number", "remedy"),
    [
        ("safetensors.torch.save_file", errno.ENOSPC, "free some space"),
        ("fastlocal.trainer.store._write_bytes", errno.ENOSPC, "free some space"),
        ("fastlocal.trainer.store._sync", errno.EIO, "look at the disk"),
        ("os.mkdir", errno.EROFS, "may write to"),
        ("os.rename", errno.EACCES, "may write to"),
    ],
)
def test_a_failed_save_leaves_what_was_there(copy, monkeypatch, where, number, remedy):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    for step in (2, 3):  # one to be replaced, and a new one
        with monkeypatch.context() as patched:
            patched.setattr(where, raising(number))
            with pytest.raises(CheckpointError, match=f"^folder: .*step {step} cannot be written.*{remedy}"):
                CheckpointStore(copy, keep_last=1).save(step, vit(seed=1))
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
        assert names(copy) == ["step-00000001", "step-00000002"]
    assert CheckpointStore(copy).load(vit()).step == 2


def test_a_checkpoint_whose_replacement_fails_is_put_back_at_once(copy, monkeypatch):
    real, before = os.rename, (copy / "step-00000002" / "manifest.json").read_bytes()
    with monkeypatch.context() as patched:
        new = ".step-00000002.new-"
        patched.setattr(os, "rename", lambda a, b: raising(errno.EIO)() if a.name.startswith(new) else real(a, b))
        with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written"):
            CheckpointStore(copy).save(2, vit(seed=1))
    assert names(copy) == ["step-00000001", "step-00000002"]
    assert (copy / "step-00000002" / "manifest.json").read_bytes() == before


def test_a_file_that_may_not_grow(copy):
    """The operating system refuses in the middle of a real write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written"):
            CheckpointStore(copy, keep_last=1).save(3, vit(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(copy) == ["step-00000001", "step-00000002"] and CheckpointStore(copy).load(vit()).step == 2


def killed_while(action, where, calls=1):
    """Runs ``action`` in a forked process that is killed at a call of ``where``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's threads, which it does not use
        pid = os.fork()
    if pid == 0:
        try:
            module, _, attribute = where.rpartition(".")
            target = {"os": os, "store": store}[module]
            real, left = getattr(target, attribute), [calls]

            def kill(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(target, attribute, kill)
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "calls", "step"), [("store._write_bytes", 2, 3), ("os.rename", 1, 3), ("os.rename", 2, 2)]
)
def test_a_killed_save(copy, where, calls, step):
    model = vit()
    killed_while(lambda: CheckpointStore(copy).save(step, model), where, calls)
    assert any(name.startswith(".step-") for name in names(copy)), "it has left something"
    kept = CheckpointStore(copy)
    assert kept.load(model).step == 2, "the one that was to be replaced came back"
    kept.save(4, model)
    assert names(copy) == ["step-00000001", "step-00000002", "step-00000004"]


def test_a_save_in_progress_is_no_leftover(tmp_path, monkeypatch):
    model, other = vit(), vit(seed=1)
    inside, go = threading.Event(), threading.Event()
    real = store._write_bytes

    def slow(path, content):
        if threading.current_thread() is writer and path.name == "manifest.json":
            inside.set()
            assert go.wait(20)
        return real(path, content)

    monkeypatch.setattr(store, "_write_bytes", slow)
    writer = threading.Thread(target=lambda: CheckpointStore(tmp_path).save(1, model, extra="slow"))
    writer.start()
    assert inside.wait(20)
    CheckpointStore(tmp_path).save(1, other, extra="quick")  # the same step, under another name until it is whole
    assert CheckpointStore(tmp_path).load(other).extra == "quick"
    assert any(name.startswith(".step-00000001.new-") for name in names(tmp_path))
    go.set()
    writer.join()
    assert CheckpointStore(tmp_path).load(other).extra == "slow" and names(tmp_path) == ["step-00000001"]


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
