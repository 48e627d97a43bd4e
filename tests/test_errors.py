from __future__ import annotations

import pickle

import pytest

from fastlocal import errors
from fastlocal.errors import NonFiniteError, did_you_mean


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ArgumentError", ValueError),
        ("PartitionError", ValueError),
        ("IsolationError", ValueError),
        ("BackendError", RuntimeError),
        ("CheckpointError", RuntimeError),
        ("NonFiniteError", RuntimeError),
    ],
)
def test_each_error_is_the_builtin_a_caller_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), errors.FastLocalError)
    assert issubclass(getattr(errors, name), builtin)


def test_non_finite_error_keeps_its_fields_through_pickle() -> None:
    error = NonFiniteError("block 3 is not finite", block=3, name="layer2.0", step=7, updated=[0, 1])
    again = pickle.loads(pickle.dumps(error))
    for e in (error, again):
        assert (str(e), e.block, e.name, e.step, e.updated) == ("block 3 is not finite", 3, "layer2.0", 7, (0, 1))


def test_did_you_mean() -> None:
    methods = ["auglocal", "dgl", "infopro"]
    assert did_you_mean("auglcoal", methods) == 'Did you mean "auglocal"?'
    assert did_you_mean("DGL", methods) == 'Did you mean "dgl"?'
    assert did_you_mean("zzz", methods) == "Available: auglocal, dgl, infopro."
    assert did_you_mean("layer1.9", ["layer1.0", "layer1.1", "fc"]).startswith('Did you mean "layer1.')
    assert did_you_mean("x", []) == "There is none."
    many = [f"unit{i:02d}" for i in range(30)]
    assert did_you_mean("?", many).endswith("unit19, ... (30 in all).")
