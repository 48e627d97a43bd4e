"""The registry of operators and rivals: all compute the same, and the bytes that must move are those of the tensors."""

from __future__ import annotations

import pytest
import torch

import fastlocal as fl
from fastlocal.bench import operators
from fastlocal.bench.device import Cpu

CASES = operators.tiny_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rivals_compute_the_same(case: operators.Case) -> None:
    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    variants = case.variants(inputs, Cpu().compiled)
    assert next(iter(variants)) == operators.EAGER
    before = [t.detach().clone() for t in operators.tensors(list(inputs))]
    wanted = variants[operators.EAGER].make()(*operators.copied(inputs))
    assert all(map(torch.equal, before, operators.tensors(list(inputs)))), "copies share memory"
    bound = 1e-5 if case.dtype == torch.float32 else 3e-2
    for name, variant in variants.items():
        got = variant.make()(*operators.copied(inputs))
        assert len(operators.tensors(got)) == len(operators.tensors(wanted)) > 0
        assert operators.disagreement(got, wanted) <= bound, name
    changed = [2.0 * t for t in operators.tensors(wanted)]
    assert operators.disagreement(changed, wanted) == pytest.approx(1.0)


def test_disagreement_of_what_is_not_finite() -> None:
    one = torch.ones(3)
    assert operators.disagreement([one, one / 0], [one, one]) > 1e9
    assert not operators.disagreement(one * float("nan"), one) <= 1e9


def test_bytes_that_must_move() -> None:
    def size(tensors: object) -> int:
        return sum(t.numel() * t.element_size() for t in operators.tensors(tensors))

    head = operators.Head(3, 4, 5, 6)
    x, weight, bias, target = head.inputs("cpu")  # the gradient of the features is one number per pooled value
    assert head.must_move() == size([x, weight, bias, target]) + size([x[:, :, 0, 0], weight, bias])
    norm = operators.Norm("bn_act", 4, 3, 5, residual=True, dtype=torch.bfloat16)
    x, _, residual, dy = norm.inputs("cpu")
    assert norm.must_move() == 2 * size([x, residual]) + size([x, dy]) + size([x, residual])
    pool = operators.Norm("bn_act_pool", 4, 3, 5)
    assert pool.must_move() == 3 * size(pool.inputs("cpu")[0])
    for operator, reads_and_writes in (("ema_update_", 3), ("fused_sgd_", 5), ("fused_adamw_", 7)):
        update = operators.Update(operator, "block")
        assert update.must_move() == reads_and_writes * size(update.inputs("cpu")[0])
    assert operators.Update("fused_sgd_", "block", average=True).must_move() == 7 * size(update.inputs("cpu")[0])


def test_every_operator_has_a_case() -> None:
    assert {c.operator for c in CASES} == {n for n in fl.ops._dispatch._operators}


def test_real_and_tiny_cases_are_of_the_same_operators() -> None:
    assert {c.operator for c in operators.cases()} == {c.operator for c in CASES}
    assert len({c.name for c in operators.cases()}) == len(operators.cases())
    head = operators.Head(256, 512, 7, 50_000)
    assert head in operators.cases() and head.must_move() > 2 * 50_000 * 512 * 4
