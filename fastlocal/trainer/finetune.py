"""Fine-tuning: pretrained weights for the backbone, and blocks or modules that stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastlocal.blocks.block import Slot
from fastlocal.blocks.links import CopyLink
from fastlocal.engine.model import LocalModel
from fastlocal.errors import ArgumentError, CheckpointError, did_you_mean
from fastlocal.trainer import _files
from fastlocal.trainer import checkpoint as model_file

# --- freezing --------------------------------------------------------------------------------------------------------


def freeze(model: nn.Module, *names: int | str, norm: Literal["eval", "train"] = "eval") -> list[str]:
    """Keeps parameters as they are. Make the Engine or Trainer after it.

    Args:
        model: a `LocalModel`, or any network before it is localized.
        names: blocks by index (of a `LocalModel`; backbone and head, negative ones from the end), modules and parameters by
            name (``"layer1"`` is all of that module), or patterns (``"*.bias"``). The backbone's names do without
            ``backbone.``.
        norm: ``"eval"`` keeps BatchNorms whose parameters (or, without any, whose module) are frozen in eval mode, whatever
            ``model.train()`` says: their statistics are part of what stays. ``"train"`` leaves them alone.

    Returns:
        The names of the frozen parameters.

    Raises:
        ArgumentError: no name, one that is nowhere in the model, or a block that does not exist.
    """
    if norm not in ("eval", "train"):
        raise ArgumentError(f"norm: got {norm!r}; valid are 'eval', 'train'")
    if not names:
        raise ArgumentError("names: none given; name blocks, modules or parameters, such as freeze(model, 0, 'layer1')")
    slots, modules = _matching(model, names)
    for slot in slots:
        slot.value.requires_grad_(False)
    if norm == "eval":
        touched = {id(slot.module) for slot in slots} | modules
        for module in model.modules():
            frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
            if isinstance(module, _NormBase) and id(module) in touched and frozen and "train" not in vars(module):
                module.eval()
                module.train = _StaysInEval(module)  # type: ignore[method-assign,assignment]
    return [slot.name for slot in slots]


def unfreeze(model: nn.Module, *names: int | str) -> list[str]:
    """Takes `freeze` back, for everything if no name is given. Make a new Engine or Trainer after it.

    Returns:
        The names of the parameters that train again.

    Raises:
        ArgumentError: see `freeze`.
    """
    slots, modules = _matching(model, names or ("*",))
    slots = [slot for slot in slots if not slot.value.requires_grad and slot.value.is_floating_point()]
    if isinstance(model, LocalModel):
        copies = {id(slot.value) for link in model.links for slot in link.frozen}
        slots = [slot for slot in slots if id(slot.value) not in copies]
    for slot in slots:
        slot.value.requires_grad_(True)
    touched = {id(slot.module) for slot in slots} | modules
    for module in model.modules():
        if id(module) in touched and isinstance(vars(module).get("train"), _StaysInEval):
            del module.train
            module.train(model.training)
    return [slot.name for slot in slots]


class _StaysInEval:
    """Stands in for a module's ``train``. Copied and pickled with the module; its state_dict and class stay the same."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module


def _matching(model: nn.Module, names: tuple[int | str, ...]) -> tuple[list[Slot], set[int]]:
    """Slots of the parameters that ``names`` mean, in order, and the ids of the modules they mean."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected an nn.Module, got {type(model).__name__}")
    slots = list(_slots(model))
    paths = dict(model.named_modules())
    chosen: set[int] = set()
    modules: set[int] = set()
    for name in names:
        if isinstance(name, str):
            hit_modules = {id(m) for path, m in paths.items() if path and _means(name, path)}
            hit = {id(slot.value) for slot in slots if _means(name, slot.name)}
            if not hit and not hit_modules:
                known = [path.removeprefix("backbone.") for path in (*paths, *(slot.name for slot in slots)) if path]
                raise ArgumentError(f"names: nothing in the model is called {name!r}. {did_you_mean(name, known)}")
            chosen |= hit
            modules |= hit_modules
            continue
        if not isinstance(model, LocalModel) or not isinstance(name, int) or isinstance(name, bool):
            raise ArgumentError(
                f"names: got {name!r}; give names of modules or parameters"
                + (", or indices of blocks" * isinstance(model, LocalModel))
            )
        if not -len(model.blocks) <= name < len(model.blocks):
            raise ArgumentError(f"names: there is no block {name}; the model has {len(model.blocks)}, numbered from 0")
        block = model.blocks[name]
        chosen |= {id(p) for p in block.parameters()}
        modules |= {id(slot.module) for slot in (*block.buffer_slots(), *block.parameter_slots())}
    return [slot for slot in slots if id(slot.value) in chosen], modules


def _slots(model: nn.Module) -> Iterator[Slot]:
    """Every parameter once, under its first name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield Slot(f"{path}.{key}" if path else key, module, key)


def _means(name: str, path: str) -> bool:
    """Whether ``name`` is the path, a module around it, or a pattern of it; the backbone's with or without its prefix."""
    return any(
        own == name or own.startswith(f"{name}.") or fnmatchcase(own, name)
        for own in {path, path.removeprefix("backbone.")}
    )


# --- pretrained weights ----------------------------------------------------------------------------------------------

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_NESTED = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "weights")


@dataclass(frozen=True)
class Pretrained:
    """What `load_pretrained` did.

    Attributes:
        loaded: names, in the network, of what was loaded.
        missing: names that the network has and the source has not; their values stayed.
        left_out: names in the source that were not loaded, each with the reason.
    """

    loaded: list[str]
    missing: list[str]
    left_out: dict[str, str] = field(default_factory=dict)


def load_pretrained(
    net: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool | Literal["shapes"] = "shapes"
) -> Pretrained:
    """Copies a plain network's weights into the backbone, before or after `fastlocal.localize`: both give the same model.

    Args:
        net: the network, or a `LocalModel`, whose auxiliary heads stay as they are.
        source: a safetensors file, a file of `fastlocal.trainer.save` or a folder of a `CheckpointStore`, a file of
            ``torch.save`` (read with ``weights_only=True``), or a state_dict. A state_dict under a key such as
            ``"state_dict"`` is found, and the prefixes ``module.``, ``_orig_mod.``, ``model.`` and ``backbone.`` are taken off
            where the network has no such name.
        strict: ``"shapes"`` leaves out tensors of another shape (such as the classifier of another number of classes) and
            says so; True loads everything or nothing.

    Returns:
        `Pretrained`: what was loaded, what is missing, what was left out.

    Raises:
        ArgumentError: ``strict`` is neither, or ``source`` is of another type.
        CheckpointError: the file is missing, unreadable or damaged; nothing in it fits; or, with ``strict=True``, something is missing
            or left out. Nothing has been changed then.
    """
    if strict != "shapes" and strict is not True:
        raise ArgumentError(f"strict: got {strict!r}; valid are 'shapes', True")
    backbone = net.backbone if isinstance(net, LocalModel) else net
    if not isinstance(backbone, nn.Module):
        raise ArgumentError(f"net: expected an nn.Module, got {type(net).__name__}")
    own = {name: t for name, t in backbone.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    found: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for key, value in _tensors(source).items():
        name = _own_name(key, own)
        if name is None:
            left[key] = "the network has no such name"
        elif not isinstance(value, Tensor):
            left[key] = f"is {type(value).__name__}, not a tensor"
        elif name in found:
            left[key] = f"another tensor is loaded as {name}"
        elif value.shape != own[name].shape:
            left[key] = f"is {list(value.shape)}, the network's {list(own[name].shape)}"
        else:
            found[name] = value
    copies = _copies(net, own)
    for name, owner in copies.items():
        if name not in found and owner in found:
            found[name] = found[owner]
    have = {_place(own[name]) for name in found}
    missing = [name for name, value in own.items() if name not in found and _place(value) not in have]
    where = f"source: {source}" if isinstance(source, (str, Path)) else "source: the state_dict"
    if not found:
        why = next(iter(left.items()), None)
        raise CheckpointError(
            f"{where} has nothing that fits {type(backbone).__name__}" + (f"; {why[0]}: {why[1]}" if why else "")
        )
    if strict is True and (missing or left):
        texts = [f"it lacks {', '.join(missing)}"] if missing else []
        texts += [f"{name} {reason}" for name, reason in left.items()]
        raise CheckpointError(
            f"{where} does not fit {type(backbone).__name__}: {'; '.join(texts)}. strict='shapes' loads the rest"
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    return Pretrained([name for name in own if name in found], missing, left)


def _tensors(source: Any) -> Mapping[str, Any]:
    if isinstance(source, model_file.Checkpoint):
        return source.backbone()
    if isinstance(source, Mapping):
        return _state_dict(source)
    if not isinstance(source, (str, Path)):
        raise ArgumentError(f"source: got {type(source).__name__}; give a file or a state_dict")
    path = Path(source)
    if path.is_dir() and (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"source: there is no file {str(path)!r}")
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":  # zip, or the pickle of an older torch.save
        return _read_torch(path)
    return _read_safetensors(path)


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"source: {path} is damaged or holds more than weights ({error}); save net.state_dict() alone"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"source: {path} holds {type(content).__name__}; save net.state_dict() alone")
    return _state_dict(content)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        if model_file._KEY in _files.read_metadata(path):
            return model_file.read(path).backbone()
        return _files.read_tensors(path)
    except _files.UNREADABLE as error:
        raise CheckpointError(
            f"source: {path} is damaged, or neither a safetensors file nor one of torch.save ({error})"
        ) from error


def _state_dict(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict itself, also where it stands under a key beside other things."""
    for key in _NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return content


def _own_name(key: Any, own: Mapping[str, Any]) -> str | None:
    while isinstance(key, str) and key not in own:
        prefix = next((p for p in _PREFIXES if key.startswith(p)), None)
        if prefix is None:
            return None
        key = key.removeprefix(prefix)
    return key if isinstance(key, str) else None


def _copies(net: nn.Module, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of weights that were tied before localize and are read from a copy now, with the name of the owner."""
    if not isinstance(net, LocalModel):
        return {}
    names = {id(value): name for name, value in list(own.items())[::-1]}
    pairs = [
        (names.get(id(link.copy.value)), names.get(id(link.owner.value)))
        for link in net.links
        if isinstance(link, CopyLink)
    ]
    both = {a: b for a, b in pairs if a and b}
    return {**{b: a for a, b in both.items()}, **both}


def _place(value: Tensor) -> Any:
    """Equal for names that share one tensor; a tied weight need not be in the source twice."""
    return (value.data_ptr(), value.shape, value.stride()) if value.numel() else id(value)
