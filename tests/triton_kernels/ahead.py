"""Compiles Triton kernels for devices that are not there, from the arguments of a real launch."""

from fastlocal.bench.ahead import SHARED_LIMIT, Recorder, Resources, compile_for, cuobjdump

__all__ = ["SHARED_LIMIT", "Recorder", "Resources", "compile_for", "cuobjdump"]
