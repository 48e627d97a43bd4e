"""Ready optimizer factories: weight decay where it belongs, and rates by depth, block, or backbone and heads.

A factory makes the optimizer of one block from its ``[(name, parameter)]``, as `fastlocal.Engine` and `LocalOptimizer` want.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fastlocal.engine.model import LocalModel
from fastlocal.engine.optimizer import NamedParams
from fastlocal.errors import ArgumentError, did_you_mean

BlockRates = Sequence[float] | Callable[[int], float]

# Positions and tokens, under the names that timm, torchvision and Hugging Face give them (as a parameter or an embedding).
_TOKENS = {
    "cls_token", "class_token", "class_embedding", "dist_token", "distillation_token", "mask_token", "reg_token",
    "register_tokens", "pos_embed", "pos_embedding", "position_embedding", "position_embeddings",
    "absolute_pos_embed", "relative_position_bias_table", "wpe",
}  # fmt: skip
_OWN = ("no_decay", "layer_decay", "block_lr", "backbone_lr", "head_lr")


class Factory:
    """Makes one ``torch.optim`` optimizer per block, with a parameter group for each pair of rate and weight decay.

    Args:
        optimizer: class, such as ``torch.optim.RMSprop``.
        options: of the class (lr, weight_decay, ...). Groups take their rates as multiples of its ``lr``.
        no_decay: no weight decay for vectors and scalars (biases, norms), positions and class tokens, and (once bound)
            what the backbone's ``no_weight_decay()`` names, patterns included. False decays everything, as the
            papers of local learning do.
        layer_decay: layer-wise rates as in BEiT (Bao et al. 2022) and timm: of L units, unit i gets
            ``layer_decay ** (L - i)`` of the rate, what follows the last unit all of it (where nothing does, the last unit).
            An auxiliary head has the rate of its
            block's last unit. Parameters of the backbone outside any unit's module belong to the unit of their block
            that has no module of its own (a method such as ``stem``), else to the unit before them.
        block_lr: a multiplier for each block: a list, or a function of the block's index.
        backbone_lr, head_lr: multipliers for the backbone (its own classifier included) and for the auxiliary heads.

    With ``layer_decay`` or ``block_lr`` the model must be known: pass ``factory.bind(model)`` to the Engine. The
    Trainer binds by itself.

    Raises:
        ArgumentError: an option that does not exist or does not fit.
    """

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer],
        options: dict[str, Any],
        *,
        no_decay: bool = True,
        layer_decay: float | None = None,
        block_lr: BlockRates | None = None,
        backbone_lr: float = 1.0,
        head_lr: float = 1.0,
    ):
        if not isinstance(optimizer, type) or not issubclass(optimizer, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer: expected a class such as torch.optim.SGD, got {optimizer!r}")
        known = inspect.signature(optimizer).parameters
        for key in options:
            if key not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise ArgumentError(
                    f"{key}: {optimizer.__name__} has no such option. {did_you_mean(key, [*list(known)[1:], *_OWN])}"
                )
        if not isinstance(no_decay, bool):
            raise ArgumentError(f"no_decay: got {no_decay!r}; give True or False")
        if layer_decay is not None and not (_is_rate(layer_decay) and 0 < layer_decay <= 1):
            raise ArgumentError(f"layer_decay: got {layer_decay!r}; give a number above 0 and up to 1, such as 0.75")
        for name, value in (("backbone_lr", backbone_lr), ("head_lr", head_lr)):
            if not _is_rate(value):
                raise ArgumentError(f"{name}: got {value!r}; give a multiplier of lr from 0, such as 0.1")
        if block_lr is not None and not callable(block_lr) and not isinstance(block_lr, (list, tuple)):
            raise ArgumentError(
                f"block_lr: got {block_lr!r}; give a list of one multiplier a block, or a function of k"
            )
        self.optimizer, self.options = optimizer, options
        self.no_decay, self.layer_decay, self.block_lr = no_decay, layer_decay, block_lr
        self.backbone_lr, self.head_lr = backbone_lr, head_lr
        default = {key: p.default for key, p in known.items() if p.default is not p.empty}
        self._lr = options.get("lr", default.get("lr"))
        self._decays = bool(options.get("weight_decay", default.get("weight_decay")))
        if "lr" in options and not (_is_rate(self._lr) or isinstance(self._lr, torch.Tensor)):
            raise ArgumentError(f"lr: got {self._lr!r}; give a number from 0")

    def __call__(self, named: NamedParams) -> torch.optim.Optimizer:
        """The optimizer of one block. Raises ArgumentError where the model would have to be known: see `bind`."""
        for name in ("layer_decay", "block_lr"):
            if getattr(self, name) is not None:
                raise ArgumentError(f"{name}: needs to know the model; pass factory.bind(model)")
        return self._make(named, {}, ())

    def bind(self, model: LocalModel) -> BoundFactory:
        """A factory for the blocks of ``model``.

        Raises:
            ArgumentError: ``block_lr`` has not one multiplier from 0 for each block, or the units are not known, which
                ``layer_decay`` needs.
        """
        scales = {name: 1.0 for block in model.blocks for name, _ in block.named_parameters()}
        if self.layer_decay is not None:
            depths, top = unit_depths(model)
            scales = {name: self.layer_decay ** (top - depths[name]) for name in scales}
        if self.block_lr is not None:
            for k, rate in enumerate(self._block_rates(len(model.blocks))):
                for name, _ in model.blocks[k].named_parameters():
                    scales[name] *= rate
        named = getattr(model.backbone, "no_weight_decay", None)
        plain = tuple(f"backbone.{name}" for name in named()) if callable(named) else ()
        return BoundFactory(self, scales, plain)

    def _block_rates(self, count: int) -> list[float]:
        rates = [self.block_lr(k) for k in range(count)] if callable(self.block_lr) else list(self.block_lr or ())
        if len(rates) != count:
            raise ArgumentError(f"block_lr: has {len(rates)} multipliers, the model {count} blocks; give one for each")
        bad = [k for k, rate in enumerate(rates) if not _is_rate(rate)]
        if bad:
            raise ArgumentError(f"block_lr: got {rates[bad[0]]!r} for block {bad[0]}; give a number from 0")
        return rates

    def _make(self, named: NamedParams, scales: dict[str, float], plain: Sequence[str]) -> torch.optim.Optimizer:
        groups: dict[tuple[float, bool], NamedParams] = {}
        for name, p in named:
            scale = scales.get(name, 1.0) * (self.head_lr if name.startswith("heads.") else self.backbone_lr)
            decays = not (self._decays and self.no_decay and _is_plain(name, p, plain))
            groups.setdefault((scale, decays), []).append((name, p))
        made: list[dict[str, Any]] = []
        for (scale, decays), members in groups.items():
            group: dict[str, Any] = {"params": members}
            if scale != 1:
                if self._lr is None:
                    raise ArgumentError(
                        f"lr: multiples of it were asked for, but {self.optimizer.__name__} was given none"
                    )
                group["lr"] = self._lr * scale
            if not decays:
                group["weight_decay"] = 0.0
            made.append(group)
        return self.optimizer(made, **self.options)

    def __repr__(self) -> str:
        own = {key: getattr(self, key) for key in _OWN}
        text = ", ".join(f"{key}={value!r}" for key, value in {**self.options, **own}.items())
        return f"{self.optimizer.__name__}({text})"


class BoundFactory:
    """A `Factory` that knows the model: what `Factory.bind` returns."""

    def __init__(self, factory: Factory, scales: dict[str, float], plain: tuple[str, ...]):
        self.factory, self.scales, self.plain = factory, scales, plain

    def __call__(self, named: NamedParams) -> torch.optim.Optimizer:
        """The optimizer of one block. Raises ArgumentError for a parameter that the bound model does not have."""
        strange = [name for name, _ in named if name not in self.scales]
        if strange:
            raise ArgumentError(f"optimizer: is bound to a model without {strange[0]}; bind it to this one")
        return self.factory._make(named, self.scales, self.plain)

    def bind(self, model: LocalModel) -> BoundFactory:
        """The same options for another model."""
        return self.factory.bind(model)

    def __repr__(self) -> str:
        return repr(self.factory)


def factory(optimizer: type[torch.optim.Optimizer], **options: Any) -> Factory:
    """A `Factory` of any ``torch.optim`` class; ``options`` are the class's and those of `Factory`."""
    own = {key: options.pop(key) for key in _OWN if key in options}
    return Factory(optimizer, options, **own)


def sgd(
    lr: float, *, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 1e-4, **options: Any
) -> Factory:
    """SGD with Nesterov momentum (plain where ``momentum`` is 0). ``options``: those of `Factory` and of ``torch.optim.SGD``."""
    nesterov = nesterov and momentum > 0
    return factory(torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, **options)


def adamw(
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    **options: Any,
) -> Factory:
    """AdamW. ``options``: those of `Factory` and of ``torch.optim.AdamW``."""
    return factory(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_plain(name: str, p: nn.Parameter, plain: Sequence[str]) -> bool:
    """Whether weight decay leaves this parameter out."""
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return (
        p.dim() <= 1
        or name.endswith(".bias")
        or parts[-1] in _TOKENS
        or any(fnmatchcase(name, pattern) for pattern in plain)
    )


def unit_depths(model: LocalModel) -> tuple[dict[str, int], int]:
    """The unit that every trained parameter belongs to, by number, and the highest of these.

    What follows the last unit has the number behind the last; an auxiliary head has that of its block's last unit.

    Raises:
        ArgumentError: the backbone's units are not known.
    """
    units = [list(block.units) for block in model.blocks]
    if len(units) == 1 and units[0] == ["output"]:  # one block was never looked into
        units = [_own_units(model.backbone)]
    depths: dict[str, int] = {}
    first, count = 0, sum(len(names) for names in units)
    for block, names in zip(model.blocks, units, strict=True):
        last = block is model.blocks[-1]
        depths |= _backbone_depths(
            [name for name, _ in block.backbone_parameters()], names, first, count if last else None
        )
        first += len(names)
        depths |= {name: first - 1 for name, _ in block.named_parameters() if name not in depths}
    return depths, max(depths.values())


def _own_units(net: nn.Module) -> list[str]:
    if callable(getattr(net, "units", None)):
        return [name for name, _ in net.units()]  # type: ignore[operator]
    if isinstance(net, nn.Sequential):
        return [name for name, _ in net.named_children()]
    raise ArgumentError(
        f"layer_decay: the units of {type(net).__name__} are not known in one block; give it units(), or cut it into blocks"
    )


def _backbone_depths(params: list[str], units: list[str], first: int, after: int | None) -> dict[str, int]:
    """Unit numbers of one block's backbone parameters.

    Args:
        params: their names, in the order of definition.
        units: of the block.
        first: number of its first unit.
        after: number for what follows the last unit, in the last block.
    """

    def unit_of(param: str) -> int | None:
        inside = [i for i, unit in enumerate(units) if param.startswith(f"backbone.{unit}.")]
        return max(inside, key=lambda i: len(units[i])) if inside else None

    found = [unit_of(name) for name in params]
    methods = [i for i in range(len(units)) if i not in found]  # units without a module of their own
    depths: dict[str, int] = {}
    before: int | None = None
    for name, unit in zip(params, found, strict=True):
        if unit is not None:
            before = unit
            depths[name] = first + unit
        elif methods and (before is None or after is None):
            depths[name] = first + methods[0]
        elif after is not None:
            depths[name] = after
        else:
            depths[name] = first + (before or 0)
    return depths
