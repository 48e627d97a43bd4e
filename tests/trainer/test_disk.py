"""Disks that are full, read-only or fail, and processes that are killed, while a checkpoint is written.

The full and the read-only disks are real ones: small file systems, mounted by a forked process that no other one sees.
Where that is not allowed, limits on file sizes and folders without write permission do, which are for everybody.
"""

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastlocal as fl
from fastlocal.errors import CheckpointError
from fastlocal.trainer import CheckpointStore, _files, read, save
from tests.trainer.states import adamw, assert_same, contents, everything, names, train, vit

ORDER = ["model.safetensors", "state.safetensors", "state.json", "manifest.json"]  # in which they are written
LAST = "step-00000001"


class Run:
    """A training in the middle, and what must hold around a save that fails."""

    def __init__(self):
        self.model = vit(depth=2)
        self.engine = fl.Engine(self.model, adamw, deterministic=True)
        train(self.engine, 1)
        self.extra = {"epoch": 1, "ema": torch.randn(2000)}

    def save(self, folder, step):
        return CheckpointStore(folder).save(step, self.model, self.engine, self.extra)

    @contextmanager
    def failing(self, folder, elsewhere, remedy, leftovers=False):
        """For a body whose save must raise CheckpointError: disk, memory and the next save elsewhere are as they should be."""
        before, files, generator = everything(self.model, self.engine), contents(folder), torch.get_rng_state()
        with pytest.raises(CheckpointError, match=f"^folder: .*cannot be written.*{remedy}.*untouched$"):
            yield
        assert_same(before, everything(self.model, self.engine))
        assert torch.equal(generator, torch.get_rng_state())
        if not leftovers:
            assert contents(folder) == files
            assert names(folder) == sorted({path.parent.name for path in files})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = vit(depth=2, seed=1)
            newest = CheckpointStore(folder).latest()
            assert newest.path.name == names(folder)[-1]
            assert CheckpointStore(folder).load(model, fl.Engine(model, adamw, deterministic=True)).path == newest.path
        self.save(elsewhere, 2)
        model = vit(depth=2, seed=1)
        engine = fl.Engine(model, adamw, deterministic=True)
        CheckpointStore(elsewhere).load(model, engine)
        assert_same(before, everything(model, engine))


@pytest.fixture
def run():
    return Run()


@pytest.fixture
def folder(run, tmp_path):
    run.save(tmp_path / "run", 1)
    return tmp_path / "run"


@pytest.fixture
def at(monkeypatch):
    """Calls a function just before the file of a name is first written, and lists the files of which that was begun."""

    def spy(wanted=None, action=None):
        begun = []

        def spied(real):
            def write(path, *args):
                begun.append(path.name)
                if path.name == wanted and begun.count(wanted) == 1:
                    action()
                return real(path, *args)

            return write

        for function in ("write_tensors", "write_bytes"):
            monkeypatch.setattr(_files, function, spied(getattr(_files, function)))
        return begun

    return spy


# --- forked processes ------------------------------------------------------------------------------------------------


def fork(action):
    """Starts ``action`` in a forked process; it never returns there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's threads, which it does not use
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            action()
            code = 0
        finally:
            os._exit(code)
    return pid


def in_child(action):
    """Runs ``action`` in a forked process and fails or skips as it does."""
    r, w = os.pipe()

    def reporting():
        try:
            action()
        except BaseException as error:
            kind = b"skip" if isinstance(error, pytest.skip.Exception) else b"fail"
            text = str(error) if kind == b"skip" else traceback.format_exc()
            os.write(w, kind + text.encode()[-60_000:])

    pid = fork(reporting)
    os.close(w)
    with open(r, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    if said.startswith("skip"):
        pytest.skip(said[4:])
    assert not said, said


LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWUSER, RDONLY, REMOUNT, REC, PRIVATE = 0x20000, 0x10000000, 1, 32, 0x4000, 1 << 18


def call(name, *args):
    if getattr(LIBC, name)(*args):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(folder, options, flags=0):
    call("mount", b"none", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(flags), options.encode())


def own_disk(folder, options):
    """Mounts a file system in ``folder`` that this process alone sees. Skips the test where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    try:
        if user == 0:
            call("unshare", NEWNS)
        else:
            call("unshare", NEWNS | NEWUSER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        call("mount", b"none", b"/", None, ctypes.c_ulong(REC | PRIVATE), None)
        mount(folder, options)
    except OSError as error:
        pytest.skip(f"this process may not mount a file system of its own ({error})")


# --- full ------------------------------------------------------------------------------------------------------------


def fill(folder, left):
    """Leaves ``left`` bytes free in the file system of ``folder``."""
    space = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - left)))


@pytest.mark.parametrize("replace", [False, True], ids=["a new one", "one to be replaced"])
@pytest.mark.parametrize("name", ORDER)
def test_a_full_disk(run, tmp_path, at, name, replace):
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()

    def action():
        own_disk(disk, "size=8m")
        folder = disk / "run"
        path = run.save(folder, 1)
        pages = {n: -(-(path / n).stat().st_size // 4096) for n in ORDER}
        assert pages[name] > 1
        fill(disk, 4096 * (sum(pages[n] for n in ORDER[: ORDER.index(name)]) + pages[name] // 2))
        begun = at()
        with run.failing(folder, elsewhere, "free some space"):
            try:
                run.save(folder, 1 if replace else 2)
            finally:
                assert begun[-1] == name, "it was this file that did not fit"
        (disk / "ballast").unlink()
        run.save(folder, 2)
        assert names(folder) == [LAST, "step-00000002"]

    in_child(action)


@pytest.mark.parametrize("inodes", range(5))
def test_a_disk_that_takes_no_more_files(run, tmp_path, at, inodes):
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()

    def action():
        own_disk(disk, f"size=8m,nr_inodes={6 + 1 + inodes}")  # its root, a folder, a checkpoint, and so many more
        folder = disk / "run"
        run.save(folder, 1)
        begun = at()
        with run.failing(folder, elsewhere, "free some space"):
            run.save(folder, 2)
        assert begun[: len(ORDER)] == [*ORDER[:inodes], *ORDER][:4] and begun.count(ORDER[0]) == 1 + bool(inodes)

    in_child(action)


def test_a_full_disk_and_a_model_file(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()

    def action():
        own_disk(disk, "size=1m")
        path = disk / "model.safetensors"
        save(path, run.model, {"epochs": 1})
        fill(disk, 8192)
        with pytest.raises(CheckpointError, match=r"^path: .*cannot be written.*free some space"):
            save(path, run.model, {"epochs": 2})
        assert names(disk) == ["ballast", path.name] and read(path).extra == {"epochs": 1}

    in_child(action)


@contextmanager
def file_size(limit):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("replace", [False, True], ids=["a new one", "one to be replaced"])
@pytest.mark.parametrize("name", ORDER)
def test_a_file_that_may_not_grow(run, folder, tmp_path, at, name, replace):
    """The operating system refuses in the middle of a real write. Runs for everybody."""
    whole = (folder / LAST / name).stat().st_size

    def save_in_vain():
        with file_size(whole // 2) as lower:
            begun = at(name, lower)
            try:
                run.save(folder, 1 if replace else 2)
            finally:
                assert begun[-1] == name

    with run.failing(folder, tmp_path / "elsewhere", r"raise the limit on the size of files \(ulimit -f\)"):
        save_in_vain()
    run.save(folder, 2)
    assert names(folder) == [LAST, "step-00000002"]


def test_a_model_file_that_may_not_grow(run, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, run.model, {"epochs": 1})
    with file_size(5000) as lower, pytest.raises(CheckpointError, match=r"^path: .*cannot be written.*ulimit -f"):
        lower()
        save(path, run.model, {"epochs": 2})
    assert names(tmp_path) == [path.name] and read(path).extra == {"epochs": 1}


# --- read-only -------------------------------------------------------------------------------------------------------


def test_a_read_only_disk(run, tmp_path):
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    disk.mkdir()

    def action():
        own_disk(disk, "size=8m")
        folder = disk / "run"
        run.save(folder, 1)
        mount(disk, "", REMOUNT | RDONLY)
        for step in (1, 2):
            with run.failing(folder, elsewhere, "may write to"):
                run.save(folder, step)
        with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written.*may write to"):
            run.save(disk / "new", 1)
        with pytest.raises(CheckpointError, match=r"^path: .*cannot be written.*may write to"):
            save(disk / "new" / "model.safetensors", run.model)
        mount(disk, "", REMOUNT)
        run.save(folder, 2)
        assert names(folder) == [LAST, "step-00000002"]

    in_child(action)


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_turns_read_only_before_the_rename(run, tmp_path, monkeypatch, step):
    disk = tmp_path / "disk"
    disk.mkdir()

    def action():
        own_disk(disk, "size=8m")
        folder, real, left = disk / "run", os.rename, [{1: 2, 2: 1}[step]]  # of step 1, the old one is put aside first
        run.save(folder, 1)
        before = contents(folder)

        def rename(source, target):
            left[0] -= 1
            if left == [0]:
                mount(disk, "", REMOUNT | RDONLY)
            return real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", rename)
            with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written.*may write to"):
                run.save(folder, step)
        assert len(names(folder)) == 2, "what was written cannot be removed now"
        mount(disk, "", REMOUNT)
        assert CheckpointStore(folder).latest().path.name == LAST
        assert contents(folder) == before and names(folder) == [LAST]

    in_child(action)


def test_a_folder_without_write_permission(run):
    """Runs for everybody: root, who may write anywhere, becomes nobody for it."""
    base = Path(tempfile.mkdtemp(prefix="fastlocal-"))  # not below pytest's folder, which is closed to others
    try:
        elsewhere, folder, nobody = base / "elsewhere", base / "run", 65534
        run.save(folder, 1)
        elsewhere.mkdir()
        if os.getuid() == 0:
            for path in (base, *base.rglob("*")):
                os.chown(path, nobody, nobody)
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)

        def action():
            if os.getuid() == 0:
                os.setgroups([]), os.setgid(nobody), os.setuid(nobody)
            for step in (1, 2):
                with run.failing(folder, elsewhere, "may write to"):
                    run.save(folder, step)

        in_child(action)
    finally:
        folder.chmod(stat.S_IRWXU)
        shutil.rmtree(base)


def test_no_folder_can_be_there(run, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/checkpoints")):
        with pytest.raises(CheckpointError, match=r"^folder: .*cannot be written"):
            run.save(folder, 1)
        assert CheckpointStore(folder).list() == []
        with pytest.raises(CheckpointError, match=r"^folder: no whole checkpoint"):
            CheckpointStore(folder).load(run.model)
        with pytest.raises(CheckpointError, match=r"^path: .*cannot be written"):
            save(folder / "model.safetensors", run.model)


# --- calls that fail -------------------------------------------------------------------------------------------------


def raising(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("where", "number", "remedy"),
    [
        ("safetensors.torch.save_file", errno.EDQUOT, "free some space"),
        ("fastlocal.trainer._files.write_bytes", errno.ENOSPC, "free some space"),
        ("fastlocal.trainer._files.measure", errno.EIO, "look at the disk"),
        ("os.mkdir", errno.EROFS, "may write to"),
        ("os.rename", errno.ENOSPC, "free some space"),
        ("os.rename", errno.EACCES, "may write to"),
    ],
)
def test_a_call_that_fails(run, folder, tmp_path, monkeypatch, where, number, remedy):
    for step in (1, 2):
        with run.failing(folder, tmp_path / "elsewhere", remedy), monkeypatch.context() as patched:
            patched.setattr(where, raising(number))
            run.save(folder, step)


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_sync_that_fails(run, folder, tmp_path, monkeypatch, calls):
    """Of the four files, of their folder, and of the store's folder after the rename, which is undone."""
    for step in (1, 2):
        real, left = os.fsync, [calls]

        def fsync(handle, real=real, left=left):
            left[0] -= 1
            return real(handle) if left[0] else raising(errno.EIO)()

        with run.failing(folder, tmp_path / "elsewhere", "look at the disk"), monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            run.save(folder, step)
        assert left == [0], "it was called so often"


def test_a_checkpoint_whose_replacement_fails_is_put_back_at_once(run, folder, tmp_path, monkeypatch):
    real = os.rename
    with run.failing(folder, tmp_path / "elsewhere", "look at the disk"), monkeypatch.context() as patched:
        new = f".{LAST}.new-"
        patched.setattr(os, "rename", lambda a, b: raising(errno.EIO)() if a.name.startswith(new) else real(a, b))
        run.save(folder, 1)


# --- killed ----------------------------------------------------------------------------------------------------------


def killed_while(action, module, attribute, calls):
    """Runs ``action`` in a forked process that is killed at a call of a function."""

    def child():
        real, left = getattr(module, attribute), [calls]

        def kill(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, attribute, kill)
        action()

    pid = fork(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("module", "attribute", "calls", "step"),
    [
        (_files, "write_tensors", 2, 2),
        (_files, "write_bytes", 2, 2),
        (os, "rename", 1, 2),
        (os, "rename", 1, 1),
        (os, "rename", 2, 1),
    ],
)
def test_a_save_that_is_killed_at_a_certain_call(run, folder, module, attribute, calls, step):
    before = contents(folder)
    killed_while(lambda: run.save(folder, step), module, attribute, calls)
    assert any(name.startswith(".step-") for name in names(folder)), "it has left something"
    kept = CheckpointStore(folder)
    assert kept.latest().path.name == LAST, "the one that was to be replaced came back"
    assert kept.load(run.model).step == 1
    run.save(folder, 3)
    assert names(folder) == [LAST, "step-00000003"]
    assert {p: raw for p, raw in contents(folder).items() if p in before} == before


def set_all(model, value):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


@pytest.mark.parametrize("replace", [False, True], ids=["steps", "one step"])
def test_saves_that_are_killed_at_random_moments(tmp_path, replace):
    """Each state is one number everywhere; the number of a save that has returned is told to the parent."""
    model, folder, rng = vit(depth=2), tmp_path / "run", random.Random(int(replace))
    other = vit(depth=2, seed=1)

    def write(value):
        set_all(model, value)
        extra = {"value": value, "ema": torch.full((2000,), float(value))}
        kept = CheckpointStore(folder, keep_last=1 if replace else 2)
        kept.save(5 if replace else value, model, extra=extra, metric=value)

    start = time.perf_counter()
    write(1)
    took, value, lost = time.perf_counter() - start, 1, 0
    for _ in range(10):
        r, w = os.pipe()

        def work(first=value + 1, w=w):
            value = first
            while True:
                write(value)
                os.write(w, value.to_bytes(4, "little"))
                value += 1

        pid = fork(work)
        os.close(w)
        time.sleep(rng.uniform(0.2, 4) * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(r, "rb") as pipe:
            told = pipe.read()
        known = int.from_bytes(told[-4:], "little") if told else value
        leftovers = any(name.startswith(".") for name in names(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert CheckpointStore(folder).latest() is not None
            loaded = CheckpointStore(folder).load(other)
        value = loaded.extra["value"]
        assert value in (known, known + 1), "nothing that was told to be saved is lost"
        assert loaded.step == (5 if replace else value)
        assert torch.equal(loaded.extra["ema"], torch.full((2000,), float(value)))
        assert all(bool((t == value).all()) for t in other.state_dict().values())
        lost += leftovers
        value += 1
        write(value)
        assert not any(name.startswith(".") for name in names(folder))
        assert len(names(folder)) <= (1 if replace else 3)
    assert lost, "at least one was killed in the middle of a save"


def test_a_save_in_progress_is_no_leftover(tmp_path, monkeypatch):
    model, other = vit(), vit(seed=1)
    inside, go = threading.Event(), threading.Event()
    real = _files.write_bytes

    def slow(path, content):
        if threading.current_thread() is writer and path.name == "manifest.json":
            inside.set()
            assert go.wait(20)
        return real(path, content)

    monkeypatch.setattr(_files, "write_bytes", slow)
    writer = threading.Thread(target=lambda: CheckpointStore(tmp_path).save(1, model, extra="slow"))
    writer.start()
    assert inside.wait(20)
    CheckpointStore(tmp_path).save(1, other, extra="quick")  # the same step, under another name until it is whole
    assert CheckpointStore(tmp_path).load(other).extra == "quick"
    assert any(name.startswith(".step-00000001.new-") for name in names(tmp_path))
    go.set()
    writer.join()
    assert CheckpointStore(tmp_path).load(other).extra == "slow" and names(tmp_path) == ["step-00000001"]
