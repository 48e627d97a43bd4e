"""csrc/graph_executor on a CUDA runtime without a device."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastlocal.engine import _native
from tests.csrc.fake_cuda import CSRC, HERE, FakeCuda, build, compiler, play, reach

Spec = list[tuple[int, list[int]]]  # per segment its stream and its waits


@pytest.fixture
def cuda(extension: None) -> FakeCuda:
    return FakeCuda()


def executor(cuda: FakeCuda, spec: Spec, composed: bool, graphs: list[int] | None = None) -> Any:
    native: Any = _native._load()[0]
    handles = graphs or [cuda.graph() for _ in spec]
    segments = [(f"task {i}", g, stream, waits) for i, (g, (stream, waits)) in enumerate(zip(handles, spec))]
    return native.RoundExecutor(cuda.runtime, segments, composed)


def random_spec(seed: int) -> Spec:
    rng = random.Random(seed)
    spec: Spec = []
    for i in range(rng.randint(1, 14)):
        before = rng.choices(range(i), k=rng.randint(0, 3)) if i else []  # the same one may be named twice
        spec.append((rng.choice([0, 1, 2, 7]), before))
    return spec


def expected(spec: Spec) -> list[set[int]]:
    """Per segment, all that must be over before it starts."""
    before: list[set[int]] = []
    for i, (stream, waits) in enumerate(spec):
        direct = {*waits, *(j for j in range(i) if spec[j][0] == stream)}
        before.append(direct.union(*(before[j] for j in direct)))
    return before


BOTH = pytest.mark.parametrize("composed", [True, False], ids=["composed", "loop"])


@BOTH
@pytest.mark.parametrize("seed", range(30))
def test_the_order_is_that_of_streams_and_waits_and_nothing_more(cuda: FakeCuda, seed: int, composed: bool) -> None:
    spec = random_spec(seed)
    graphs = [cuda.graph() for _ in spec]
    made = executor(cuda, spec, composed, graphs)
    main = cuda.stream()
    made.launch(main)
    ops = cuda.ops()
    numbers = [cuda.number(g) for g in graphs]
    at = [next(i for i, op in enumerate(ops) if op.graph == n) for n in numbers]
    assert sum(op.graph is not None for op in ops) == len(spec) == made.nodes
    before = reach(ops)
    for i, wanted in enumerate(expected(spec)):
        assert {j for j in range(len(spec)) if at[j] in before[at[i]]} == wanted
    assert set(at) <= before[cuda.tails[cuda.number(main)]], "the caller's stream goes on before the round is over"
    direct = sum(len({*w, *[j for j in range(i) if spec[j][0] == s][-1:]}) for i, (s, w) in enumerate(spec))
    assert made.edges == direct
    made.close()
    assert (cuda.alive, cuda.misuse) == (0, 0)


@BOTH
def test_rounds_do_not_overlap_on_a_stream_and_follow_what_was_there(cuda: FakeCuda, composed: bool) -> None:
    spec: Spec = [(3, []), (0, []), (3, [1])]
    graphs = [cuda.graph() for _ in spec]
    made = executor(cuda, spec, composed, graphs)
    other = executor(cuda, [(0, [])], True, [cuda.graph()])
    main = cuda.stream()
    for launched in (other, made, made, other):
        launched.launch(main)
    ops = cuda.ops()
    before = reach(ops)
    order = [i for i, op in enumerate(ops) if op.graph is not None]
    rounds = [order[:1], order[1:4], order[4:7], order[7:]]
    for earlier, later in itertools.pairwise(rounds):
        assert all(set(earlier) <= before[i] for i in later)
    for seed in (None, -1, 0, 1, 2):
        played = play(ops, lambda graph: [], seed)
        assert played[0] == played[-1] and sorted(played[1:4]) == sorted(map(cuda.number, graphs))


def test_a_composed_launch_is_one_call_and_a_loop_uses_the_callers_stream_first(cuda: FakeCuda) -> None:
    spec: Spec = [(0, []), (1, [0]), (0, []), (1, [2])]
    main = cuda.stream()
    made = executor(cuda, spec, True)
    made.upload(main)
    cuda.clear()
    made.launch(main)
    assert [line[0] for line in cuda.log] == ["launch"]
    loop = executor(cuda, spec, False)
    cuda.clear()
    loop.launch(main)
    lines = cuda.log
    launches = [line for line in lines if line[0] == "launch"]
    assert len(launches) == 4 and [line[2] == str(cuda.number(main)) for line in launches] == [True, False, True, False]
    assert len(lines) == 4 + 2 + 2 + 2 + 2  # launches, two waits with their events, fork and join
    cuda.clear()
    single = executor(cuda, [(5, []), (5, [0])], False)
    single.launch(main)
    assert [line[0] for line in cuda.log] == ["launch", "launch"], "one stream needs no event"


@BOTH
def test_each_call_fails_once_and_nothing_stays_behind(cuda: FakeCuda, composed: bool) -> None:
    spec: Spec = [(0, []), (1, [0]), (0, [1]), (2, [0, 1]), (1, [3])]
    graphs = [cuda.graph() for _ in spec]
    main = cuda.stream()

    def all_of_it() -> None:
        made = executor(cuda, spec, composed, graphs)
        try:
            made.upload(main)
            made.launch(main)
            made.launch(main)
        finally:
            made.close()

    cuda.fail_at(0)
    all_of_it()
    calls = cuda.calls
    assert calls > 10
    seen: set[str] = set()
    for n in range(1, calls + 1):
        cuda.fail_at(n)
        with pytest.raises(RuntimeError, match=r"^cuda\w+ failed for .+: cudaErrorUnknown \(999\), told to fail$") as e:
            all_of_it()
        cuda.fail_at(0)
        seen.add(str(e.value).split(":")[0])
        assert (cuda.alive, cuda.misuse, cuda.lib.fake_last_error()) == (0, 0, 0), str(e.value)
    if composed:
        nodes = {f"cudaGraphAddChildGraphNode failed for task 'task {i}'" for i in range(5)}
        round_calls = ("cudaGraphInstantiateWithFlags", "cudaGraphUpload", "cudaGraphLaunch")
        wanted = nodes | {f"{call} failed for a round of 5 tasks" for call in round_calls}
        wanted |= {"cudaGraphCreate failed for the round"}
    else:
        calls_of_each = ("cudaGraphInstantiateWithFlags", "cudaGraphUpload", "cudaGraphLaunch")
        wanted = {f"{call} failed for task 'task {i}'" for call in calls_of_each for i in range(5)}
        wanted |= {f"cudaStreamCreateWithFlags failed for stream {s}" for s in (1, 2)}
        wanted |= {f"cudaEventRecord failed for {part} of the round" for part in ("the start", "the end")}
        wanted |= {"cudaStreamWaitEvent failed for task 'task 4', which waits for task 'task 3'"}
    assert wanted <= seen


def test_a_loop_that_fails_on_the_way_leaves_nothing_running_behind_the_caller(cuda: FakeCuda) -> None:
    spec: Spec = [(0, []), (1, [0]), (2, [0]), (1, [2]), (0, [3])]
    graphs = [cuda.graph() for _ in spec]
    main = cuda.stream()
    made = executor(cuda, spec, False, graphs)
    cuda.fail_at(0)
    made.launch(main)
    for n in range(1, cuda.calls + 1):
        cuda.clear()
        cuda.fail_at(n)
        with pytest.raises(RuntimeError, match="told to fail"):
            made.launch(main)
        cuda.fail_at(0)
        ops = cuda.ops()
        launched = {i for i, op in enumerate(ops) if op.graph is not None}
        tail = cuda.tails.get(cuda.number(main))
        before = set() if tail is None else reach(ops)[tail] | {tail}
        assert launched <= before, f"call {n}"
    cuda.clear()
    made.launch(main)
    assert sum(op.graph is not None for op in cuda.ops()) == 5, "and it can be launched again"


@BOTH
@pytest.mark.parametrize(
    "spec, message",
    [
        ([], "none was given"),
        ([(0, [0])], r"number 0, 'task 0', waits for number 0, which is not before it"),
        ([(0, [1]), (1, [])], r"number 0, 'task 0', waits for number 1, which is not before it; give them in an order"),
        ([(0, []), (1, [-1])], "waits for number -1"),
        ([(0, []), (-2, [])], "'task 1', has stream -2"),
    ],
)
def test_bad_segments(cuda: FakeCuda, spec: Spec, message: str, composed: bool) -> None:
    cuda.fail_at(0)
    with pytest.raises(ValueError, match=message):
        executor(cuda, spec, composed)
    assert (cuda.calls, cuda.alive) == (0, 0), "they are looked at first"


@BOTH
def test_a_graph_that_is_not_there(cuda: FakeCuda, composed: bool) -> None:
    with pytest.raises(ValueError, match="'task 1', has no graph"):
        executor(cuda, [(0, []), (0, [])], composed, [cuda.graph(), 0])
    gone = 16  # no graph has such an address
    with pytest.raises(RuntimeError, match=r"failed for task 'task 1': cudaErrorInvalidValue \(1\), invalid argument"):
        executor(cuda, [(0, []), (0, [])], composed, [cuda.graph(), gone])
    assert cuda.alive == 0


@BOTH
def test_after_close(cuda: FakeCuda, composed: bool) -> None:
    made = executor(cuda, [(0, []), (1, [0])], composed)
    made.launch(0)
    made.close()
    made.close()
    assert (cuda.alive, made.nodes, made.edges) == (0, 2, 1)
    for use in (made.launch, made.upload):
        with pytest.raises(RuntimeError, match="the round was closed; compose it anew"):
            use(0)
    other = executor(cuda, [(0, []), (1, [0])], composed)
    assert cuda.alive > 0
    del other
    assert (cuda.alive, cuda.misuse) == (0, 0)


# -------------------------------------------------------------------------------------------------------------- runtime


def test_the_runtime_is_the_one_that_is_loaded(cuda: FakeCuda, tmp_path: Path) -> None:
    native: Any = _native._load()[0]
    assert cuda.runtime.version == 13000
    assert native.CudaRuntime(str(cuda.path), True).version == 13000
    other = tmp_path / "libother.so"
    shutil.copy(cuda.path, other)
    with pytest.raises(RuntimeError, match=r"this process has not loaded .*libother\.so; is PyTorch built for CUDA"):
        native.CudaRuntime(str(other), True)
    with pytest.raises(RuntimeError, match=r"nowhere\.so does not load"):
        native.CudaRuntime(str(tmp_path / "nowhere.so"), False)
    with pytest.raises(
        RuntimeError, match=r"neither libm\.so\.6 nor a library that .* has cudaRuntimeGetVersion, .*Destroy"
    ):
        native.CudaRuntime("libm.so.6", False)
    cuda.lib.fake_version(11020)
    with pytest.raises(RuntimeError, match=r"the CUDA runtime is version 11\.2; composed graphs need 11\.4"):
        native.CudaRuntime(str(cuda.path), True)
    cuda.lib.fake_version(12080)
    assert native.CudaRuntime(str(cuda.path), True).version == 12080
    cuda.fail_at(1)
    with pytest.raises(RuntimeError, match="cudaRuntimeGetVersion failed for the CUDA runtime"):
        native.CudaRuntime(str(cuda.path), True)


def test_a_library_stands_for_those_it_was_linked_with(cuda: FakeCuda, tmp_path: Path) -> None:
    """As libc10_cuda.so stands for the runtime that PyTorch uses, whatever other one was loaded."""
    native: Any = _native._load()[0]
    source, user = tmp_path / "user.cpp", tmp_path / "libuser.so"
    source.write_text('extern "C" int cudaGetLastError();\nint use() { return cudaGetLastError(); }\n')
    build(compiler(), "-shared", "-fPIC", "-o", user, source, cuda.path, f"-Wl,-rpath,{cuda.path.parent}")
    assert native.CudaRuntime(str(user), False).version == 13000


def test_under_a_sanitizer(cuda: FakeCuda, tmp_path: Path) -> None:
    program = tmp_path / "soak"
    build(
        compiler(), "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-I", CSRC,
        "-o", program, CSRC / "graph_executor.cpp", HERE / "graph_executor_soak.cpp", cuda.path,
        f"-Wl,-rpath,{cuda.path.parent}", "-ldl",
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["UBSAN_OPTIONS"] = "halt_on_error=1"
    done = subprocess.run([program, cuda.path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    scenarios, refused = (int(part.split()[0]) for part in done.stdout.split(","))
    assert scenarios > refused > 50


def test_cudas_own_headers_agree(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc in PATH")
    program = tmp_path / "real"
    build(
        nvcc, "-std=c++17", "-cudart", "static", "-I", CSRC, "-o", program, CSRC / "graph_executor.cpp",
        HERE / "real_cuda.cpp",
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert int(first.removeprefix("version ")) >= 11040
    if "launched" in rest:
        assert rest == ["launched"] * 2
    else:
        assert len(rest) == 1 and rest[0].startswith("refused: cudaGraphCreate failed for the round: cudaError")


def test_headers_of_cuda_12_agree() -> None:
    triton = pytest.importorskip("triton")
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (headers / "cuda_runtime_api.h").exists():
        pytest.skip("this Triton brings no headers of CUDA")
    build(compiler(), "-std=c++17", "-fsyntax-only", "-I", CSRC, "-isystem", headers, HERE / "real_cuda.cpp")
