"""Batches of every kind, and the targets that are refused."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from fastlocal.blocks.batch import check_target, first_tensor, split_call, unpack_batch
from fastlocal.errors import ArgumentError

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])


def test_pairs_and_longer_tuples() -> None:
    for batch in ((X, Y), [X, Y]):
        args, kwargs, target = unpack_batch(batch)
        assert args == (X,) and kwargs == {} and target is Y
    other = torch.ones(4)
    args, kwargs, target = unpack_batch((X, other, Y))
    assert args[0] is X and args[1] is other and len(args) == 2 and kwargs == {} and target is Y


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets"])
def test_mappings_name_their_target(key: str) -> None:
    for batch in ({"x": X, key: Y}, UserDict({"x": X, key: Y})):  # Hugging Face's BatchEncoding is a UserDict
        args, kwargs, target = unpack_batch(batch)
        assert args == () and list(kwargs) == ["x"] and kwargs["x"] is X and target is Y
        assert key in batch  # the caller's mapping is not changed


def test_token_ids_are_their_own_target_where_no_labels_are_given() -> None:
    ids = torch.randint(0, 9, (2, 5))
    for labels in ({}, {"labels": None}):
        args, kwargs, target = unpack_batch({"input_ids": ids, **labels})
        assert args == () and kwargs["input_ids"] is ids and target is ids
    args, kwargs, target = unpack_batch(ids)
    assert args[0] is ids and kwargs == {} and target is ids


@pytest.mark.parametrize(
    "batch, word", [("text", "str"), ((X,), "tuple"), ((), "tuple"), (3, "int"), ({"x": X}, "'x'"), (None, "NoneType")]
)
def test_a_batch_that_cannot_be_unpacked(batch: Any, word: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^batch: .*{word}.*batch=lambda b: \(args, kwargs, target\)"):
        unpack_batch(batch)


def test_a_module_call_carries_its_target_last_or_by_name() -> None:
    assert split_call((X,), {}) is None
    assert split_call((), {"x": X}) is None
    assert split_call((X, None), {}) is None
    assert split_call((X,), {"labels": None}) is None
    args, kwargs, target = split_call((X, Y), {}) or ((), {}, None)
    assert args == (X,) and kwargs == {} and target is Y
    args, kwargs, target = split_call((X,), {"labels": Y, "mask": X}) or ((), {}, None)
    assert args == (X,) and list(kwargs) == ["mask"] and target is Y


def test_first_tensor_goes_depth_first() -> None:
    assert first_tensor(({}, [1, (X,)], Y)) is X
    assert first_tensor({"a": "text", "b": Y}) is Y
    assert first_tensor(("text", None, 3)) is None


def test_in_a_mapping_the_main_input_comes_first_wherever_it_stands() -> None:
    mask = torch.ones(4, 3)
    assert first_tensor({"attention_mask": mask, "input_ids": X}) is X
    assert first_tensor(((), {"bool_masked_pos": mask, "pixel_values": X})) is X
    assert first_tensor({"attention_mask": mask, "input_ids": None, "inputs_embeds": X}) is X
    assert first_tensor({"b": Y, "a": X}) is Y


def test_good_targets() -> None:
    check_target(Y, 3, 4, dims=1)
    check_target(torch.tensor([0, -100]), 3, 2, dims=1)  # ignored
    check_target(torch.softmax(X, 1), 3, 4, dims=1)
    check_target(torch.zeros(2, 5, dtype=torch.int64), 3, 2, dims=2)
    check_target(torch.full((2, 5, 3), 1 / 3), 3, 2, dims=2)
    check_target(torch.tensor([7]), 3, 1, read=False)  # out of range, but nobody looks


@pytest.mark.parametrize(
    "target, dims, message",
    [
        ([0, 1, 2, 1], 1, r"tensor of class indices or probabilities, got list"),
        (torch.tensor([0, 1, 3, 1]), 1, r"run from 0 to 3 but the model has 3 classes \(0 to 2; -100 is ignored\); check the labels"),
        (torch.tensor([0, 1, -1, 1]), 1, r"run from -1 to 1 but the model has 3 classes"),
        (torch.tensor([0, -100, -1, 1]), 1, r"run from -100 to 1 but the model has 3 classes"),
        (Y.int(), 1, r"must be int64, got torch.int32; use target.long\(\)"),
        (Y.bool(), 1, r"must be int64, got torch.bool; use target.long\(\)"),
        (Y[:3], 1, r"holds 3 rows but the input holds 4; give one target per input"),
        (Y[:, None], 1, r"expected shape \[N\] for this network, got \[4, 1\]"),
        (Y, 2, r"expected shape \[N, T\] for this network, got \[4\]"),
        (torch.full((4, 2), 0.5), 1, r"probabilities \[N, 3\], got \[4, 2\] of torch.float32; for class indices use"),
        (Y.float(), 1, r"probabilities \[N, 3\], got \[4\] of torch.float32; for class indices use target.long\(\)"),
        (torch.full((4, 5, 3), 0.5), 1, r"expected shape \[N, 3\] for this network, got \[4, 5, 3\]"),
    ],
)  # fmt: skip
def test_refused_targets(target: Any, dims: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=r"^target: .*" + message):
        check_target(target, 3, 4, dims=dims)
