"""The table is whole; how fast anything is, is no test."""

import json

from conftest import some_records

from parrot import benchmark
from parrot.console import run_program


def test_the_whole_table(tiny_folder, records_file, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "first_word", lambda *_: 1.5)
    monkeypatch.setattr("sys.argv", ["benchmark", "--weights", str(tiny_folder), "--data", str(records_file(some_records(9))),
                                     "--steps", "1", "--batch-size", "4", "--device", "cpu", "--json"])
    run_program(benchmark.main)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 9 and all(value > 0 for value in found.values())
    assert found["training, share of the matrix product's rate"] < 1 and found["sample.py to its first word, s"] == 1.5
