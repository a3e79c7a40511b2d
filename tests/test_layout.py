"""The shape of the code: imports run one way, files stay short, docstrings run."""

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from parrot.config import EvaluateConfig, SampleConfig, TrainConfig
from parrot.dpo import PreferenceConfig

PARROT = ROOT / "parrot"
COMMANDS = {"train", "sample", "parrot.evaluate", "parrot.dpo"}
SOURCES = [ROOT / "train.py", ROOT / "sample.py", *sorted(PARROT.rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in SOURCES}
# Lines that are not blank, 3,000 in all. These may come down, and never go up: before you
# add, find what goes.
BUDGETS = {"lesson": 1120, "fast": 281, "files": 721, "run": 418, "system": 318, "evaluate": 142}


def folder_of(module):
    """parrot.fast.ribbon -> fast; what lies at the top of parrot/ is the lesson, or a command."""
    if module in COMMANDS:
        return "commands"
    parts = module.split(".")
    is_folder = len(parts) > 1 and (PARROT / parts[1]).is_dir()
    return parts[1] if is_folder else "lesson"


def imports_of(path):
    """All modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {module: {name for name in imports_of(path) if name in MODULES and name != "parrot"}
         for module, path in MODULES.items()}


def test_there_is_no_circle_of_imports():
    graphlib.TopologicalSorter(GRAPH).prepare()  # CycleError names it


def test_imports_run_one_way_between_folders():
    """The folders can be put in an order in which each imports only from those before it."""
    folders = {}
    for module, imported in GRAPH.items():
        folder = folder_of(module)
        folders.setdefault(folder, set()).update({folder_of(name) for name in imported} - {folder})
    order = list(graphlib.TopologicalSorter(folders).static_order())
    assert order.index("system") < order.index("files") < order.index("lesson")
    assert order.index("fast") < order.index("lesson") < order.index("run") < order.index("commands")


def lines_of(paths):
    """Lines that are not blank."""
    return sum(bool(line.strip()) for path in paths
               for line in path.read_text(encoding="utf-8").splitlines())


def test_each_folder_keeps_to_its_budget():
    paths = {name: [] for name in BUDGETS}
    for module, path in MODULES.items():
        folder = "evaluate" if module == "parrot.evaluate" else folder_of(module)
        paths["lesson" if folder == "commands" else folder].append(path)
    lines = {name: lines_of(files) for name, files in paths.items()}
    assert all(lines[name] <= BUDGETS[name] for name in BUDGETS), lines


def test_functions_and_lines_stay_short():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert max(map(len, text.splitlines()), default=0) <= 100, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= (60 if node.name == "train" else 45), f"{path}: {node.name}"


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_examples_in_docstrings(module):
    imported = importlib.import_module(module)
    assert imported.__doc__ or not MODULES[module].read_text().strip()
    assert doctest.testmod(imported).failed == 0


OTHERS = {"--help", "--nproc", "--nnodes", "--rdzv"}  # the last three are torchrun's


def test_the_readmes_name_real_flags_and_files():
    flags = {"--" + field.name.replace("_", "-")
             for config in (TrainConfig, SampleConfig, EvaluateConfig, PreferenceConfig) for field in fields(config)}
    for path in (ROOT / "tests" / "benchmarks").glob("*.py"):
        flags |= set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    for path in (ROOT / "README.md", PARROT / "README.md", ROOT / "tests/benchmarks/README.md"):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= flags | OTHERS, path
        for name in re.findall(r"`((?:parrot|tests)/[\w/]+\.\w+|\w+\.py)`", text):
            places = (ROOT / name, PARROT / name, ROOT / "tests" / "benchmarks" / name)
            assert any(place.exists() for place in places), f"{path}: {name}"
