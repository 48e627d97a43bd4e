"""Image sets that fit in memory, and their batches. No download: scikit-learn's digits, or a NumPy file of yours."""

from fastlocal.data.batches import Batches
from fastlocal.data.images import Images, load

__all__ = ["Batches", "Images", "load"]
