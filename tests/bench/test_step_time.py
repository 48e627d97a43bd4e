"""The timing bench runs every variant in turns and records what it measured."""

import json

from fastlocal.bench import step_time


def test_it_prints_and_records_every_variant(tmp_path, capsys):
    file = tmp_path / "times.jsonl"
    options = "--model resnet20 --method dgl --blocks 3 --batch 2 --rounds 2 --threads 1"
    assert step_time.main([*options.split(), "--option", "head=auglocal", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert len(record["seconds"]) == 5
    assert all(len(times) == 2 and min(times) > 0 for times in record["seconds"].values())
    assert all(name in printed for name in record["seconds"])
    assert record["case"]["option"] == ["head=auglocal"]
