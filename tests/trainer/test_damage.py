"""Whatever happens to a checkpoint's files is noticed: a named error, or an older checkpoint and a warning."""

import itertools
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlocal as fl
from fastlocal.errors import CheckpointError
from fastlocal.trainer import CheckpointStore, _files, load, read, save
from tests.trainer.states import FILES, adamw, assert_same, everything, refused, tensors, train, vit

NEWEST = "step-00000002"


def small(method="dgl", seed=0, **options):
    return vit(method, blocks=2, seed=seed, depth=2, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of equal shapes, each with the checkpoints of steps 1 and 2, and a model file."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        model = small(seed=seed)
        engine = fl.Engine(model, adamw, deterministic=True)
        for step in (1, 2):
            train(engine, 1)
            CheckpointStore(folder / name).save(step, model, engine, {"epoch": step, "ema": torch.randn(40)})
        save(folder / name / "model.safetensors", model, {"epochs": 3})
    return folder


class Victim:
    """A copy of a run. `check` sees that damage to its step 2 is named, and that step 1 is loaded in its place."""

    def __init__(self, run, folder):
        self.folder, self.alone = shutil.copytree(run, folder / "run"), folder / "alone"
        self.newest = self.folder / NEWEST
        self.alone.mkdir()
        (self.alone / NEWEST).symlink_to(self.newest)  # the same files in a folder without an older checkpoint
        self.model = small(seed=5)
        self.engine = fl.Engine(self.model, adamw, deterministic=True)
        CheckpointStore(self.folder).load(self.model, self.engine, step=1)
        self.older = everything(self.model, self.engine)
        self.other = {name: torch.zeros_like(t) for name, t in self.model.state_dict().items()}

    def check(self, *named):
        """Every string of ``named`` must be in each message."""
        self.model.load_state_dict(self.other)
        alone = refused(self.alone, self.model, self.engine, match=r"^folder: no whole checkpoint .*start from the")
        asked = refused(self.folder, self.model, self.engine, step=2, match=r"^step: .*damaged.*load another step")
        with pytest.warns(RuntimeWarning, match=f"newer ones are damaged: {NEWEST}") as caught:
            loaded = CheckpointStore(self.folder).load(self.model, self.engine)
        assert loaded.step == 1 and loaded.extra["epoch"] == 1
        assert_same(self.older, everything(self.model, self.engine))
        [(path, reason)] = loaded.skipped
        assert path == self.newest
        for text in (alone, asked, reason, str(caught[0].message)):
            assert all(name in text for name in named), (named, text)
        return reason

    def vouch(self, name):
        """Writes a manifest that fits the file as it is now."""
        path = self.newest / "manifest.json"
        manifest = _files.unseal(path.read_bytes())
        manifest["files"][name] |= _files.measure(self.newest / name)
        path.write_bytes(_files.seal(manifest))


@pytest.fixture
def victim(runs, tmp_path):
    return Victim(runs / "a", tmp_path)


def positions(path, count, rng):
    """Bytes of a file: its first, its last, and others; of a safetensors file half in the header, half in tensors."""
    raw = path.read_bytes()
    if path.suffix == ".json":
        return [0, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(count - 2))]
    data = 8 + int.from_bytes(raw[:8], "little")
    ends = [0, 7, 8, data - 1, data, len(raw) - 1]
    ranges = [(0, data), (data, len(raw))]
    return ends + [rng.randrange(*ranges[i % 2]) for i in range(count - len(ends))]


def flip(raw, at, bit):
    return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]


def test_every_flipped_bit_is_noticed(victim):
    rng, tried, named = random.Random(0), 0, 0
    for name in FILES:
        path = victim.newest / name
        whole = path.read_bytes()
        for at in positions(path, 50, rng):
            path.write_bytes(flip(whole, at, rng.randrange(8)))
            reason = victim.check(name)
            tried, named = tried + 1, named + (", in tensor " in reason)
        path.write_bytes(whole)
    assert tried == 200 and named >= 40, "where a tensor's bytes were hit, it is named"
    assert CheckpointStore(victim.folder).load(victim.model, victim.engine).step == 2


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_the_damaged_tensor_is_named(victim, name):
    path = victim.newest / name
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    header.pop("__metadata__", None)
    for tensor in sorted(header)[::12]:
        begin, end = header[tensor]["data_offsets"]
        path.write_bytes(flip(whole, start + begin, 3))
        assert victim.check(name).endswith(f", in tensor {tensor}"), "that one alone"
        path.write_bytes(
            flip(flip(whole, start + end - 1, 3), len(whole) - 1 if end + start < len(whole) else start, 0)
        )
        assert " and 1 more" in victim.check(name)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_tensors_are_verified_as_well_as_files(victim, name):
    """A write that went wrong gives a file whose digest in the manifest fits it."""
    path = victim.newest / name
    raw = path.read_bytes()
    path.write_bytes(flip(raw, len(raw) - 1, 0))
    victim.vouch(name)
    victim.check(name, "tensor ", "its digest differs")


@pytest.mark.parametrize("name", FILES)
def test_truncated_longer_and_missing_files(victim, name):
    rng, path = random.Random(1), victim.newest / name
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, len(whole) // 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(8))):
        path.write_bytes(whole[:length])
        victim.check(name)
    path.write_bytes(whole[:-100] + bytes(100))  # the right size, the end never written
    victim.check(name)
    path.write_bytes(whole + b"\0")
    victim.check(name)
    path.unlink()
    victim.check(f"{name} is missing")
    path.symlink_to(path)
    victim.check(name)
    path.unlink()
    path.mkdir()
    victim.check("cannot be read" if name == "manifest.json" else name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", [("a", "step-00000001"), ("b", NEWEST)], ids=["older", "another run"])
def test_a_file_of_another_checkpoint(runs, victim, name, other):
    run, step = other
    assert (runs / run / step / name).read_bytes() != (victim.newest / name).read_bytes()
    shutil.copy(runs / run / step / name, victim.newest / name)
    if name != "manifest.json":
        victim.check(name)
    elif run == "a":
        victim.check("manifest.json is that of step 1")
    else:  # of the same step: the files are not those that it describes, by their sizes or by their digests
        assert any(file in victim.check() for file in FILES if file != name)


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(FILES, 2)))
def test_two_files_of_one_checkpoint_exchanged(victim, one, two):
    a, b = victim.newest / one, victim.newest / two
    a.rename(victim.newest / "aside"), b.rename(a), (victim.newest / "aside").rename(b)
    reason = victim.check()
    assert one in reason or two in reason


def test_exchanged_with_a_manifest_that_vouches(victim):
    """The two tensor files, each whole and with its digest in the manifest, under each other's name."""
    a, b = victim.newest / "model.safetensors", victim.newest / "state.safetensors"
    a.rename(victim.newest / "aside"), b.rename(a), (victim.newest / "aside").rename(b)
    victim.vouch(a.name), victim.vouch(b.name)
    victim.check("model.safetensors")


def test_renamed_folders_and_other_formats(victim):
    path = victim.newest / "manifest.json"
    manifest = _files.unseal(path.read_bytes())
    path.write_bytes(_files.seal(manifest | {"format": 3}))
    victim.check("manifest.json is of format 3; this version of fastlocal reads 2")
    for text in (
        _files.seal({"format": 2}),
        _files.seal({"format": 2, "step": 2, "files": []}),
        _files.seal(manifest | {"files": {}}),
        b"[" * 100_000,
        b"null",
        b"\xff",
    ):
        path.write_bytes(text)
        victim.check("manifest.json is damaged or no manifest")
    path.write_bytes(_files.seal(manifest))
    shutil.move(victim.newest, victim.folder / "step-00000003")
    message = refused(victim.folder, victim.model, victim.engine, step=3)
    assert "manifest.json is that of step 2; the folder was renamed" in message
    with pytest.warns(RuntimeWarning, match="step-00000003: manifest.json is that of step 2"):
        assert CheckpointStore(victim.folder).load(victim.model, victim.engine).step == 1


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """Writes a pickle that makes a folder when it is read as one; the test fails if anything but itself did that."""
    fuse = tmp_path / "exploded"
    monkeypatch.setenv("BOMB", str(fuse))

    def plant(path, kind):
        if kind == "torch.save":
            torch.save({"weight": torch.zeros(3), "bomb": Bomb()}, path)
        else:
            path.write_bytes(pickle.dumps(Bomb()))

    yield plant
    assert not fuse.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert fuse.exists(), "the bomb is a real one"


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_disguise_is_never_opened(victim, bomb, name, kind):
    bomb(victim.newest / name, kind)
    victim.check(name)
    if name != "manifest.json":
        victim.vouch(name)
        victim.check("cannot be read")


def test_none_is_whole(victim, tmp_path):
    for step in (1, 2):
        (victim.folder / f"step-0000000{step}" / "state.json").unlink()
    message = refused(victim.folder, victim.model, match=r"^folder: no whole checkpoint")
    assert message.count("state.json is missing") == 2
    refused(tmp_path / "nowhere", victim.model, match="it has none")
    refused(victim.folder, victim.model, step=7, match=r"^step: .*no checkpoint of step 7; it has \[1, 2\]")


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"method": "predsim"}, "step-00000003.*has method 'predsim', the model 'dgl'"),
        ({"head": "dgl_mlp"}, "step-00000003.*has options"),
        ({"dim": 16}, r"is torch.float32 \[16\] in \S+/step-00000003"),
    ],
)
def test_another_model_is_an_error_where_an_older_checkpoint_fits(victim, made, match):
    """It is whole, so going on with an older one would hide a mistake of the caller's."""
    other = small(seed=3, **made)
    CheckpointStore(victim.folder).save(3, other, fl.Engine(other, adamw, deterministic=True))
    refused(victim.folder, victim.model, victim.engine, match=f"^path: .*{match}")


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(victim):
    path = victim.newest / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(flip(raw, len(raw) - 1, 0))
    model, kept = victim.model, CheckpointStore(victim.folder, keep_last=2)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert kept.load(model).step == 1
    kept.save(3, model)
    assert [s.step for s in kept.list()] == [1, 2, 3]
    kept.save(2, model)  # written anew: whole
    assert kept.load(model, step=2).step == 2


# --- model files -----------------------------------------------------------------------------------------------------


class File:
    """A copy of a model file. `check` sees that `read` and `load` refuse it by name and change nothing."""

    def __init__(self, path):
        self.path, self.whole, self.model = path, path.read_bytes(), small(seed=5)
        self.before = tensors(dict(self.model.state_dict()))

    def check(self, match=""):
        with pytest.raises(CheckpointError, match=f"^path: .*{match}") as caught:
            read(self.path)
        with pytest.raises(CheckpointError, match=f"^path: .*{match}"):
            load(self.path, self.model)
        assert_same(self.before, tensors(dict(self.model.state_dict())))
        assert str(self.path) in str(caught.value)
        return str(caught.value)


@pytest.fixture
def file(runs, tmp_path):
    return File(shutil.copy(runs / "a" / "model.safetensors", tmp_path / "copy.safetensors"))


def test_every_flipped_bit_of_a_model_file_is_noticed(file):
    rng, named = random.Random(2), 0
    for at in positions(file.path, 200, rng):
        file.path.write_bytes(flip(file.whole, at, rng.randrange(8)))
        named += "damaged in tensor " in file.check()
    assert named >= 90
    file.path.write_bytes(file.whole)
    assert load(file.path, file.model) == {"epochs": 3}


def test_truncated_and_longer_model_files(file):
    rng = random.Random(3)
    size = len(file.whole)
    for length in (0, 1, 7, 8, 9, size // 2, size - 1, *(rng.randrange(size) for _ in range(8))):
        file.path.write_bytes(file.whole[:length])
        file.check("is truncated or no checkpoint")
    file.path.write_bytes(file.whole + b"\0")
    file.check("is truncated or no checkpoint")
    file.path.unlink()
    file.check("there is no file")
    file.path.mkdir()
    file.check("there is no file")


def test_exchanged_added_and_missing_tensors_of_a_model_file(file):
    found, metadata = load_file(file.path), _files.read_metadata(file.path)
    one, two = [name for name, t in found.items() if t.shape == (8,)][:2]
    found[one], found[two] = found[one] + 1, found[two] + 2  # the fresh ones of two norms are equal
    for changed in (
        found,
        {n: t for n, t in found.items() if n != one},
        {**load_file(file.path), one: load_file(file.path)[one].double()},
    ):
        save_file(changed, file.path, metadata=metadata)
        file.check(f"is damaged in tensor {one}")
        file.path.write_bytes(file.whole)
    save_file({**load_file(file.path), "more": torch.zeros(1)}, file.path, metadata=metadata)
    file.check("is damaged in tensor more")
    good = load_file(file.path)
    good.pop("more")
    save_file(good, file.path, metadata={"fastlocal": metadata["fastlocal"].replace('"epochs": 3', '"epochs": 4')})
    file.check("its digest differs")
    save_file(good, file.path, metadata=metadata)
    assert load(file.path, file.model) == {"epochs": 3}


def test_model_files_of_other_formats_are_named(file):
    for header, what in (('{"format": 1, "about": {}}', "of format 1, not 2"), ("[]", "without its header")):
        save_file({"a": torch.zeros(1)}, file.path, metadata={"fastlocal": header})
        file.check(f"not a checkpoint of this version of fastlocal .it is {what}")
    save_file({"a": torch.zeros(1)}, file.path, metadata={"fastlocal": "{"})
    file.check("is truncated or no checkpoint")
    save_file({"a": torch.zeros(1)}, file.path, metadata={"fastlocal": '{"format": 2}'})
    file.check("is truncated or no checkpoint")


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_in_the_place_of_a_model_file_is_never_opened(file, bomb, kind):
    bomb(file.path, kind)
    file.check("is truncated or no checkpoint")
