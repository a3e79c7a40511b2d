"""Saved whole or not at all: a crash at any point leaves the old checkpoint or the new one."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from parrot.config import TrainConfig
from parrot.files.examples import Examples
from parrot.files.hub import Found, find_data
from parrot.run import folder as run_folder
from parrot.run.folder import Progress, RunFolder, check_same, describe
from parrot.system import disk
from parrot.system.console import UserError
from parrot.system.distributed import Processes
from parrot.training import make_optimizer

ABOUT = {"data": {"files": {}}, "val_data": {"files": {}}, "weights": {"files": {}}, "config": asdict(TrainConfig()),
         "dtype": "float32"}


def folder_at(path, writes=True):
    return RunFolder(TrainConfig(out=str(path)), writes)


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
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoint").mkdir()
    return folder_at(tmp_path)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_restoring_gives_back_weights_moments_and_progress(folder):
    model, optimizer = trained(3)
    progress = Progress(step=3, tokens=700, best_loss=2.25)
    folder.save_checkpoint(model, optimizer, progress)
    other, other_optimizer = trained(0)
    assert folder.restore(other, other_optimizer) == progress
    assert same(model, other)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # and both go on alike
        for p in m.parameters():
            p.grad = torch.ones_like(p)
        o.step()
    assert same(model, other)


@pytest.mark.parametrize("crash_at", range(30))
def test_a_crash_at_any_point_leaves_the_old_or_the_new(crash_at, folder, monkeypatch):
    """Every call that touches the disk is one point at which the process may die."""
    folder.save_checkpoint(*trained(1), Progress(step=1))
    calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt("dead")
            return function(*args, **kwargs)
        return call
    for module, name in ((run_folder, "save_file"), (run_folder, "flush"), (disk, "flush"),
                         (os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"),
                         (os, "mkdir"), (os, "open"), (os, "chmod")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    try:
        folder.save_checkpoint(*trained(2), Progress(step=2))
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    assert finished == (calls <= crash_at) and (finished or crash_at < 20)
    model, optimizer = trained(0)
    progress = folder.restore(model, optimizer)
    assert progress.step == 2 if finished else progress.step in (1, 2)
    assert same(model, trained(progress.step)[0])
    folder.save_checkpoint(*trained(3), Progress(step=3))  # and what the crash left is no hindrance
    assert sorted(os.listdir(folder.path)) == ["checkpoint", "metrics.jsonl"]


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    first = folder_at(tmp_path / "run")
    first.open(ABOUT, resume=False)
    for resume in (True, False):
        with pytest.raises(UserError, match="another train.py is at work in .*run"):
            folder_at(tmp_path / "run").open({**ABOUT, "device": "another"}, resume)
    assert disk.read_json(first.path / "run.json") == ABOUT
    folder_at(tmp_path / "run", writes=False).open(ABOUT, resume=True)  # torchrun's other processes
    first.lock.close()  # as the kernel does for a process that dies
    with pytest.raises(UserError, match="holds an unfinished run"):
        folder_at(tmp_path / "run").open(ABOUT, resume=False)
    folder_at(tmp_path / "run").open(ABOUT, resume=True)
    # It ended while another loaded:
    disk.write_json(tmp_path / "run" / "run.json", {**ABOUT, "finished": True})
    with pytest.raises(UserError, match="holds a finished run"):
        folder_at(tmp_path / "run").open(ABOUT, resume=True)


def test_metrics_are_rewound_to_the_checkpoint(folder):
    for step in range(1, 6):
        folder.log(step=step, train_loss=1.0)
        if step in (3, 5):
            folder.log(step=step, val_loss=2.0)
    with open(folder.metrics, "a") as file:
        file.write('{"step": 6, "train_')
    folder.save_checkpoint(*trained(3), Progress(step=3))
    assert folder.restore(*trained(0)).step == 3
    lines = folder.metrics.read_text().splitlines()
    assert lines == [f'{{"step": {n}, "train_loss": 1.0}}' for n in (1, 2, 3)]


def test_a_run_that_was_killed_before_its_first_metrics(tmp_path):
    first = folder_at(tmp_path / "run")
    first.open(ABOUT, resume=False)
    first.lock.close()
    first.metrics.unlink()
    (first.path / ".metrics.jsonl.x.part").mkdir()
    second = folder_at(tmp_path / "run")
    second.open(ABOUT, resume=True)
    assert second.restore(*trained(0)) == Progress()
    second.log(step=1)
    assert second.metrics.read_text() == '{"step": 1}\n'
    assert ".metrics.jsonl.x.part" not in os.listdir(second.path)


@pytest.mark.parametrize("name", ["", "a.txt", "run.json"])
def test_other_peoples_folders_are_left_alone(name, tmp_path):
    if name:
        (tmp_path / name).write_text('{"a": 1}')
    path = tmp_path if name else tmp_path / "file"
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, NotADirectoryError), match=f"{path}"):
        folder_at(path).check_free(resume=False)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    disk.replace_file(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        disk.replace_file(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_new_name_stands_for_is_on_the_disk_before_it(folder, monkeypatch):
    """A power cut keeps what was flushed; of the rest, any part, in any order."""
    seen = []

    def watched(owner, name):
        original = getattr(owner, name)

        def call(*args):
            paths = [Path(arg) for arg in args]
            names = [path.name + ".part" * (path.parent.suffix == ".part") for path in paths]
            seen.append((name, *names))
            return original(*args)
        monkeypatch.setattr(owner, name, call)
    for owner, name in ((disk, "flush"), (run_folder, "flush"), (os, "replace"), (os, "rename")):
        watched(owner, name)
    disk.write_json(folder.path / "a.json", {})
    assert seen == [("flush", "a.json.part"), ("replace", "a.json.part", "a.json"),
                    ("flush", folder.path.name)]
    seen.clear()
    folder.save_checkpoint(*trained(1), Progress(step=1))
    name = "state.safetensors"
    renamed = seen.index(("replace", f"{name}.part", name))
    assert {("flush", "metrics.jsonl"), ("flush", f"{name}.part")} <= set(seen[:renamed])
    assert ("flush", "checkpoint") in seen[renamed:]


# ---- what must not be saved, and what must not be loaded

@pytest.mark.parametrize("change", [
    lambda progress: {**progress, "more": 1}, lambda progress: {**progress, "step": 3},
    lambda progress: {**progress, "step": "2"}, lambda progress: {**progress, "best_loss": math.nan}, lambda progress: [], lambda progress: None])
def test_progress_that_is_damaged_is_not_resumed(change, folder):
    folder.save_checkpoint(*trained(2), Progress(step=2, tokens=5))
    path = folder.checkpoint
    with safetensors.safe_open(path, "pt") as file:
        progress = change(json.loads(file.metadata()["progress"]))
    save_file(load_file(path), path, {"progress": json.dumps(progress)})
    assert_refused(folder, path)


def assert_refused(folder, path):
    """One line that names the checkpoint, and nothing loaded."""
    model, optimizer = trained(0)
    with pytest.raises(UserError) as caught:
        folder.restore(model, optimizer)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert same(model, trained(0)[0])
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


NAME = "weight.model.norm.weight"


def renamed(tensors):
    tensors["weight.model.other.weight"] = tensors.pop(NAME)


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop(NAME),
    lambda tensors: tensors.pop("exp_avg_sq.model.norm.weight"),
    lambda tensors: tensors.update({NAME: tensors[NAME][:-1]}),
    lambda tensors: tensors.update({NAME: tensors[NAME][None]}),
    lambda tensors: tensors.update({"weight.more": torch.ones(1)}),
    lambda tensors: tensors.update({"step.model.norm.weight": torch.tensor(9.0)}),
    lambda tensors: tensors.update({NAME: tensors[NAME].half()}),
    renamed])
def test_tensors_of_another_model_are_not_resumed(change, folder):
    folder.save_checkpoint(*trained(2), Progress(step=2))
    path = folder.checkpoint
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    assert_refused(folder, path)


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: b"", lambda data: b"{}" + data,
    lambda data: data.replace(b"progress", b"prog.ess")])
def test_a_checkpoint_that_is_damaged_is_not_resumed(damage, folder):
    folder.save_checkpoint(*trained(2), Progress(step=2))
    path = folder.checkpoint
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(folder, path)


# ---- other people's files

def test_links_are_not_followed(tmp_path):
    """In a folder that somebody else made, any name may be a link to a file of ours."""
    (tmp_path / "mine").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("lock.part", "run.json.part", "report.html.part"):
        (folder / name).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cannot write into"):
        folder_at(folder).open(ABOUT, resume=False)
    (folder / "lock.part").unlink()
    folder_at(folder).open(ABOUT, resume=False)
    assert (tmp_path / "mine").read_text() == "mine"
    assert json.loads((folder / "run.json").read_text()) == ABOUT


@pytest.mark.parametrize("about", ["[]", "{", '{"config": 1}', '{"data": {"files": 1}}',
                                   '{"data": [], "weights": {}, "config": {}}'])
def test_a_run_json_of_something_else_is_named(about, tmp_path):
    (tmp_path / "run.json").write_text(about)
    with pytest.raises(UserError, match="run.json"):
        folder_at(tmp_path).check_free(resume=True)
        check_same(tmp_path / "run.json", {"data": {"files": {}}, "val_data": {"files": {}}, "weights": {"files": {}},
                                           "config": asdict(TrainConfig()), "dtype": "float32"}, TrainConfig())


@pytest.fixture
def about(tiny_folder, records_file):
    """A function: settings and type -> what run.json says of a run with them."""
    def about(dtype=torch.float32, weights=tiny_folder, more="", val_data=None, source=None, **changes):
        data = records_file([{"prompt": "a", "completion": f"b{more}"}])
        config = TrainConfig(weights=str(weights), data=str(data), **changes)
        examples = Examples.of([([1, 2, 3], [0, 0, 1])])
        return describe(SimpleNamespace(
            config=config, sources={"weights": Found([weights / "config.json", weights / "model.safetensors"], {"name": str(weights), "from": "a folder"}),
                                    "data": source or Found([data], {"name": str(data), "from": "a file"}),
                                    "val_data": find_data(val_data) if val_data else Found([], {"name": ""})},
            notes=[f"1 bad: {data}:3: not JSON"], dtype=dtype, objective="", train_set=examples, val_set=examples,
            total_steps=3, max_tokens=9, compiled=False, model=tiny_model(), processes=Processes()))
    return about


def test_run_json_holds_no_folder_of_this_machine(about, tmp_path, tiny_folder):
    text = json.dumps(about(out=str(tmp_path / "out" / "mine")))
    assert str(tmp_path) not in text and str(tiny_folder.parent) not in text
    config = json.loads(text)["config"]
    assert (config["weights"], config["data"], config["out"]) == (
        tiny_folder.name, "records.jsonl", "mine")
    hub = Found([], {"name": "me/llama", "from": "Hugging Face Hub me/llama"})
    described = about(source=hub)
    assert described["config"]["data"] == described["data"]["name"] == "llama"
    assert described["data"]["from"] == "Hugging Face Hub me/llama"


def test_files_of_the_same_name_are_all_told(about, tmp_path):
    paths = [tmp_path / name / "x.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text(str(path))
    files = about(val_data=list(map(str, paths)))["val_data"]["files"]
    assert list(files) == ["x.jsonl", "x.jsonl (1)"] and len(set(files.values())) == 2


def test_resuming_compares_the_order_of_the_files(about, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        Path(path).write_text(path)
    disk.write_json(tmp_path / "run.json", about(val_data=paths))
    check_same(tmp_path / "run.json", about(val_data=paths), TrainConfig())
    with pytest.raises(UserError, match="--val-data was"):
        check_same(tmp_path / "run.json", about(val_data=paths[::-1]), TrainConfig())


def test_resuming_compares_what_was_computed(about, tmp_path):
    """bfloat16 that became float32 is float32, on whatever machine and by whatever name."""
    path = tmp_path / "run.json"
    disk.write_json(path, about(dtype=torch.float32))
    assert about()["config"]["dtype"] == "bfloat16" and about()["dtype"] == "float32"
    check_same(path, about(dtype=torch.float32), TrainConfig())
    check_same(path, about(**{"out": "elsewhere", "save_every": 7, "device": "cpu"}), TrainConfig())
    with pytest.raises(UserError, match="--dtype was float32, not bfloat16"):
        check_same(path, about(dtype=torch.bfloat16), TrainConfig())
    with pytest.raises(UserError, match="--epochs was 3, not 4"):
        check_same(path, about(epochs=4), TrainConfig())
    with pytest.raises(UserError, match="--val-data was"):
        check_same(path, about(val_data="quickstart"), TrainConfig())
    with pytest.raises(UserError, match="--data was"):
        check_same(path, about(more="c"), TrainConfig())


def test_other_weights_of_the_same_name_are_not_resumed(about, tmp_path, tiny_folder):
    path, other = tmp_path / "run.json", tmp_path / tiny_folder.name
    disk.write_json(path, about())
    other.mkdir()
    for file in tiny_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    check_same(path, about(weights=other), TrainConfig())
    (other / "config.json").write_text("{}")
    os.mkfifo(other / "model-00001-of-00002.safetensors")  # is not read
    with pytest.raises(UserError, match="--weights was"):
        check_same(path, about(weights=other), TrainConfig())


def test_a_model_of_another_shape(folder):
    folder.save_checkpoint(*trained(1), Progress(step=1))
    model = tiny_model(tiny_config(layers=3))
    with pytest.raises(UserError, match="state.safetensors"):
        folder.restore(model, make_optimizer(model, TrainConfig()))
