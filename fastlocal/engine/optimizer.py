"""`LocalOptimizer`: one ``torch.optim.Optimizer`` over the optimizers of all blocks."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError

NamedParams = list[tuple[str, nn.Parameter]]
OptimizerFactory = Callable[[NamedParams], torch.optim.Optimizer]

_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_HALF = (torch.bfloat16, torch.float16)
_FORMS = ("foreach", "fused", "capturable", "differentiable")  # options that choose an implementation


class LocalOptimizer(torch.optim.Optimizer):
    """K block optimizers behind the face of one: schedulers, state_dict and the step count see a single optimizer.

    Its ``param_groups`` are the block optimizers' own dicts, in block order, linked again after a load. Use it with level A in
    place of ``torch.optim.X(model.parameters())``; it is also what ``Engine.optimizer`` is.

    Args:
        model: a `LocalModel`.
        optimizer: called once per block with its ``[(name, parameter)]`` (those that require gradients), such as
            ``lambda named: torch.optim.AdamW(named, lr=1e-3)``.
        fused: lets SGD, Adam and AdamW run PyTorch's one-launch fused step where their caller chose neither ``foreach`` nor
            ``fused``. It rounds differently in the last bit.

    Raises:
        ArgumentError: the factory returns no optimizer, or one that misses or shares parameters.
    """

    def __init__(self, model: LocalModel, optimizer: OptimizerFactory, *, fused: bool = False):
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise ArgumentError(
                f"optimizer: expected a function from a block's [(name, param)] to an optimizer, got {type(optimizer).__name__}; "
                "write lambda named: torch.optim.SGD(named, lr=0.1)"
            )
        self.blocks: list[torch.optim.Optimizer | None] = []
        for block in model.blocks:
            named = [(n, p) for n, p in block.named_parameters() if p.requires_grad]
            self.blocks.append(self._make(optimizer, named, block.index) if named else None)
        if not any(self.blocks):
            raise ArgumentError("optimizer: no parameter of the model requires a gradient")
        if fused:
            for inner in self.blocks:
                _use_fused(inner)
        # Optimizer.__init__ would build new groups and count this class's steps twice; only its hooks are needed.
        self.defaults = next(o for o in self.blocks if o is not None).defaults
        self._link()
        self._init_hooks()

    @staticmethod
    def _make(factory: OptimizerFactory, named: NamedParams, k: int) -> torch.optim.Optimizer:
        inner = factory(named)
        if not isinstance(inner, torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer: returned {type(inner).__name__} for block {k}; return a torch.optim.Optimizer"
            )
        got = [id(p) for g in inner.param_groups for p in g["params"]]
        if sorted(got) != sorted(id(p) for _, p in named):
            raise ArgumentError(
                f"optimizer: the optimizer of block {k} holds {len(got)} parameters, but the block has {len(named)}; "
                "build it from exactly the named parameters it is given"
            )
        return inner

    def _init_hooks(self) -> None:
        for name in (
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
            "_optimizer_state_dict_pre_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        ):
            setattr(self, name, OrderedDict())

    def check_model(self, model: LocalModel) -> None:
        """Raises ArgumentError unless this optimizer trains every parameter of ``model`` in the block that owns it."""
        if len(self.blocks) != len(model.blocks):
            raise ArgumentError(
                f"optimizer: has {len(self.blocks)} blocks, the model {len(model.blocks)}; make it from this model"
            )
        for block, inner in zip(model.blocks, self.blocks, strict=True):
            held = set() if inner is None else {id(p) for g in inner.param_groups for p in g["params"]}
            missing = [n for n, p in block.named_parameters() if p.requires_grad and id(p) not in held]
            if missing:
                raise ArgumentError(
                    f"optimizer: block {block.index} of the model trains {missing[0]}, which this LocalOptimizer does not hold; "
                    "make it from this model"
                )

    def _link(self) -> None:
        self.param_groups = [g for inner in self.blocks if inner is not None for g in inner.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """Parameter -> state, over all blocks. A view built at each access: change the block optimizers' instead."""
        merged: dict[Any, Any] = defaultdict(dict)
        for inner in self.blocks:
            if inner is not None:
                merged.update(inner.state)
        return merged

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Steps every block's optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before_step()
        for k in range(len(self.blocks)):
            self.step_block(k)
        self.after_step()
        return loss

    def before_step(self) -> None:
        """Runs the hooks of ``register_step_pre_hook``. For an engine that steps block by block."""
        for pre in self._optimizer_step_pre_hooks.values():
            pre(self, (), {})

    def step_block(self, k: int) -> None:
        """Steps the optimizer of block k alone."""
        inner = self.blocks[k]
        if inner is not None:
            _fill_momentum(inner)
            inner.step()

    def after_step(self) -> None:
        """Runs the hooks of ``register_step_post_hook``."""
        for post in self._optimizer_step_post_hooks.values():
            post(self, (), {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        for inner in self.blocks:
            if inner is not None:
                inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ArgumentError(
            "add_param_group: which block the parameters belong to is not said; add them to .blocks[k] instead"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, and links ``param_groups`` again. Checks all blocks before it changes one."""
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ArgumentError(
                f"state_dict: has {len(groups)} parameter groups, this optimizer {len(self.param_groups)}; it comes from another number "
                "of blocks or another optimizer"
            )
        for i, (saved, own) in enumerate(zip(groups, self.param_groups, strict=True)):
            if len(saved["params"]) != len(own["params"]):
                raise ArgumentError(
                    f"state_dict: group {i} has {len(saved['params'])} parameters, this optimizer's {len(own['params'])}; "
                    "it comes from another model or method"
                )
        self._check_options(groups)
        at = 0
        for inner in self.blocks:
            if inner is None:
                continue
            part = groups[at : at + len(inner.param_groups)]
            at += len(part)
            ids = {i for g in part for i in g["params"]}
            # How an optimizer computes is this one's choice, not a part of what was trained.
            part = [
                {**g, **{key: own[key] for key in _FORMS if key in own}} for g, own in zip(part, inner.param_groups)
            ]
            inner.load_state_dict(
                {"param_groups": part, "state": {i: s for i, s in state_dict["state"].items() if i in ids}}
            )
        self._link()

    def _check_options(self, groups: list[dict[str, Any]]) -> None:
        at = 0
        for inner in self.blocks:
            for saved in groups[at : at + len(inner.param_groups)] if inner is not None else ():
                lacking = [key for key in inner.defaults if key not in saved and key not in _FORMS]  # type: ignore[union-attr]
                if lacking:
                    raise ArgumentError(
                        f"state_dict: its groups have no {lacking[0]!r}, which {type(inner).__name__} needs; it comes from another "
                        "optimizer"
                    )
            at += 0 if inner is None else len(inner.param_groups)

    def __repr__(self) -> str:
        inner = next(o for o in self.blocks if o is not None)
        return f"LocalOptimizer({len(self.blocks)} blocks of {type(inner).__name__}, {len(self.param_groups)} groups)"

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._link()
        self._init_hooks()


def _use_fused(inner: torch.optim.Optimizer | None) -> None:
    """Turns on the fused step of a block's optimizer where nothing was chosen and its parameters allow it."""
    if type(inner) not in _FUSED:
        return
    assert inner is not None
    for group in inner.param_groups:
        chosen = group.get("foreach") is not None or group.get("fused") is not None or group.get("differentiable")
        chosen = chosen or group.get("dampening")  # see _fill_momentum
        tensors: list[Tensor] = group["params"]
        if chosen or isinstance(group["lr"], Tensor) or not all(p.is_floating_point() for p in tensors):
            return
        if type(inner) is torch.optim.SGD and any(p.dtype in _HALF and p.device.type == "cpu" for p in tensors):
            return  # fused SGD leaves most of them as they are (pytorch issue 191763)
    for group in inner.param_groups:
        group["fused"] = True
    inner.defaults["fused"] = True
    inner._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # what the constructors of the fused forms set


def _fill_momentum(inner: torch.optim.Optimizer) -> None:
    """Gives fused SGD a momentum of zero where it has none yet: the same update (without dampening), in two cases where it fails.

    It refuses a parameter that takes part later than others of its group, and a first step that is skipped on the device
    leaves it with uninitialised memory.
    """
    if type(inner) is not torch.optim.SGD or len(inner.state) == sum(len(g["params"]) for g in inner.param_groups):
        return
    for group in inner.param_groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for p in group["params"]:
                if p.grad is not None and inner.state[p].get("momentum_buffer") is None:
                    inner.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
