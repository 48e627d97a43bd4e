"""The table of all methods: from the registry, the tests and the records, and as new as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastlocal as fl
from fastlocal.bench import ledger, methods, readme
from fastlocal.bench.methods import Line
from fastlocal.methods import list_methods

PAGE = methods.ROOT / "docs" / "methods_table.md"


def part_of(page: str, name: str) -> str:
    return page.split(f"<!-- begin: {name} -->\n")[1].split(f"\n<!-- end: {name} -->")[0]


def test_the_page_is_what_the_registry_the_tests_and_the_records_say() -> None:
    text = PAGE.read_text()
    assert part_of(text, "method_table") == methods.to_markdown(methods.method_rows(), 7)
    assert part_of(text, "method_costs") == methods.to_markdown(methods.cost_rows(), 2)
    assert readme.fill(text) == text


def test_every_registered_method_has_costs_and_a_row() -> None:
    """A new method fails here until `fastlocal bench methods --record` has counted it."""
    registered = {method["name"] for method in list_methods()}
    assert {line.method for line in methods.lines()} == registered
    names = {row[0].split("`")[1] for row in methods.method_rows()[1:]}
    assert names == registered
    anchors = (methods.ROOT / "docs" / "methods.md").read_text()
    assert all(f"\n## {name}\n" in anchors for name in registered)


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str], Line]:
    return {(line.method, line.net): line for line in methods.lines() if line.case.startswith("K")}


@pytest.mark.parametrize(
    ("method", "net"), [("lopt", "GPT"), ("solo", "GPT"), ("localmim", "masked ViT"), ("lakd", "R32")]
)
def test_recorded_costs_are_of_this_code(recorded: dict[tuple[str, str], Line], method: str, net: str) -> None:
    torch.set_num_threads(1)
    line, bp = recorded[method, net], methods.backprop(net)
    now = json.loads(json.dumps(methods.measure(method, methods.NETWORKS[net], bp).__dict__))
    for side in ("cost", "bp"):
        known = dict(getattr(line, side))
        for key in ("saved_bytes", "storage_bytes"):  # allocators may round bytes elsewhere
            assert known.pop(key) == pytest.approx(now[side].pop(key), rel=0.02)
        assert {**known, "by_op": 0} == {**now.pop(side), "by_op": 0}
    assert now == {key: value for key, value in line.__dict__.items() if key not in ("cost", "bp")}
    assert line.readout == "the network"


def test_a_method_that_is_registered_later_appears_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fl.methods.base, "_REGISTRY", {"bp": fl.methods.get_method("bp")})
    two = {name: methods.NETWORKS[name] for name in ("GPT", "masked ViT")}
    monkeypatch.setattr(methods, "NETWORKS", two)

    @fl.methods.register
    class Later(fl.methods.get_method("bp")):  # type: ignore[misc]
        name = "later"
        summary = "heads of tokens"
        isolated = True

        def prepare(self, blocks: int, units: int) -> int:
            return blocks

        def head(self, site: fl.methods.Site) -> torch.nn.Module:
            if not site.dense:
                raise fl.errors.ArgumentError("method: no tokens")
            return fl.blocks.heads.ClassifierHead(
                fl.blocks.heads.token_mlp(site.shape, site.num_classes, dense=True, hidden=0)
            )

    torch.set_num_threads(1)
    found = methods.record(tmp_path)
    assert [(line.method, line.net) for line in found] == [("bp", "GPT"), ("later", "GPT")]
    assert json.dumps([line.__dict__ for line in found]) == json.dumps(
        [line.__dict__ for line in methods.lines(tmp_path)]
    )
    bp, later = found
    assert bp.head_parameters == 0 and later.head_parameters == 3 * (128 * 256 + 256) and later.trained_blocks == 4
    assert later.cost["gradients"] > bp.cost["gradients"] and later.official is None
    monkeypatch.setattr(methods, "checked", lambda root: {"bp": methods.Checked(["a"]), "later": methods.Checked()})
    rows = methods.method_rows(tmp_path)
    assert [row[0].split("`")[1] for row in rows[1:]] == ["bp", "later"]
    assert rows[2][2:] == ["each block", "heads of tokens", "0.06 (GPT K4)", "the network", "own specification"]
    (_, _, cost) = methods.cost_rows(tmp_path)
    assert cost[:2] == ["GPT", "`later`, K4"] and cost[5] == cost[6] == "-" and cost[-1] == "1/1/0"


def test_what_isolates_what() -> None:
    found = {method["name"]: methods.isolation(method["name"]) for method in list_methods()}
    assert found["bp"] == "nothing: one block" and found["auglocal"] == "each block"
    assert found["hpff"] == found["mlaan"] == "each block; a loss reaches 2 blocks"
    assert found["dsn"] == found["localmim"] == "nothing: one backward of the sum of all losses"


def test_what_was_checked_is_what_the_tests_have() -> None:
    found = methods.checked()
    assert "auglocal_resnet32_K16_d2" in found["auglocal"].runs and len(found["man"].runs) == 2
    assert found["lopt"].numbers == ["lopt_llama"] and found["dgl"].numbers == [] and found["lakd"] == methods.Checked()
    assert methods.status(methods.Checked(["a", "b"], ["c"]), True) == (
        "2 official runs of three steps in float64, numbers of the official code (c)"
    )
    assert methods.status(methods.Checked(["a"]), True) == "1 official run of three steps in float64"
    assert methods.status(methods.Checked(), True) == "own specification; its official code was not run"
    assert methods.status(methods.Checked(), False) == "own specification"


def test_readout_tells_a_network_from_another_way_of_predicting() -> None:
    model, x, _ = methods.build("dgl", methods.NETWORKS["R32"], 2)
    assert ledger.readout(model, x) == "the network" and model.training
    forward = type(model).forward

    class Other(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = forward(self, *args, **kwargs)
            return out if self.training else out * 2

    model.__class__ = Other
    assert ledger.readout(model, x) == "the method's own"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split()[0] == "method" and "`mlaan`, MLAAN K54" in text
    assert methods.main(["--markdown"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert first == part_of(PAGE.read_text(), "method_table") and second == part_of(PAGE.read_text(), "method_costs")
