"""`dump`: the batch that made a training go wrong, as a file to look at."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def dump(folder: Path, batches: list[Any], **about: Any) -> None:
    """Writes the tensors of ``batches`` to ``batch.safetensors`` and ``about`` to ``about.json``.

    Tensors are named ``{micro-batch}{path in the batch}``, such as ``0[0]`` for x of the first (x, y). A folder that
    cannot be written is a RuntimeWarning: the error that led here matters more.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
            if isinstance(leaf, Tensor):
                tensors[f"{i}{pytree.keystr(path)}"] = leaf.detach().cpu().contiguous().clone()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "batch.safetensors")
        (folder / "about.json").write_text(json.dumps({**about, "tensors": list(tensors)}, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the batch cannot be written to {folder} ({error})", RuntimeWarning, stacklevel=2)
