"""--plain runs none of the speed-ups: each of them is made to raise, and all three programs run."""

import importlib
import inspect
import pkgutil
import sys

import pytest

import parrot
import sample
import train
from parrot import evaluate, fast
from parrot.system.console import run_program


@pytest.fixture
def broken(monkeypatch):
    """Every function and class of parrot/fast raises, under every name by which a module knows it."""
    for folder in (parrot, fast):
        for module in pkgutil.iter_modules(folder.__path__, folder.__name__ + "."):
            importlib.import_module(module.name)

    def fail(*_, **__):
        raise AssertionError("a speed-up was run")
    count = 0
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] in ("parrot", "train", "sample")]:
        for name, value in list(vars(module).items()):
            is_code = inspect.isroutine(value) or inspect.isclass(value)
            if is_code and getattr(value, "__module__", "").startswith("parrot.fast."):
                monkeypatch.setattr(module, name, fail)
                count += 1
    assert count > 24


def run(monkeypatch, main, *argv):
    monkeypatch.setattr("sys.argv", ["program", *map(str, argv), "--device", "cpu"])
    run_program(main)


def test_all_programs_run_plain(broken, tiny_folder, records_file, tmp_path, monkeypatch, capsys):
    from conftest import some_records
    data, out = records_file(some_records(30)), tmp_path / "out"
    run(monkeypatch, lambda: train.train(train.parse(train.TrainConfig, sys.argv[1:], "")), "--weights", tiny_folder,
        "--data", data, "--out", out, "--max-steps", 2, "--val-fraction", 0.3, "--plain")
    run(monkeypatch, sample.main, "--model", out, "--prompt", "Hi", "--max-new-tokens", 5, "--plain", "--num-samples", 2)
    run(monkeypatch, evaluate.main, out, "--data", data, "--val-fraction", 0.3, "--max-new-tokens", 5, "--plain")
    assert "ROUGE-L" in capsys.readouterr().out


def test_without_plain_they_are_run(broken, tiny_folder, monkeypatch):
    with pytest.raises(AssertionError, match="a speed-up was run"):
        run(monkeypatch, sample.main, "--model", tiny_folder, "--prompt", "Hi", "--max-new-tokens", 5)


def test_the_same_seed_gives_the_same_replies_plain_or_not(q4_folder, monkeypatch, capsys):
    """The real model, sampled: random numbers are drawn alike, and rounding differs too little to show."""
    replies = []
    for flags in ([], ["--plain"]):
        run(monkeypatch, sample.main, "--model", q4_folder, "--prompt", "Name a color.", "--seed", 1, "--num-samples", 2,
            "--max-new-tokens", 10, "--dtype", "float32", *flags)
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] and replies[0].count("[") == 2
