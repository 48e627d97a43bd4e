"""The pages are true: their code runs, what they name exists, their tables are the records, and their steps work."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlocal as fl
from fastlocal.bench import readme
from fastlocal.errors import ArgumentError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = ("add_a_method.md", "add_an_operator.md")  # their code is followed in a copy of the tree instead

# A fence, with the comment before it: "needs: PACKAGES", "not run: WHY", "file: PATH", "export: PATH", "run".
FENCE = re.compile(r"(?:<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(page: Path, language: str | None = None) -> list[re.Match[str]]:
    return [m for m in FENCE.finditer(page.read_text()) if language is None or m["language"] == language]


def test_fences_are_found() -> None:
    text = "<!-- needs: torch -->\n```python\na = 1\n```\n\ntext\n\n```\nls\n```\n"
    found = [(m["note"], m["language"], m["code"]) for m in FENCE.finditer(text)]
    assert found == [("needs: torch", "python", "a = 1\n"), (None, "", "ls\n")]
    for page in PAGES:
        assert 2 * len(fences(page)) == len(re.findall(r"^```", page.read_text(), re.M)), page


# ------------------------------------------------------------------------------------------------------------- the code


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred digits in place of 1,400; other sets as they are."""
    pytest.importorskip("sklearn")
    load = fl.data.load
    images = load("digits")
    few = dataclasses.replace(images, x_train=images.x_train[:100], y_train=images.y_train[:100])
    monkeypatch.setattr(fl.data, "load", lambda name, **options: few if name == "digits" else load(name, **options))


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in GUIDES and fences(p, "python")], ids=lambda p: p.name
)
def test_python_runs(
    page: Path, few_digits: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page run one after another, as a reader would type them; what they write goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    ran = 0
    for block in fences(page, "python"):
        kind, _, rest = (block["note"] or "").partition(": ")
        if kind == "not run":
            assert rest
            continue
        if kind == "needs" and any(importlib.util.find_spec(package) is None for package in rest.split()):
            continue
        line = page.read_text()[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], str(page), "exec"), names)
        ran += 1
    assert ran
    for model in (value for value in names.values() if isinstance(value, fl.LocalModel)):
        assert all(torch.isfinite(p).all() for p in model.parameters())


@by_page
def test_python_parses(page: Path) -> None:
    for block in fences(page, "python"):
        ast.parse(block["code"])


@by_page
def test_public_names_exist(page: Path) -> None:
    """``fl.x`` and ``fastlocal.x.y`` in prose and code."""
    for dotted in set(re.findall(r"\b(?:fl|fastlocal)((?:\.[A-Za-z_]\w*)+)", page.read_text())):
        if dotted.endswith((".py", ".md")):
            continue
        value: Any = fl
        for k, part in enumerate(dotted[1:].split(".")):
            if not hasattr(value, part):
                name = "fastlocal" + ".".join(["", *dotted[1:].split(".")[: k + 1]])
                if name.split(".")[-1] in ("linear_probe", "mean_square_goodness"):
                    break  # what the guides add
                value = importlib.import_module(name)
            else:
                value = getattr(value, part)


# ---------------------------------------------------------------------------------------------------- commands and links


def commands(page: Path) -> list[str]:
    """Lines of shell blocks, and code spans that are commands; in the guides the words in <> are left out."""
    lines = [line for m in fences(page, "") for line in m["code"].splitlines()]
    prose = FENCE.sub("", page.read_text())
    lines += re.findall(r"`((?:make|python|fastlocal|\.venv/bin/\w+) [^`\n]+)`", prose)
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def help_of(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--help"])
    assert left.value.code == 0, arguments
    return capsys.readouterr().out


@by_page
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands(page):
        words = command.split()
        program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
        flags = {word.partition("=")[0] for word in rest if word.startswith("--")}
        known: str | None = None
        if program == "make":
            assert rest[0] in targets, command
            for path in re.findall(r"tests/[\w/.]+", command):
                assert (ROOT / path).exists() or path.endswith(("linear_probe.py", "mean_square_goodness.py")), command
        elif program == "python" and rest[0] == "-m" and rest[1].startswith("fastlocal."):
            known = help_of(importlib.import_module(rest[1]).main, [], capsys)
        elif program == "python" and rest[0].endswith(".py"):
            known = (ROOT / rest[0]).read_text()
        elif program == "python":
            assert rest[0] == "-c", command
        elif program == "fastlocal":
            known = help_of(importlib.import_module("fastlocal.cli").main, rest[:1], capsys)
        else:
            assert program in ("ruff", "pip") or command.startswith((".ci/run", "FASTLOCAL_BUILD_EXT")), command
        if known is not None:
            assert all(flag in known for flag in flags), f"{command}: {flags} in {known}"


def test_what_is_no_command_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    for line in (
        "make nothing",
        "python -m fastlocal.info --no-such-flag",
        "fastlocal train --no-such-flag",
        "spell x",
    ):
        page.write_text(f"```\n{line}\n```\n")
        with pytest.raises(AssertionError):
            test_commands_exist(page, capsys)


def test_what_does_not_exist_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, check, error in (
        ("`fl.no_such_name(x)`", test_public_names_exist, ImportError),
        ("fastlocal.engine.Nothing", test_public_names_exist, ImportError),
        ("[text](nothing.md)", test_links_resolve, AssertionError),
        ("[text](#no-heading)", test_links_resolve, AssertionError),
        ("`fastlocal/nothing.py`", test_files_exist, AssertionError),
        ("`tests/test_info.py::test_nothing`", test_files_exist, AssertionError),
    ):
        page.write_text(f"# Heading\n\n{text}\n")
        with pytest.raises(error):
            check(page)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@by_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


@by_page
def test_files_exist(page: Path) -> None:
    """Paths in code spans, and tests named as ``file::test``."""
    prose = FENCE.sub("", page.read_text())
    folders = "fastlocal|triton_kernels|csrc|bench|tests|docs|examples"
    for path, test in re.findall(rf"`((?:{folders})/[\w/.]*)(?:::(\w+))?`", prose):
        if path.startswith("bench/results"):  # records come and go; the tables are compared below
            continue
        assert (ROOT / path).exists(), path
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_the_invariants_are_named_with_their_tests() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Invariants")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 20 and all("::test_" in row for row in rows)


def test_the_drawing_is_well_formed_and_stands_alone() -> None:
    import xml.etree.ElementTree as tree

    root = tree.parse(ROOT / "docs" / "architecture.svg").getroot()
    assert root.tag.endswith("svg") and root.get("viewBox")
    texts = [(e.text or "").split(" · ") for e in root.iter() if e.tag.endswith("text")]
    drawn = next(names for names in texts if "auglocal" in names)
    assert set(drawn) <= {method["name"] for method in fl.list_methods()}
    assert not [e for e in root.iter() if any("href" in key for key in e.attrib)]  # nothing is fetched


# ------------------------------------------------------------------------------------------------------ generated parts


@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_tables_are_the_records(page: Path) -> None:
    assert readme.fill(page.read_text()) == page.read_text(), "run python -m fastlocal.bench.readme"


def test_the_readme_has_every_part() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"<!-- begin: {name} -->" in text for name in ("demo", "ledger", "step_time", "papers"))


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in text, f"link docs/{page.name} in README.md"


def test_no_claim_about_gpus_outlives_a_measurement() -> None:
    measured = list((ROOT / "bench" / "results").glob("*gpu*"))
    assert not (measured and "nothing in this version has been run on a GPU" in (ROOT / "README.md").read_text())


def test_numbers_of_the_demo_stand_in_the_readme() -> None:
    """Read back from the page, not generated again."""
    path = ROOT / "bench" / "results" / "demo.json"
    if not path.exists():
        assert "No run is recorded here yet. `make demo`" in (ROOT / "README.md").read_text()
        return
    part = (ROOT / "README.md").read_text().partition("<!-- begin: demo -->")[2].partition("<!-- end: demo -->")[0]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line[:2] == "| "]
    rows = {(c[0], c[2]): c for c in cells}
    for row in json.loads(path.read_text())["rows"]:
        shown = rows[row["method"], row["loop"]]
        numbers = [float(cell.strip("%").replace(",", "")) for cell in (shown[1], *shown[3:])]
        exact = [row["blocks"], 100 * row["test_accuracy"], row["steps_per_second"], row["launches"], row["saved_mib"]]
        assert numbers == pytest.approx(exact, abs=0.051), (row, shown)
    assert (ROOT / "docs" / "demo.png").read_bytes()[:4] == b"\x89PNG" and "docs/demo.png" in part


RECORDS: dict[str, Any] = {
    "demo.json": {
        "command": "python -m fastlocal.bench.demo --epochs 1",
        "machine": {"cpu": "A CPU", "threads": 1, "torch": "2.13.0"},
        "training_seconds": 61.2,
        "notes": ["plain: the plain loop"],
        "rows": [
            {"method": "DGL", "loop": loop, "blocks": 10, "batch_size": 64, "test_accuracy": 0.9512,
             "steps_per_second": 12.34, "launches": launches, "saved_mib": 0.75}
            for loop, launches in (("plain", 1160), ("fastlocal", 1081))
        ],
    },
    "ledger.json": {
        "batch": 8,
        "torch": "2.13.0",
        "rows": [
            {"name": name, "batch": 8, "official": official,
             "plain": {"gradients": 912, "optimizer": 29, "safety": 0},
             "engine": {"gradients": 799, "optimizer": 14, "safety": 38, "macs": 8 * 174_200_000, "saved_bytes": 8 * 576_717}}
            for name, official in (("R32 AugLocal", {"launches": 951, "saved_mib": 0.55}), ("R32 unpublished", None))
        ],
    },
}  # fmt: skip


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for name, record in RECORDS.items():
        (results / name).write_text(json.dumps(record))
    case = {"model": "resnet110", "method": "auglocal", "blocks": 55, "option": ["depth=3"], "batch": 64, "rounds": 3}
    machine = {"cpu": {"name": "A CPU"}, "torch": {"version": "2.13.0"}}
    with (results / "step_time.jsonl").open("w") as file:
        for factor in (9, 1):  # the second run of the same command replaces the first
            seconds = {
                readme.OFFICIAL: [6.0 * factor] * 3,
                readme.PLAIN: [4.0, 3.0, 9.0],
                "fastlocal, fp32 NCHW": [2.0] * 3,
            }
            case |= {"threads": 2, "official": True}
            file.write(json.dumps({"case": case, "seconds": seconds, "machine": machine}) + "\n")
    return tmp_path


def page_of(*parts: str) -> str:
    return "\n".join(f"text\n<!-- begin: {name} -->\nold\n<!-- end: {name} -->" for name in parts)


def test_parts_are_written_from_records(recorded: Path) -> None:
    text = readme.fill(page_of("demo", "ledger", "step_time"), recorded)
    assert readme.fill(text, recorded) == text and "old" not in text
    assert "| DGL | 10 | fastlocal | 95.1% | 12.3 | 1081 | 0.75 |" in text
    assert "A CPU, 1 thread, torch 2.13.0, 61 s in all. `python -m fastlocal.bench.demo --epochs 1`" in text
    assert "demo.png" not in text  # there is no picture
    assert "| R32 AugLocal | 174 | 951 | 912 | 799 | 941 | 851 | 0.55 | 0.55 |" in text and "unpublished" not in text
    assert "| fastlocal, fp32 NCHW | 2,000 | 3.00 | 2.00 |" in text and "54,000" not in text
    assert "--option depth=3 --batch 64 --rounds 3 --threads 2 --official DIR`" in text


def test_runs_of_two_rounds_share_a_table(recorded: Path) -> None:
    path = recorded / "bench" / "results" / "step_time.jsonl"
    path.write_text(path.read_text().replace('"rounds": 3', '"rounds": 2'))
    text = readme.fill(page_of("step_time"), recorded)
    assert text.count("| run | rounds | base |") == 1 and "speed against the plain loop" not in text
    assert "--option depth=3 --batch 64` | 2 | official code | 6,000 | 3.00 |" in text


def test_another_record_is_another_page(recorded: Path) -> None:
    before = readme.fill(page_of("demo", "ledger"), recorded)
    path = recorded / "bench" / "results" / "demo.json"
    path.write_text(path.read_text().replace("0.9512", "0.9623"))
    assert readme.fill(before, recorded) != before


def test_without_records_the_page_says_so(tmp_path: Path) -> None:
    text = readme.fill(page_of("demo", "ledger", "step_time"), tmp_path)
    assert text.count("No run is recorded here yet.") == 3


@pytest.mark.parametrize("text", ["<!-- begin: nothing -->\n<!-- end: nothing -->", "<!-- begin: demo -->\n"])
def test_parts_that_cannot_be_filled(text: str) -> None:
    with pytest.raises(ArgumentError, match="page: "):
        readme.fill(text)


def test_a_finished_demo_is_taken_over(tmp_path: Path) -> None:
    run, root = tmp_path / "run", tmp_path / "root"
    run.mkdir()
    with pytest.raises(ArgumentError, match=r"has no table.json; run `make demo`"):
        readme.take_over(run, root)
    (run / "table.json").write_text(json.dumps(RECORDS["demo.json"]))
    (run / "demo.png").write_bytes(b"\x89PNG")
    readme.take_over(run, root)
    assert "![training curves" in readme.fill(page_of("demo"), root)


# ------------------------------------------------------------------------------------------------------------ the guides

NEW = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
EXPORT = re.compile(r"<!-- export: (\S+) -->\n```\w+\n(from \S+ import (\w+)\n)```", re.M)
RUN = re.compile(r"<!-- run -->\n```\n(.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and tests; the guides add to it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("fastlocal", "triton_kernels", "bench", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "data", "*.so"))
    shutil.copytree(
        ROOT / "fastlocal" / "data", tree / "fastlocal" / "data", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_work_when_followed(guide: str, tree: Path) -> None:
    """Writes the files, makes the exports and runs the commands that the guide gives, in its order."""
    text = (ROOT / "docs" / guide).read_text()
    steps = sorted([*NEW.finditer(text), *EXPORT.finditer(text), *RUN.finditer(text)], key=re.Match.start)
    assert len(steps) >= 5
    for step in steps:
        if step.re is NEW:
            path = tree / step[1]
            assert not path.exists() and path.parent.is_dir(), f"{step[1]} is there already, or lies in no folder"
            path.write_text(step[2])
        elif step.re is EXPORT:
            path = tree / step[1]
            head, found, tail = path.read_text().partition("__all__ = [")
            assert found, f"{step[1]} has no __all__"
            path.write_text(f'{head}{step[2]}\n{found}"{step[3]}", {tail}')
        else:
            run(step[1].strip(), tree)


def run(command: str, tree: Path) -> None:
    if command.startswith("make test"):
        tests = re.fullmatch(r'make test ARGS="([\w/. ]+)"', command)
        assert tests, command
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests[1].split()]
    else:
        code = re.fullmatch(r'python -c "(.*)"', command)
        assert code, command
        words = [sys.executable, "-c", code[1]]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    if "explain" in command:
        assert "reference" in done.stdout
    if "list_methods" in command:
        assert "linear_probe" in done.stdout
    if "pytest" in words:
        assert re.search(r"\d+ passed", done.stdout) and "skipped in" not in done.stdout, done.stdout


# ------------------------------------------------------------------------------------------------------------ the layers

# What each layer may import of fastlocal, besides itself; imports inside functions count too.
LEAVES = {"errors", "_version"}
BELOW = {
    "ops": {"reference", "triton_kernels", *LEAVES},
    "triton_kernels": set(LEAVES),
    "blocks": {"ops", *LEAVES},
    "methods": {"blocks", "ops", *LEAVES},
    "engine": {"methods", "blocks", "ops", "_native", *LEAVES},
    "models": {"ops", *LEAVES},
    "data": set(LEAVES),
    "compat": {"engine", "methods", "blocks", "ops", "models", *LEAVES},
    "trainer": {"engine", "methods", "blocks", "ops", "models", "data", *LEAVES},
}


def imported(file: Path) -> set[str]:
    """First names below fastlocal that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "fastlocal" else [f"fastlocal.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fastlocal.")}
    return found


@pytest.mark.parametrize("layer", BELOW)
def test_layers_import_only_what_stands_below(layer: str) -> None:
    folder = ROOT / layer if layer == "triton_kernels" else ROOT / "fastlocal" / layer
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        above = imported(file) - BELOW[layer] - {layer}
        assert not above, f"{file.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_operators_of_the_reference_import_nothing_above_them() -> None:
    for file in (ROOT / "fastlocal" / "reference").glob("*.py"):
        if file.name not in ("__init__.py", "step.py", "cascade.py"):  # whole steps, which stand on the engine
            assert imported(file) <= {"reference", *LEAVES}, file
