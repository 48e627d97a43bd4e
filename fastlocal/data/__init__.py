"""Batches to train on. No download: image sets in memory from their published files, folders, or any loader of yours."""

from fastlocal.data.batches import Batches
from fastlocal.data.folder import FolderBatches, FolderImages
from fastlocal.data.huggingface import from_huggingface
from fastlocal.data.images import Images, load
from fastlocal.data.mixing import Mixing
from fastlocal.data.source import Source, as_source

__all__ = [
    "Batches",
    "FolderBatches",
    "FolderImages",
    "Images",
    "Mixing",
    "Source",
    "as_source",
    "from_huggingface",
    "load",
]
