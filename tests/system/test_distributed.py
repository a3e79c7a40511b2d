"""Two processes add up to one; what is wrong with one of them is told once."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from forked import Forked

from parrot.system.console import UserError
from parrot.system.distributed import Processes, torchrun_place

several = pytest.mark.skipif(os.name == "nt", reason="gloo is not tried on Windows")


@pytest.mark.parametrize("variables", [
    {"RANK": "abc"}, {"RANK": "-1"}, {"RANK": "1"}, {"RANK": ""}, {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": "2.0"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "x"},
    {"LOCAL_RANK": "-1"}, {"LOCAL_RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_variables_that_torchrun_never_sets(variables, monkeypatch):
    """The last are possible, but for MASTER_ADDR, where the processes meet."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{list(variables)[0]}.*is not what torchrun sets"):
        Processes()


def test_the_place_of_a_process(monkeypatch):
    assert torchrun_place() == (0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"),
                        ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert torchrun_place() == (5, 8, 1)


def test_a_process_alone_changes_nothing():
    processes, model = Processes(), torch.nn.Linear(2, 1)
    assert processes.sum_step(model, 3, 0.5) == (3, 0.5) and model.weight.grad is None
    assert processes.sum(3, 0.5) == [3, 0.5] and processes.share([1, 2]) == [1, 2]
    assert processes.largest(None) == 0 and processes.largest(130) == 130
    processes.close()


def together(body, size=2):
    """Run `body` of a `main(processes)` in so many processes -> [(status, stdout, stderr)]."""
    lines = "\n    ".join(body.splitlines())
    code = ("import os, sys, torch\nfrom parrot.system.console import UserError, run_program\n"
            "from parrot.system.distributed import Processes\n"
            f"def main():\n    processes = Processes()\n    {lines}\nrun_program(main)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(size):
        place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        started.append(Forked(code, cwd=ROOT, **place))
    return [process.finish() for process in started]


SUMS = """
model = torch.nn.Linear(3, 2)
model.weight.grad = torch.full((2, 3), 2.0 + processes.rank)
if processes.rank == 0:  # the other had no ribbon that used it
    model.bias.grad = torch.tensor([1.0, 2.0])
import torch.distributed as dist
all_reduce, messages = dist.all_reduce, []
dist.all_reduce = lambda message, *args: messages.append(len(message)) or all_reduce(message, *args)
numbers = processes.sum_step(model, 10 + processes.rank, 0.5)
assert messages == [8, 2], messages  # all gradients in one
dist.all_reduce = all_reduce
print(numbers, model.weight.grad.tolist(), model.bias.grad.tolist())
processes.check_same("data", {"a": "b"})
print(processes.sum(2**24 + 1, 1), processes.largest(processes.rank * 130 or None))
processes.close()"""


@several
def test_two_processes_add_up():
    whole = ("[21.0, 1.0] [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]] [1.0, 2.0]\n"
             "[33554434.0, 2.0] 130\n")
    assert together(SUMS) == [(0, whole, "")] * 2


@several
def test_both_processes_notice_that_they_differ():
    results = together('processes.check_same("data", {"a": processes.rank})\nprint("never")')
    assert results == [(1, "", "error: the processes do not have the same data\n")] * 2


ONE_FAILS = """
if processes.rank == 0:
    raise UserError("no such file")
processes.sum(0)
print("never")"""


@several
@pytest.mark.long
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_told_before_the_others_give_up(failing):
    body = ONE_FAILS.replace("rank == 0", f"rank == {failing}") + "\nprocesses.sum(1)"
    results = together(body)
    assert results[failing] == (1, "", "error: no such file\n")
    status, _, printed = results[1 - failing]
    assert status == 1 and printed.startswith("error: another process of this run")
    assert printed.count("\n") == 1


@several
def test_under_torchrun_it_is_the_only_line(tmp_path):
    """But for torchrun's own report, which names exit codes only."""
    script = tmp_path / "script.py"
    script.write_text("from parrot.system.console import UserError, run_program\n"
                      "from parrot.system.distributed import Processes\n"
                      "def main():\n    processes = Processes()" + ONE_FAILS.replace("\n", "\n    ")
                      + "\nrun_program(main)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           str(script)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: no such file"], done.stderr
    assert "RuntimeError" not in done.stderr and "gloo" not in done.stderr
