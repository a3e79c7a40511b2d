"""The shape of the code: imports point one way, files stay short, docstrings run."""

import ast
import doctest
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LAYERS = [  # each imports only from the lines above it (or, within `chat` and `train`'s own view, below)
    {"console"}, {"config", "files", "store", "varlen", "tiles", "device", "distributed"}, {"tokenizer", "attention"},
    {"model", "chat", "gguf_import", "compiling", "captured"}, {"weights", "hub", "records", "optim", "shorten", "report", "packed", "limits"}, {"data", "speaker", "card"},
    {"checkpoint", "training", "sampling"}, {"evaluate", "portrait", "benchmark"}]
MODULES = sorted(path.stem for path in (ROOT / "parrot").glob("*.py") if path.stem != "__init__")
LEARNERS_PATH = ["parrot/model.py", "parrot/attention.py", "parrot/chat.py", "parrot/data.py",
                 "parrot/training.py", "parrot/sampling.py", "train.py", "sample.py"]


def test_imports_point_one_way():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert sorted(level) == MODULES
    for name in MODULES:
        tree = ast.parse((ROOT / "parrot" / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:  # at the top: what a module needs to exist
            imported = [f"{node.module}.{a.name}" if node.module == "parrot" else node.module
                        for a in node.names] if isinstance(node, ast.ImportFrom) else []
            for module in imported:
                assert module.split(".")[0] not in ("train", "sample"), name
                if module.startswith("parrot."):
                    assert level[module.split(".")[1]] < level[name], f"{name} imports {module}"


def lines_of(paths):
    """Lines that are not blank."""
    return sum(bool(line.strip()) for path in paths for line in (ROOT / path).read_text(encoding="utf-8").splitlines())


def test_the_code_stays_small():
    assert lines_of(LEARNERS_PATH) <= 1000
    assert lines_of([f"parrot/{name}.py" for name in MODULES] + ["train.py", "sample.py"]) <= 3250


def test_every_name_is_defined_and_used():
    """Of code that no other test runs, too: what needs a GPU, or peers to measure against."""
    sources = [ROOT / name for name in ("parrot", "tests", "train.py", "sample.py")]
    found = subprocess.run([sys.executable, "-m", "pyflakes", *sources], capture_output=True, text=True)
    assert found.stdout + found.stderr == ""


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"parrot.{name}")
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


def test_the_readme_names_real_flags_and_files():
    from dataclasses import fields

    from parrot.config import BenchmarkConfig, EvaluateConfig, SampleConfig, TrainConfig
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    configs = (TrainConfig, SampleConfig, EvaluateConfig, BenchmarkConfig)
    flags = {"--" + f.name.replace("_", "-") for c in configs for f in fields(c)}
    compare = (ROOT / "tests" / "benchmarks" / "compare.py").read_text(encoding="utf-8")
    flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', compare))
    assert set(re.findall(r"--[a-z][a-z-]+", readme)) <= flags | {"--help"}
    assert all(f"{name}.py" in readme for name in MODULES)
