"""Saved whole or not at all: a crash at any point leaves the old checkpoint or the new one."""

import os
from dataclasses import asdict

import pytest
import torch
from conftest import tiny_model

from parrot import checkpoint, files
from parrot.checkpoint import Progress, RunFolder
from parrot.config import TrainConfig
from parrot.console import UserError
from parrot.optim import make_optimizer


def trained(steps):
    """A model and its optimizer after some steps."""
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig())
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        optimizer.step()
    return model, optimizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    return RunFolder(tmp_path)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_restoring_gives_back_weights_moments_and_progress(folder):
    model, optimizer = trained(3)
    folder.save(model, optimizer, Progress(step=3, tokens=700, seconds=1.5, best_loss=2.25))
    other, other_optimizer = trained(0)
    assert folder.restore(other, other_optimizer) == Progress(step=3, tokens=700, seconds=1.5, best_loss=2.25)
    assert same(model, other)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # and both go on alike
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert same(model, other)


@pytest.mark.parametrize("crash_at", range(30))
def test_a_crash_at_any_point_leaves_the_old_or_the_new(crash_at, folder, monkeypatch):
    """Every call that touches the disk is one point at which the process may die."""
    folder.save(*trained(1), Progress(step=1))
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt("dead")
            return function(*args, **kwargs)
        return call
    for module, name in ((checkpoint, "save_file"), (checkpoint, "flush"), (files, "flush"), (os, "replace"), (os, "rename"),
                         (os, "unlink"), (os, "rmdir"), (os, "mkdir"), (checkpoint.shutil, "rmtree")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    try:
        folder.save(*trained(2), Progress(step=2))
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert finished or crash_at < 20  # the points are all among the first ones
    model, optimizer = trained(0)
    progress = folder.restore(model, optimizer)
    assert progress.step == 2 if finished else progress.step in (1, 2)
    assert same(model, trained(progress.step)[0])
    folder.save(*trained(3), Progress(step=3))  # and what the crash left is no hindrance
    assert [path.name for path in (folder.path / "checkpoint").iterdir()] == ["step-000003"]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    about = {"data": {"sha256": ""}, "weights": {"files": {}}, "config": asdict(TrainConfig())}
    first = RunFolder(tmp_path / "run")
    first.open(about, resume=False)
    for resume in (True, False):
        with pytest.raises(UserError, match="another train.py is at work in .*run"):
            RunFolder(tmp_path / "run").open({**about, "device": "another"}, resume)
    assert files.read_json(first.path / "run.json") == about
    RunFolder(tmp_path / "run", writes=False).open(about, resume=True)  # torchrun's other processes
    first.lock.close()  # as the kernel does for a process that dies
    with pytest.raises(UserError, match="holds an unfinished run"):
        RunFolder(tmp_path / "run").open(about, resume=False)
    RunFolder(tmp_path / "run").open(about, resume=True)
    files.write_json(tmp_path / "run" / "run.json", {**about, "finished": True})  # it ended while another loaded
    with pytest.raises(UserError, match="is finished: there is nothing to resume"):
        RunFolder(tmp_path / "run").open(about, resume=True)


def test_metrics_are_rewound_to_the_checkpoint(folder):
    for step in range(1, 6):
        folder.log(step=step, train_loss=1.0)
        if step in (3, 5):
            folder.log(step=step, val_loss=2.0)
    with open(folder.metrics, "a") as file:
        file.write('{"step": 6, "train_')
    folder._rewind_metrics(3)
    assert folder.metrics.read_text().splitlines() == [f'{{"step": {n}, "train_loss": 1.0}}' for n in (1, 2, 3)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.replace_file(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        files.replace_file(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_new_name_stands_for_is_on_the_disk_before_it(folder, monkeypatch):
    """A power cut keeps what was flushed; of the rest, any part, in any order."""
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: seen.append((name, *(os.path.basename(a) for a in args))) or original(*args))
    watched(files, "flush"), watched(checkpoint, "flush"), watched(os, "replace"), watched(os, "rename")
    files.write_json(folder.path / "a.json", {})
    assert seen == [("flush", "a.json.part"), ("replace", "a.json.part", "a.json"), ("flush", folder.path.name)]
    seen.clear()
    folder.save(*trained(1), Progress(step=1))
    renamed = seen.index(("rename", "unfinished", "step-000001"))
    assert {("flush", name) for name in ("metrics.jsonl", "tensors.safetensors", "progress.json.part", "unfinished")} <= set(seen[:renamed])
    assert ("flush", "checkpoint") in seen[renamed:]
