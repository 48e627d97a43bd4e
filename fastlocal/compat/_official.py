"""What the networks of ``fastlocal.compat`` share: official names, arguments and return values around a `LocalModel`.

How to write one::

    class LocalResNet(OfficialNetwork):
        def __init__(self, local_module_num, ...):                   # the official arguments
            super().__init__()
            net = models.resnet32(...)
            cuts = unit_names(net)[: local_module_num - 1]
            local = cut(net, recipe, cuts, image_size)               # a LocalModel in mode="official"
            register(self, net, "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc")
            for name, head in zip(cuts, local.heads):                # the official attributes, in the official order
                self.add_module(f"aux_classifier_{name}", holder(head=in_layout(head.net, ...)))
            init_convs_and_norms(self)                               # where the official code draws after building
            self._runs(local)                                        # last: checks that every parameter has a name here

        def forward(self, img, target=None, ixx_1=0, ...):
            if not self.training:
                return self._logits(img), ...
            self.set_loss_weights(ixx_1, ixy_1, ixx_2, ixy_2)
            out = self._step(img, target)                            # gradients are in .grad now, as officially
            return out.logits, out.losses[-1]

The `LocalModel` is no child of the network: it stands in ``__dict__`` and runs the very module objects (convolutions,
norms, linear layers) that are registered here under the official names. So ``parameters()``, ``state_dict()``, ``.to()``,
optimizers and checkpoints are the official ones, and deep copies and pickles keep the sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import ClassifierHead, InfoProHead, PredSimHead, Upsample
from fastlocal.blocks.losses import cross_entropy
from fastlocal.blocks.types import LocalLoss, StepContext
from fastlocal.engine.localize import localize
from fastlocal.engine.model import LocalModel
from fastlocal.engine.output import LocalOutput
from fastlocal.errors import ArgumentError
from fastlocal.methods import Method
from fastlocal.models.residual import BasicBlock, Bottleneck
from fastlocal.ops.modules import AvgPool


class OfficialNetwork(nn.Module):
    """Base of the networks: holds the `LocalModel` beside the registered modules and keeps the two in step."""

    _local: LocalModel
    _places: tuple[tuple[nn.Module, str, nn.Module], ...]

    @property
    def local(self) -> LocalModel:
        """The `LocalModel` that runs this network's modules, for `Engine`, DistributedDataParallel and `LocalModel.export`."""
        return self._local

    def set_loss_weights(self, ixx_1: float = 0, ixy_1: float = 0, ixx_2: float = 0, ixy_2: float = 0) -> None:
        """The weights that ``forward`` takes, for steps through `local`."""
        self._weigh((ixx_1, ixy_1), (ixx_2, ixy_2))

    def _weigh(self, first: tuple[float, float], last: tuple[float, float]) -> None:
        """Gives the heads their weights: (ixx, ixy) at the first and at the last of them."""
        heads = self._local.heads
        set_weights(heads, interpolated(len(heads), *first, *last))

    def _runs(self, local: LocalModel) -> None:
        """Takes ``local``; call it last in ``__init__``. Every parameter of it must be registered here by then."""
        own = {id(p) for p in self.parameters()}
        missing = [name for name, p in local.named_parameters() if id(p) not in own]
        if missing:
            raise AssertionError(f"{type(self).__name__} registers no official name for {missing}")
        run = {id(p) for p in local.parameters()}
        places = tuple(
            (parent, name, child)
            for parent in self.modules()
            for name, child in parent._modules.items()
            if child is not None and any(id(p) in run for p in child._parameters.values())
        )
        object.__setattr__(self, "_local", local)  # not as a child, whose names would be in the state_dict
        object.__setattr__(self, "_places", places)
        local.train(self.training)
        if self._on_cpu():
            # There the whole step is 1.1 to 1.4 times as fast for it; shapes and values of checkpoints are the same.
            self._lay_out(torch.channels_last)

    def _on_cpu(self) -> bool:
        return next(self.parameters()).device.type == "cpu"

    def _lay_out(self, memory_format: torch.memory_format) -> None:
        for p in self.parameters():
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=memory_format)
                if p.grad is not None:
                    p.grad = p.grad.contiguous(memory_format=memory_format)

    # --- a step, and a prediction ------------------------------------------------------------------------------------

    def _step(self, x: Tensor, target: Tensor | None, **kwargs: Any) -> LocalOutput:
        """A local step with its gradients added to ``.grad``, as the official code's inner ``backward()`` calls do.

        The output holds ``logits`` (detached), ``losses`` [K] and ``loss``, their sum.
        """
        if torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
            raise ArgumentError(
                f"model: {type(self).__name__} takes its gradients inside forward, where DistributedDataParallel cannot "
                "reduce them; wrap model.local instead: model.set_loss_weights(...), `out = ddp(x, y); out.loss.backward()`"
            )
        out = self._local_step(x, target, **kwargs)
        out.loss.backward()
        return out

    def _local_step(self, x: Tensor, target: Tensor | None, **kwargs: Any) -> LocalOutput:
        """The same before its ``out.loss.backward()``: for networks whose official forward leaves that to the script."""
        if target is None:
            raise ArgumentError(
                "target: a training step needs the labels of the batch; give target=, or call model.eval()"
            )
        self._check_modules()
        return self._local(x, target, return_logits=True, **kwargs)  # type: ignore[no-any-return]

    def _logits(self, x: Tensor) -> Tensor:
        """The backbone alone, with a graph where gradients are enabled. Heads are not run: they change nothing."""
        self._check_modules()
        return self._local.backbone(x)  # type: ignore[no-any-return]

    def _check_modules(self) -> None:
        for parent, name, child in self._places:
            if parent._modules.get(name) is not child:
                raise ArgumentError(
                    f"model: the module {name!r} ({type(child).__name__}) was replaced after construction (as "
                    "convert_sync_batchnorm does), which the local step would not see; load weights into the modules that are "
                    "there, or use fl.localize on a network of your own"
                )

    # --- what nn.Module does to its children, done to the LocalModel too ---------------------------------------------

    def train(self, mode: bool = True) -> OfficialNetwork:
        super().train(mode)
        if "_local" in self.__dict__:
            self._local.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OfficialNetwork:
        from_cpu = self._on_cpu()
        super()._apply(fn, recurse)
        if from_cpu and not self._on_cpu():
            self._lay_out(torch.contiguous_format)
        if recurse and "_local" in self.__dict__:
            done = set(self.modules())
            for module in self._local.modules():  # constants of heads, which have no official name
                if module not in done:
                    for key, value in module._buffers.items():
                        module._buffers[key] = None if value is None else fn(value)
            _refresh_constants(self._local)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise ArgumentError(
            f"model: {type(self).__name__} trains on one device, but DataParallel found several, on whose copies its local "
            "gradients would be lost; set CUDA_VISIBLE_DEVICES to one device, or run one process per device with "
            "DistributedDataParallel(model.local): `out = ddp(x, y); out.loss.backward()`"
        )


# --- building ---------------------------------------------------------------------------------------------------------


def unit_names(net: nn.Module) -> list[str]:
    """Names of the units of a network of ``fastlocal.models``, in order."""
    return [name for name, _ in net.units()]  # type: ignore[operator]


def cut(net: nn.Module, recipe: Method, cuts: Sequence[str], image_size: int) -> LocalModel:
    """``net`` as a `LocalModel` cut after the units ``cuts``, with the heads of ``recipe``."""
    like = next(net.parameters())
    sample = torch.zeros(2, 3, image_size, image_size, dtype=like.dtype, device=like.device)
    return localize(net, recipe, blocks=list(cuts), sample=sample)


def register(owner: nn.Module, net: nn.Module, *names: str) -> None:
    """Registers children of ``net`` in ``owner`` under their own names, in the order of ``names``."""
    for name in names:
        owner.add_module(name, net.get_submodule(name))


def encoders(net: nn.Module, names: Sequence[str], cuts: Sequence[str]) -> nn.ModuleList:
    """The ``Encoder_Net`` of MAN and its descendants: the residual units once more, block by block; a cut after the stem is none."""
    ends = [*(k for k in map(names.index, cuts) if k > 0), len(names) - 1]
    starts = [1, *(end + 1 for end in ends[:-1])]
    blocks = [[net.get_submodule(name) for name in names[a : b + 1]] for a, b in zip(starts, ends)]
    return nn.ModuleList([nn.Sequential(*units) for units in blocks])


def holder(**children: nn.Module) -> nn.Module:
    """A module without a forward that stands for an official one: a name for its children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules, in the order of registration; an `AvgPool` as the two that official code writes for it."""
    if isinstance(module, AvgPool):
        yield from (nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
    elif not module._modules:
        yield module
    else:
        for child in module.children():
            yield from leaves(child)


@torch.no_grad()
def _refresh_constants(local: LocalModel) -> None:
    """Means and deviations of images anew: what was rounded to float32 before a ``.double()`` would stay rounded."""
    for module in local.modules():
        if isinstance(module, InfoProHead):
            for buffer, values in zip((module.mean, module.std), module.normalisation, strict=True):
                buffer.copy_(torch.tensor(values, dtype=torch.float64).view_as(buffer))


def in_layout(chain: Iterable[nn.Module], *layout: nn.Module | None, also: Sequence[nn.Module] = ()) -> nn.Sequential:
    """The modules of ``chain`` as the official ``nn.Sequential`` has them, so that its indices name them.

    Without a ``layout`` they are taken one after another, an `AvgPool` as pool and flatten. A layout lists every index: None
    takes the next module of ``chain`` that has parameters, a module without parameters is put there as it is. ``also`` comes
    after all.
    """
    if not layout:
        members = [m for member in chain for m in (leaves(member) if isinstance(member, AvgPool) else (member,))]
        return nn.Sequential(*members, *also)
    weighted = [m for m in chain if any(True for _ in m.parameters())]
    if len(weighted) != layout.count(None):
        raise AssertionError(f"{layout.count(None)} places for {len(weighted)} modules with parameters")
    rest = iter(weighted)
    return nn.Sequential(*(next(rest) if place is None else place for place in layout), *also)


def init_convs_and_norms(module: nn.Module) -> None:
    """Convolution weights from N(0, sqrt(2 / (k * k * out_channels))), BatchNorm2d at 1 and 0; nothing else is redrawn."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


# --- the CIFAR networks of InfoPro and its descendants ----------------------------------------------------------------


def decoder_layout(decoder: nn.Sequential) -> nn.Sequential:
    """The official ``decoder``: without the resize, which comes before it, and with the sigmoid, which our loss computes."""
    return in_layout([m for m in decoder if not isinstance(m, Upsample)], also=[nn.Sigmoid()])


def stage_and_unit(name: str) -> str:
    """The end of official names: "stem" -> "0_0", "layer2.1" -> "2_1"."""
    return "0_0" if name == "stem" else name.removeprefix("layer").replace(".", "_")


def stem_width(wide_list: Sequence[int], heads: bool) -> int:
    """The first of ``wide_list``. Raises ArgumentError unless every stage doubles, and it is 16 where there are heads."""
    width = wide_list[0]
    if tuple(wide_list) != (width, width, 2 * width, 4 * width) or (heads and width != 16):
        raise ArgumentError(
            f"wide_list: got {tuple(wide_list)}; networks with heads have (16, 16, 32, 64), backprop (w, w, 2w, 4w)"
        )
    return width


# --- the ImageNet networks of InfoPro and its descendants -------------------------------------------------------------


def imagenet_backbone(
    block: type[BasicBlock] | type[Bottleneck],
    layers: Sequence[int],
    num_classes: int,
    groups: int = 1,
    width_per_group: int = 64,
    norm_layer: Callable[[int], nn.Module] | None = None,
) -> models.ResNet:
    """An ImageNet ResNet or ResNeXt, with norms made by ``norm_layer``. Raises ArgumentError for groups of a BasicBlock."""
    if (groups, width_per_group) != (1, 64) and block is not Bottleneck:
        raise ArgumentError("groups, width_per_group: a BasicBlock has 1 and 64")
    net = models.ResNet(block, layers, num_classes=num_classes, groups=groups, width_per_group=width_per_group)
    if norm_layer is not None:
        for parent in list(net.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    parent.add_module(name, norm_layer(child.num_features))
    return net


def init_residuals(net: nn.Module) -> None:
    """Zeroes the last norm of every residual branch."""
    for m in net.modules():
        if isinstance(m, BasicBlock | Bottleneck):
            nn.init.zeros_((m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight)


# --- loss weights -----------------------------------------------------------------------------------------------------


class TaskHead(ClassifierHead):
    """A classification head whose cross-entropy has a weight that may change between calls.

    Its loss is the plain cross-entropy, whatever the task loss of the last block is. With ``keep`` the class scores of the
    latest step stay in ``scores`` until they are taken.
    """

    def __init__(self, net: nn.Module, *, keep: bool = False) -> None:
        super().__init__(net)
        self.keep = keep
        self.scores: Tensor | None = None

    def forward(self, h: Tensor, ctx: StepContext) -> LocalLoss:
        if self.keep:
            logits = self.net(h)
            self.scores = logits.detach()
            return LocalLoss.of(("task", cross_entropy(logits, ctx.target), self.weight), logits=logits)
        return super().forward(h, ctx)

    def take_scores(self) -> Tensor | None:
        """The class scores of the latest step, once."""
        scores, self.scores = self.scores, None
        return scores


def interpolated(heads: int, ixx_1: float, ixy_1: float, ixx_2: float, ixy_2: float) -> list[tuple[float, float]]:
    """(ixx, ixy) of each of ``heads`` heads, linear from the first to the last."""
    ratios = [k / (heads - 1) if heads > 1 else 0.0 for k in range(heads)]
    return [(ixx_1 * (1 - r) + ixx_2 * r, ixy_1 * (1 - r) + ixy_2 * r) for r in ratios]


def set_weights(heads: Iterable[nn.Module], weights: Iterable[tuple[float, float]]) -> None:
    """Gives heads their (ixx, ixy): the weights of the image or similarity loss and of the label loss."""
    for head, (ixx, ixy) in zip(heads, weights, strict=True):
        if isinstance(head, InfoProHead):
            head.weights = (ixx, ixy)
        elif isinstance(head, PredSimHead):
            head.weights = (ixy, ixx)
        elif isinstance(head, TaskHead):
            head.weight = ixy
        else:
            raise TypeError(f"{type(head).__name__} has no loss weights")


# --- features ---------------------------------------------------------------------------------------------------------


@contextmanager
def unit_outputs(units: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects, inside, the input of the first of ``units`` and the output of each, detached, in the order they run."""
    found: list[Tensor] = []
    handles = [units[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))]
    handles += [unit.register_forward_hook(lambda _m, _i, output: found.append(output.detach())) for unit in units]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
