"""The fused operators at sizes from a CIFAR head to ImageNet, each beside what its user has instead: one registry.

fastlocal.bench.gpu times these cases, fastlocal.bench.tune looks for better launch configurations on them, and
fastlocal.bench.kernels compiles the kernels that they launch. An operator joins by a class here and a line in `cases`.

A case makes inputs and names its rivals as functions of them. Every function returns the tensors that it computes: value
and gradients of a loss or layer, or what it has updated in place.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlocal as fl

EAGER = "eager"  # the base of every ratio
OURS = "fastlocal"
Inputs = tuple[Any, ...]
Call = Callable[..., Any]
Compile = Callable[..., Call]  # (function, mode=None)


class Variant(NamedTuple):
    """One way to compute a case. `make` may take long (compilers); `graph`: it can be captured in a CUDA graph."""

    make: Callable[[], Call]
    graph: bool = True


class Case(ABC):
    """An operator at one size."""

    operator: str  # in fastlocal.ops; its kernels stand in the module of that name without a trailing underscore
    dtype: torch.dtype

    @property
    @abstractmethod
    def size(self) -> str:
        """The shape, in short."""

    @property
    def name(self) -> str:
        return f"{self.operator} {self.size}, {str(self.dtype)[6:]}"

    @property
    def kernel(self) -> str:
        return self.operator.removesuffix("_")

    @abstractmethod
    def inputs(self, device: str) -> Inputs:
        """What the call takes, on that device."""

    @abstractmethod
    def must_move(self) -> int:
        """Bytes that no implementation can avoid to read and write."""

    @abstractmethod
    def ours(self, impl: str | None = None) -> Call:
        """The operator, forward and backward."""

    @abstractmethod
    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        """What there is without fastlocal, the first being plain eager PyTorch."""

    def variants(self, inputs: Inputs, compiled: Compile) -> dict[str, Variant]:
        """Rivals, and the operator as it is chosen and through ATen if it has that form."""
        found = self.rivals(compiled) | {OURS: Variant(lambda: self.ours())}
        if self.explain(inputs, "aten") == "aten":
            found[f"{OURS}, aten"] = Variant(lambda: self.ours("aten"))
        return found

    def explain(self, inputs: Inputs, impl: str | None = None) -> str | None:
        """The backend that serves a call; None if the one that is asked for cannot."""
        arguments, options = self.arguments(inputs)
        return fl.ops.explain(self.operator, *arguments, impl=impl, **options).chosen

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        """Those of the public function, as far as the choice of a backend looks at them."""
        return inputs, {}


def _layout(last: bool) -> str:
    return " channels_last" if last else ""


def _with_compiled(eager: Call, wrap: Callable[[Call], Call], compiled: Compile) -> dict[str, Variant]:
    """Eager, and the same through torch.compile in both modes. One is a graph of its own and is not captured again."""
    return {
        EAGER: Variant(lambda: wrap(eager)),
        "torch.compile": Variant(lambda: wrap(compiled(eager))),
        "torch.compile reduce-overhead": Variant(lambda: wrap(compiled(eager, mode="reduce-overhead")), graph=False),
    }


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _image(shape: Sequence[int], dtype: torch.dtype, last: bool, device: str) -> Tensor:
    x = torch.randn(*shape, device=device).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


# --- heads ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head(Case):
    """pool_linear_cross_entropy of features [rows, channels, side, side]: loss and all gradients."""

    rows: int
    channels: int
    side: int
    classes: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    operator = "pool_linear_cross_entropy"

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.channels}x{self.side}x{self.side} -> {self.classes}{_layout(self.channels_last)}"

    def inputs(self, device: str) -> Inputs:
        x = _image((self.rows, self.channels, self.side, self.side), self.dtype, self.channels_last, device)
        weight = (torch.randn(self.classes, self.channels, device=device) / self.channels**0.5).to(self.dtype)
        bias = torch.zeros(self.classes, device=device, dtype=self.dtype)
        return _leaf(x), _leaf(weight), _leaf(bias), torch.randint(self.classes, (self.rows,), device=device)

    def must_move(self) -> int:
        """Read features, parameters and targets, write the gradients; that of the features is one number a channel."""
        features = self.rows * self.channels * self.side**2
        small = 2 * (self.classes * self.channels + self.classes) + self.rows * self.channels
        return (features + small) * self.dtype.itemsize + 8 * self.rows

    def ours(self, impl: str | None = None) -> Call:
        def call(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
            got = fl.ops.pool_linear_cross_entropy_value_and_grad(
                x.detach(), weight.detach(), bias.detach(), target, impl=impl
            )
            return got[0], *got[2:]

        return call

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        found = _with_compiled(_divided_pool, _loss_and_gradients, compiled)
        found["eager, mean"] = Variant(lambda: _loss_and_gradients(_mean_pool))
        if hasattr(F, "linear_cross_entropy"):
            found["F.linear_cross_entropy"] = Variant(lambda: _loss_and_gradients(_torchs_own))
        return found


def _divided_pool(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The pool's gradient is divided while it is small, and then expanded without memory."""
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return F.cross_entropy(F.linear(pooled, weight, bias), target)


def _mean_pool(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x.mean((2, 3)), weight, bias), target)


def _torchs_own(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return F.linear_cross_entropy(pooled, weight, target, linear_bias=bias)  # type: ignore[attr-defined]


def _loss_and_gradients(loss_of: Call) -> Call:
    def call(*inputs: Any) -> Any:
        loss = loss_of(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, [t for t in inputs if _trained(t)])

    return call


def _trained(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad


# --- BatchNorm and what follows it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm(Case):
    """bn_act and bn_act_pool of [rows, channels, side, side], in training forward and backward, else forward."""

    operator: str
    rows: int
    channels: int
    side: int
    residual: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    training: bool = True

    @property
    def size(self) -> str:
        added = (" + residual" if self.residual else "") + ("" if self.training else " evaluated")
        return f"{self.rows}x{self.channels}x{self.side}x{self.side}{added}{_layout(self.channels_last)}"

    def inputs(self, device: str) -> Inputs:
        """x, the norm, the residual or None, and the gradient of the result."""
        shape = (self.rows, self.channels, self.side, self.side)
        x, residual, dy = (_image(shape, self.dtype, self.channels_last, device) for _ in range(3))
        norm = nn.BatchNorm2d(self.channels, device=device).train(self.training)
        if self.operator == "bn_act_pool":
            dy = torch.randn(self.rows, self.channels, device=device).to(self.dtype)
        return _leaf(x), norm, _leaf(residual) if self.residual else None, dy

    def must_move(self) -> int:
        """The input is read forward and backward and its gradient written; the residual likewise; bn_act also writes its
        result and reads its gradient."""
        maps = 3 + 3 * self.residual + 2 * (self.operator == "bn_act")
        if not self.training:
            maps = 1 + self.residual + (self.operator == "bn_act")
        return maps * self.rows * self.channels * self.side**2 * self.dtype.itemsize

    def ours(self, impl: str | None = None) -> Call:
        operator = getattr(fl.ops, self.operator)
        return self._wrapped(lambda x, norm, residual: operator(x, norm, residual, impl=impl))

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        eager = _norm_act_pool if self.operator == "bn_act_pool" else _norm_act
        return _with_compiled(eager, self._wrapped, compiled)

    def explain(self, inputs: Inputs, impl: str | None = None) -> str | None:
        with torch.set_grad_enabled(self.training):
            return super().explain(inputs, impl)

    def _wrapped(self, layer: Call) -> Call:
        return _layer_and_gradients(layer) if self.training else _layer_alone(layer)

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        return inputs[:3], {}


def _norm_act(x: Tensor, norm: nn.Module, residual: Tensor | None) -> Tensor:
    y = norm(x)
    return F.relu(y if residual is None else y + residual, inplace=True)


def _norm_act_pool(x: Tensor, norm: nn.Module, residual: Tensor | None) -> Tensor:
    return _norm_act(x, norm, residual).sum((2, 3)) / (x.shape[2] * x.shape[3])


@dataclass(frozen=True)
class NormConv(Case):
    """bn_act_conv: BatchNorm, ReLU and a 3x3 convolution to as many channels, forward and backward."""

    rows: int
    channels: int
    side: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    operator = "bn_act_conv"

    @property
    def kernel(self) -> str:
        return "bn_act"

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.channels}x{self.side}x{self.side}{_layout(self.channels_last)}"

    def inputs(self, device: str) -> Inputs:
        shape = (self.rows, self.channels, self.side, self.side)
        x, dy = (_image(shape, self.dtype, self.channels_last, device) for _ in range(2))
        conv = nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False, device=device, dtype=self.dtype)
        if self.channels_last:
            conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _leaf(x), nn.BatchNorm2d(self.channels, device=device), conv, dy

    def must_move(self) -> int:
        """The input twice, its gradient, the result and its gradient, once each."""
        return 5 * self.rows * self.channels * self.side**2 * self.dtype.itemsize

    def ours(self, impl: str | None = None) -> Call:
        operator = fl.ops.bn_act_conv  # type: ignore[attr-defined]
        return _layer_and_gradients(lambda x, norm, conv: operator(x, norm, conv, impl=impl))

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        return _with_compiled(lambda x, norm, conv: conv(F.relu(norm(x), inplace=True)), _layer_and_gradients, compiled)

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        return inputs[:3], {}


def _layer_alone(layer: Call) -> Call:
    def call(x: Tensor, norm: nn.Module, other: Any, dy: Tensor) -> Any:
        with torch.no_grad():
            return layer(x, norm, other)

    return call


def _layer_and_gradients(layer: Call) -> Call:
    """The result, and the gradients of the first input, of the parameters and of the third input, given the result's."""

    def call(x: Tensor, norm: nn.Module, other: Any, dy: Tensor) -> Any:
        y = layer(x, norm, other)
        leaves = [x, *norm.parameters()]
        leaves += [*other.parameters()] if isinstance(other, nn.Module) else [other] if _trained(other) else []
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return call


# --- updates ----------------------------------------------------------------------------------------------------------

RATE, MOMENTUM, DECAY, AVERAGE, MAX_NORM = 1e-3, 0.9, 1e-4, 0.999, 1.0


@functools.cache
def _sizes_of(model: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of a model's parameters."""
    with torch.device("meta"):
        net = fl.models.create(model)
    return tuple(tuple(p.shape) for p in net.parameters())  # type: ignore[union-attr]


BLOCK_OF_16 = ((16, 16, 3, 3), (16,), (16,), (16, 16, 3, 3), (16,), (16,), (10, 16), (10,))  # and its head


@dataclass(frozen=True)
class Update(Case):
    """ema_update_, fused_sgd_ (Nesterov) or fused_adamw_ over all parameters of a model; `average`: with an EMA."""

    operator: str
    of: str  # a model, or "block": a BasicBlock of 16 channels with its head
    average: bool = False
    clipped: bool = False  # by the norm of all gradients, and skipped where one is not finite
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> str:
        return f"of {self.of}{' + average' if self.average else ''}{' + clipped' if self.clipped else ''}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return BLOCK_OF_16 if self.of == "block" else _sizes_of(self.of)

    def inputs(self, device: str) -> Inputs:
        """Parameters, gradients, two lists of state, averages, and the optimizers of PyTorch that own the parameters."""

        def row(scale: float) -> list[Tensor]:
            return [(scale * torch.randn(s, device=device)).to(self.dtype) for s in self.shapes]

        params, grads, averages = row(1.0), row(1.0), row(1.0)
        first, second = row(0.0), row(0.0)
        for p, g in zip(params, grads):
            p.requires_grad_()
            p.grad = g
        return params, grads, first, second, averages, {}

    def must_move(self) -> int:
        lists = {"ema_update_": 3, "fused_sgd_": 5, "fused_adamw_": 7}[self.operator]
        if self.operator != "ema_update_":
            lists += 2 * self.average + self.clipped
        return lists * sum(torch.Size(s).numel() for s in self.shapes) * self.dtype.itemsize

    def ours(self, impl: str | None = None) -> Call:
        def call(params: Any, grads: Any, first: Any, second: Any, averages: Any, kept: Any) -> Any:
            with torch.no_grad():
                own = [p.detach() for p in params] if "own" not in kept else kept["own"]
                kept["own"] = own
                if self.operator == "ema_update_":
                    fl.ops.ema_update_(averages, own, AVERAGE, impl=impl)
                    return averages
                link: dict[str, Any] = {"averages": averages, "ema_decay": AVERAGE} if self.average else {}
                if self.clipped:
                    if "found_inf" not in kept:
                        kept["found_inf"] = torch.zeros((), device=own[0].device)
                    link |= {"max_norm": MAX_NORM, "found_inf": kept["found_inf"], "check": True}
                if self.operator == "fused_sgd_":
                    fl.ops.fused_sgd_(
                        own,
                        grads,
                        first,
                        lr=RATE,
                        momentum=MOMENTUM,
                        nesterov=True,
                        weight_decay=DECAY,
                        impl=impl,
                        **link,
                    )
                else:
                    if "steps" not in kept:
                        kept["steps"] = [torch.zeros((), device=p.device) for p in own]
                    fl.ops.fused_adamw_(
                        own, grads, first, second, kept["steps"], lr=RATE, weight_decay=DECAY, impl=impl, **link
                    )
                return [*own, *averages] if self.average else own

        return call

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        if self.operator == "ema_update_":
            return {
                EAGER: Variant(lambda: _average_each),
                "cached-list foreach": Variant(lambda: _average_foreach),
                "torch.compile of foreach": Variant(lambda: _compiled_average(compiled)),
            }
        found = {
            EAGER: Variant(lambda: self._optimizer(foreach=True)),  # what torch takes by itself on a GPU
            "fused=True": Variant(lambda: self._optimizer(fused=True)),
            OURS + ", as an optimizer": Variant(lambda: self._optimizer(own=True)),
        }
        if self.of == "block":  # compiling hundreds of tensors takes minutes
            found["torch.compile of foreach"] = Variant(lambda: self._optimizer(compiled, foreach=True))
        return found

    def _optimizer(self, compiled: Compile | None = None, own: bool = False, **form: Any) -> Call:
        """A step of an optimizer of each set of inputs, then its averages by cached lists."""

        def make(params: Any, averages: Any) -> Call:
            if self.operator == "fused_sgd_":
                cls: Any = fl.ops.FusedSGD if own else torch.optim.SGD
                options: dict[str, Any] = dict(momentum=MOMENTUM, nesterov=True)
            else:
                cls = fl.ops.FusedAdamW if own else torch.optim.AdamW
                options = {} if own or params[0].device.type == "cpu" else {"capturable": True}
            optimizer = cls(params, lr=RATE, weight_decay=DECAY, **options, **form)
            if own and self.clipped:
                optimizer.max_norm, optimizer.check = MAX_NORM, True
            if own and self.average:
                optimizer.link(zip(params, averages), AVERAGE)
            linked = self.average and not own

            def run() -> None:
                if self.clipped and not own:  # the gradients stay clipped; nothing looks whether they are finite
                    torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
                optimizer.step()
                if linked:
                    torch._foreach_lerp_(averages, params, 1 - AVERAGE)

            return run if compiled is None else compiled(run)

        key = f"{form}{own}{compiled is not None}"

        def call(params: Any, grads: Any, first: Any, second: Any, averages: Any, kept: Any) -> Any:
            if key not in kept:
                kept[key] = make(params, averages)
            with torch.no_grad():
                kept[key]()
            return [*params, *averages] if self.average else params

        return call

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        params, grads, first, second, averages, _ = inputs
        if self.operator == "ema_update_":
            return (averages, params), {}
        options: dict[str, Any] = {"lr": RATE} | ({"averages": averages} if self.average else {})
        if self.operator == "fused_sgd_":
            return (params, grads, first), options
        return (params, grads, first, second, [torch.zeros(()) for _ in params]), options


def _average_each(params: Any, grads: Any, first: Any, second: Any, averages: Any, kept: Any) -> Any:
    with torch.no_grad():
        for a, p in zip(averages, params):
            a.lerp_(p, 1 - AVERAGE)
    return averages


def _average_foreach(params: Any, grads: Any, first: Any, second: Any, averages: Any, kept: Any) -> Any:
    with torch.no_grad():
        torch._foreach_lerp_(averages, params, 1 - AVERAGE)
    return averages


def _compiled_average(compiled: Compile) -> Call:
    update = compiled(lambda averages, params: torch._foreach_lerp_(averages, params, 1 - AVERAGE))

    def call(params: Any, grads: Any, first: Any, second: Any, averages: Any, kept: Any) -> Any:
        with torch.no_grad():
            update(averages, params)
        return averages

    return call


# --- losses of pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs(Case):
    """supervised_contrastive_loss of [rows, dim], similarity_matching_loss of [rows, dim, side, side]."""

    operator: str
    rows: int
    dim: int
    side: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.dim}" + (f"x{self.side}x{self.side}" if self.side > 1 else "")

    def inputs(self, device: str) -> Inputs:
        shape = (self.rows, self.dim, self.side, self.side) if self.side > 1 else (self.rows, self.dim)
        x = torch.randn(*shape, device=device).to(self.dtype)
        return _leaf(x), torch.randint(10, (self.rows,), device=device)

    def must_move(self) -> int:
        return 2 * self.rows * self.dim * self.side**2 * self.dtype.itemsize + 8 * self.rows

    def _more(self) -> tuple[Any, ...]:
        return (0.07,) if self.operator == "supervised_contrastive_loss" else (10,)

    def ours(self, impl: str | None = None) -> Call:
        function = getattr(fl.ops, self.operator + "_value_and_grad")
        return lambda x, target: function(x.detach(), target, *self._more(), impl=impl)

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        plain = getattr(fl.reference, self.operator)
        return _with_compiled(lambda x, target: plain(x, target, *self._more()), _loss_and_gradients, compiled)

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        return (*inputs, *self._more()), {}


@dataclass(frozen=True)
class Loss(Case):
    """The losses in closed form of [rows, dim, side, side]: goodness, class goodness by groups of channels, a cosine head
    of 10 classes, and reconstruction."""

    operator: str
    rows: int
    dim: int
    side: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.dim}" + (f"x{self.side}x{self.side}" if self.side > 1 else "")

    def inputs(self, device: str) -> Inputs:
        shape = (self.rows, self.dim, self.side, self.side) if self.side > 1 else (self.rows, self.dim)
        x = _leaf(torch.randn(*shape, device=device).to(self.dtype))
        classes = torch.randint(10, (self.rows,), device=device)
        if self.operator == "goodness_loss":
            return x, classes < 5
        if self.operator == "reconstruction_loss":
            return x, torch.rand(*shape, device=device).to(self.dtype)
        if self.operator == "class_goodness_cross_entropy":
            return x, None, None, classes
        return x, _leaf(torch.randn(10, self.dim, device=device).to(self.dtype)), classes

    def must_move(self) -> int:
        """Features and their gradient; a reconstruction also reads the image."""
        maps = 3 if self.operator == "reconstruction_loss" else 2
        return maps * self.rows * self.dim * self.side**2 * self.dtype.itemsize

    def _options(self) -> dict[str, Any]:
        if self.operator == "class_goodness_cross_entropy":
            return {"num_classes": 10}
        if self.operator == "norm_linear_cross_entropy":
            return {"scale": 10.0, "normalize_weight": True}
        return {}

    def ours(self, impl: str | None = None) -> Call:
        function = getattr(fl.ops, self.operator + "_value_and_grad")
        first_gradient = 1 if self.operator == "reconstruction_loss" else 2

        def call(*inputs: Any) -> Any:
            plain = [t.detach() if _trained(t) else t for t in inputs]
            got = function(*plain, **self._options(), impl=impl)
            return got[0], *got[first_gradient:]

        return call

    def rivals(self, compiled: Compile) -> dict[str, Variant]:
        plain = getattr(fl.reference, self.operator)

        def loss(*inputs: Any) -> Tensor:
            value = plain(*inputs, **self._options())
            return value if isinstance(value, Tensor) else value[0]

        return _with_compiled(loss, _loss_and_gradients, compiled)

    def arguments(self, inputs: Inputs) -> tuple[Inputs, dict[str, Any]]:
        return inputs, self._options()


# --- the registry -----------------------------------------------------------------------------------------------------

_LOW: dict[str, Any] = dict(dtype=torch.bfloat16, channels_last=True)


def cases() -> tuple[Case, ...]:
    """The real sizes, the smallest of each operator first."""
    return existing(
        Head(128, 64, 8, 10),
        Head(128, 16, 32, 10),
        Head(1024, 64, 8, 10, **_LOW),
        Head(1024, 16, 32, 10),
        Head(1024, 16, 32, 10, **_LOW),
        Head(256, 512, 14, 1000, **_LOW),
        Head(256, 512, 7, 50_000),
        Norm("bn_act", 128, 16, 32),
        Norm("bn_act", 128, 64, 8, residual=True),
        Norm("bn_act", 1024, 16, 32, residual=True),
        Norm("bn_act", 1024, 16, 32, residual=True, **_LOW),
        Norm("bn_act", 256, 256, 14, residual=True, **_LOW),
        Norm("bn_act", 256, 256, 14, residual=True, training=False, **_LOW),
        Norm("bn_act_pool", 128, 64, 8),
        Norm("bn_act_pool", 1024, 16, 32),
        Norm("bn_act_pool", 256, 512, 14, **_LOW),
        NormConv(128, 16, 32),
        NormConv(1024, 64, 8, **_LOW),
        Update("fused_sgd_", "block"),
        Update("fused_sgd_", "block", clipped=True),
        Update("fused_sgd_", "resnet110", average=True),
        Update("fused_sgd_", "resnet50"),
        Update("fused_sgd_", "resnet50", average=True),
        Update("fused_adamw_", "block"),
        Update("fused_adamw_", "resnet50", average=True),
        Update("ema_update_", "resnet110"),
        Update("ema_update_", "resnet50"),
        Pairs("supervised_contrastive_loss", 128, 128),
        Pairs("supervised_contrastive_loss", 1024, 128),
        Pairs("similarity_matching_loss", 128, 256),
        Pairs("similarity_matching_loss", 128, 64, 8),
        Pairs("similarity_matching_loss", 1024, 16, 32),
        Pairs("similarity_matching_loss", 128, 256, 32),
        Loss("goodness_loss", 128, 64, 8),
        Loss("class_goodness_cross_entropy", 128, 160, 8),
        Loss("norm_linear_cross_entropy", 128, 512),
        Loss("reconstruction_loss", 128, 3, 32),
    )


def tiny_cases() -> tuple[Case, ...]:
    """The same code at sizes that a CPU does at once."""
    return existing(
        Head(3, 4, 5, 6),
        Head(4, 3, 2, 5, **_LOW),
        Norm("bn_act", 4, 3, 3),
        Norm("bn_act", 4, 3, 2, residual=True, **_LOW),
        Norm("bn_act", 4, 3, 2, residual=True, training=False),
        Norm("bn_act_pool", 4, 3, 3),
        NormConv(4, 3, 3),
        Update("fused_sgd_", "block"),
        Update("fused_sgd_", "block", average=True, clipped=True),
        Update("fused_adamw_", "block", average=True),
        Update("ema_update_", "block"),
        Pairs("supervised_contrastive_loss", 40, 5),
        Pairs("similarity_matching_loss", 6, 5, 2),
        Loss("goodness_loss", 6, 5, 2),
        Loss("class_goodness_cross_entropy", 6, 20, 2),
        Loss("norm_linear_cross_entropy", 6, 5),
        Loss("reconstruction_loss", 6, 3, 2),
    )


def existing(*wanted: Case) -> tuple[Case, ...]:
    """Those of operators that fastlocal.ops has."""
    return tuple(case for case in wanted if hasattr(fl.ops, case.operator))


def tensors(results: Any) -> list[Tensor]:
    """The tensors in a call's results, in order."""
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results for t in tensors(part)] if isinstance(results, (list, tuple)) else []


def disagreement(got: Any, wanted: Any) -> float:
    """The largest distance of a tensor from the wanted one, as a part of that one's norm; nan where one is not finite."""
    worst = 0.0
    for a, b in zip(tensors(got), tensors(wanted), strict=True):
        a, b = a.detach().double(), b.detach().double()
        distance = float((a - b).norm() / b.norm().clamp(min=1e-12)) if b.numel() else 0.0
        if distance != distance:
            return distance
        worst = max(worst, distance)
    return worst


def copied(inputs: Inputs) -> Inputs:
    """The same numbers in memory of their own: updates in place are compared from equal beginnings."""
    return copy.deepcopy(inputs)  # a parameter's gradient stays the tensor in the list of gradients
