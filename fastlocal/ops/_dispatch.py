"""Which implementation serves a call.

Every operator registers its implementations, best first, each with a check that returns why it cannot serve a call
of a given signature, or None. The choice is a pure function of (operator, signature, request) and cached, so it is
constant while a CUDA graph is captured. The request is read when the operator runs, also inside compiled code.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from fastlocal.errors import ArgumentError, BackendError, did_you_mean

# "reference" is the specification in fastlocal.reference; "aten" the same arithmetic in fewer ATen calls.
BACKENDS = ("auto", "native", "triton", "aten", "reference")

_log = logging.getLogger("fastlocal")
_request: ContextVar[str] = ContextVar("fastlocal_backend", default="auto")
_counting: ContextVar[bool] = ContextVar("fastlocal_counting", default=False)


class Candidate(NamedTuple):
    """One implementation of an operator; `reject(signature)` is the reason why it cannot serve, or None."""

    name: str
    reject: Callable[[Any], str | None]


class Choice(NamedTuple):
    """What serves a call (`chosen`, None if nothing can) and why each other backend does not."""

    operator: str
    requested: str
    chosen: str | None
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen or 'nothing'} (asked for {self.requested})"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.rejected])


class Platform(NamedTuple):
    """What a signature needs to know of a device: its type, and why Triton cannot run there (None: it can)."""

    device: str
    triton: str | None


class _Operator(NamedTuple):
    signature: Callable[..., Hashable]
    candidates: tuple[Candidate, ...]


_operators: dict[str, _Operator] = {}


def register(operator: str, signature: Callable[..., Hashable], candidates: Sequence[Candidate]) -> None:
    """Make an operator known. `signature` takes the arguments of the public function; `candidates` are best first."""
    _operators[operator] = _Operator(signature, tuple(candidates))


def check_backend(name: str, argument: str) -> None:
    """Raises ArgumentError unless `name` is a backend."""
    if name not in BACKENDS:
        raise ArgumentError(f"{argument}={name!r} is not a backend. {did_you_mean(str(name), BACKENDS)}")


def backend(name: str) -> AbstractContextManager[None]:
    """A context manager (or decorator) that forces a backend on every operator called in it.

    Args:
        name: "auto" (the best that can serve), "reference", "aten", "triton" or "native".

    The request belongs to the current thread and asyncio task; a thread started inside does not inherit it. A call
    that the backend cannot serve raises BackendError; "auto" falls back instead.

    Raises:
        ArgumentError: no such backend.
    """
    check_backend(name, "backend")
    return _forced(name)


@contextmanager
def _forced(name: str) -> Iterator[None]:
    token = _request.set(name)
    try:
        yield
    finally:
        _request.reset(token)


def where_it_exists(name: str) -> AbstractContextManager[None]:
    """As `backend`, for the operators that have this backend; the others choose as under "auto"."""
    check_backend(name, "backend")
    return _forced(f"{name}?")


def requested() -> tuple[str, bool]:
    """All that is asked for in this context, to compare with another time."""
    return _request.get(), _counting.get()


def _asked(operator: str) -> str:
    name = _request.get()
    if not name.endswith("?"):
        return name
    name = name[:-1]
    return name if any(candidate.name == name for candidate in _operators[operator].candidates) else "auto"


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, "auto" takes "aten" wherever an operator has it: the operators, saved tensors and (by
    `fastlocal.blocks.measure`) launches of a GPU step, with ATen's arithmetic, on any device.
    """
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


def fuses(device: torch.device) -> bool:
    """Whether code that can call either an operator or plain modules should call the operator.

    On a CUDA device, and wherever a backend was asked for. On a CPU the modules are as fast: a head's closed-form
    cross-entropy took 1.5 times as long.
    """
    name = _request.get().removesuffix("?")
    return name != "reference" and (device.type == "cuda" or name != "auto" or _counting.get())


@functools.lru_cache(maxsize=4096)
def select(operator: str, signature: Hashable, requested: str = "auto") -> Choice:
    """The backend for a call of that signature. Pure: no device is touched, nothing is read but the arguments."""
    chosen: str | None = None
    rejected = []
    candidates = _operators[operator].candidates
    for name, reject in candidates:
        reason = reject(signature)
        if reason is None and requested not in ("auto", name):
            reason = f'can serve this call, but "{requested}" was asked for'
        elif reason is None and chosen is not None:
            reason = f'can serve this call, but "{chosen}" is preferred'
        if reason is None:
            chosen = name
        else:
            rejected.append((name, reason))
    known = {name for name, _ in candidates}
    rejected += [(b, "this operator has no such implementation") for b in BACKENDS if b not in known | {"auto"}]
    return Choice(operator, requested, chosen, tuple(rejected))


def choose(operator: str, signature: Hashable, impl: str) -> str:
    """The name of the backend that must serve this call; `impl` other than "auto" overrides the context manager.

    Raises:
        BackendError: the one that was asked for cannot serve the call.
    """
    requested = impl if impl != "auto" else _asked(operator)
    if requested == "auto" and _counting.get() and select(operator, signature, "aten").chosen:
        requested = "aten"
    return _choose(operator, signature, requested)


@functools.lru_cache(maxsize=4096)
def _choose(operator: str, signature: Hashable, requested: str) -> str:
    choice = select(operator, signature, requested)
    if choice.chosen is not None:
        if (
            requested == "auto"
            and choice.chosen in ("aten", "reference")
            and getattr(signature, "device", "") == "cuda"
        ):
            _log.info("%s", choice)  # once for each signature, thanks to the cache
        return choice.chosen
    reasons = dict(choice.rejected)
    automatic = select(operator, signature).chosen
    remedy = f'impl="auto" or fl.backend("auto"), which takes "{automatic}" here' if automatic else "another operator"
    reason = reasons.get(requested, "; ".join(f"{name}: {why}" for name, why in choice.rejected))
    raise BackendError(f'{operator}: backend "{requested}" cannot serve this call: {reason}. Use {remedy}.')


def explain(operator: str | Callable, *args: Any, **kwargs: Any) -> Choice:
    """Which backend would serve `operator(*args, **kwargs)` now, and why the others would not.

    Args:
        operator: an operator of fastlocal.ops, or its name.
        args, kwargs: what it would be called with; nothing is computed.

    Returns:
        Choice; `chosen` is None where the backend that was asked for cannot serve, and str() of it is a short text.

    Raises:
        ArgumentError: no such operator.
    """
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", repr(operator))
    name = name.removesuffix("_value_and_grad")
    if name not in _operators:
        raise ArgumentError(f"operator={name!r} is not an operator of fastlocal.ops. {did_you_mean(name, _operators)}")
    impl = kwargs.pop("impl", None) or _asked(name)
    check_backend(impl, "impl")
    return select(name, _operators[name].signature(*args, **kwargs), impl)


def platform(device: torch.device) -> Platform:
    """The Platform of a device, cached."""
    return _platform(device.type, device.index, os.environ.get("TRITON_INTERPRET") == "1")


@functools.lru_cache(maxsize=64)
def _platform(device: str, index: int | None, interpret: bool) -> Platform:
    if importlib.util.find_spec("triton") is None:
        return Platform(device, "Triton is not installed (pip install triton)")
    if interpret:
        return Platform(device, None)
    if device != "cuda":
        return Platform(
            device,
            f"the tensors are on {device}: move them to a CUDA device (or, to debug a kernel, set TRITON_INTERPRET=1 "
            "before Python starts)",
        )
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return Platform(device, "the device is older than compute capability 8.0, which Triton needs")
    return Platform(device, None)
