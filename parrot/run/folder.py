"""A run's folder: what was trained how, its metrics, its best model, and what --resume needs.

    model.safetensors, config.json, ...   the best model so far
    run.json        settings, versions, hashes, replies before and after training
    metrics.jsonl   a line for each step and each evaluation
    report.html     all of it as a page; README.md: the model card
    checkpoint/     all that --resume needs, until the run is finished

A file is replaced whole: after a crash at any moment, the old or the new one is there, complete.
"""

import json
import math
import os
import platform
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import tokenizers
import torch
from safetensors.torch import save_file

from parrot import assistant
from parrot.config import Recipe
from parrot.files.hub import Found
from parrot.run import report
from parrot.system.console import UserError, refuse
from parrot.system.disk import flush, read_json, replace_file, write_json


@dataclass
class Progress:
    """How far a run is. `step` steps are done; the evaluation at `step` may still be due."""
    step: int = 0
    tokens: int = 0  # of all examples so far
    seconds: float = 0.0  # of training and evaluating, over all sessions
    best_loss: float | None = None  # lowest held-out loss of a trained model
    first_loss: float | None = None  # held-out loss before the first step


def describe(config: Recipe, weights: Found, data: Found, dtype, notes, **more):
    """What run.json says of a run. It may be published, so it names no folder of this machine."""
    names = {"weights": public_name(weights), "data": public_name(data),
             "val_data": config.val_data and Path(config.val_data).name}
    versions = {lib.__name__: lib.__version__ for lib in (torch, tokenizers, safetensors)}
    for path in data.files:
        notes = [note.replace(str(path), path.name) for note in notes]
    hashes = [{path.name: sha for path, sha in found.hashes.items()} for found in (weights, data)]
    return {"config": {**asdict(config), **names, "out": Path(config.out).name},
            "dtype": str(dtype).removeprefix("torch."),
            "weights": {**weights.origin, "name": names["weights"], "files": hashes[0]},
            "data": {**data.origin, "name": names["data"], "files": hashes[1]},
            "versions": {"python": platform.python_version(), **versions},
            "machine": f"{platform.system()} {platform.machine()}",
            "notes": notes, **more, "finished": False}


def public_name(found: Found):
    """The name of weights or data without its folder; "from" has the whole id of the Hub."""
    return Path(found.origin["name"]).name


def check_same(path, about, config: Recipe):
    """UserError naming the first thing that a resumed run must not change but does."""
    def recipe(about):
        values = {"the data's sha256": about["data"]["files"],
                  "the weights' sha256": about["weights"]["files"], "--dtype": about["dtype"],
              "the held-out data's sha256": about["val_files"]}
        for field in fields(config):
            if not field.metadata["may_change"] and field.name not in ("weights", "data", "dtype"):
                values["--" + field.name.replace("_", "-")] = about["config"].get(field.name)
        return values
    with report.contents_of(path):
        before = recipe(read_json(path))
    for what, value in recipe(about).items():
        if before[what] != value:
            raise UserError(f"--resume: {what} was {before[what]} and is now {value}. Resume with "
                            "the same settings and files, or start anew with another --out.")


def writing(method):
    """Run `method` only where the folder `writes`; a disk that refuses becomes a UserError."""
    def guarded(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs) if self.writes else None
        except (OSError, safetensors.SafetensorError) as error:
            fault = f"cannot write into {self.path}: {getattr(error, 'strerror', None) or error}"
            raise UserError(f"{fault}. {self.what_is_safe()}") from None
    return guarded


class RunFolder:
    """The files of one run in `path`. Of several processes, only one `writes`."""

    def __init__(self, config: Recipe, writes=True):
        self.config, self.writes, self.keeps = config, writes, config.keep == "yes"
        self.path = Path(os.path.expanduser(config.out))  # where the shell did not: --out=~/run
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint" / "state.safetensors"

    @writing
    def begin(self, resume):
        """Refuse to write over another run, or to resume none."""
        about = report.read_if_there(self.path / "run.json")
        names = os.listdir(self.path) if self.path.exists() else []
        refuse(f"--out {self.path}", {
            "holds a finished run: delete it, or name another": about.get("finished"),
            "holds an unfinished run: go on with --resume, or name another": about and not resume,
            "holds no run to resume": resume and not about,
            "is not empty and not a run's folder: name another":
                not about and not all(name.endswith(".part") for name in names)})

    @writing
    def open(self, about, resume):
        """Write run.json; on resume, check first that nothing that matters has changed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.begin(resume)  # again: while this run loaded, another may have begun here, or ended
        if resume:
            check_same(self.path / "run.json", about, self.config)
        self.about = {**report.read_if_there(self.path / "run.json"), **about}
        self.metrics.touch()
        self.checkpoint.parent.mkdir(exist_ok=True)
        write_json(self.path / "run.json", self.about)

    def _lock(self):
        """Refuse a folder where another process trains: they would overwrite each other's files."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.lock = os.fdopen(os.open(self.path / "lock.part", flags, 0o644), "wb")
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            raise UserError(f"another train.py is at work in {self.path}: stop it first") from None
        except (ImportError, OSError):
            pass  # no locking available here: Windows, some network disks

    @writing
    def log(self, **values):
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    @writing
    def save_best(self, model, tokenizer, dtype):
        if self.keeps:
            assistant.save(self.path, model, tokenizer, dtype)

    @writing
    def update(self, **results):
        """Add results to run.json, and write the report and the model card anew."""
        self.about |= results
        write_json(self.path / "run.json", self.about)
        report.write(self.path)

    @writing
    def finish(self, **results):
        """Mark the run as finished and delete the checkpoint."""
        self.update(**results)
        write_json(self.path / "run.json", {**self.about, "finished": True})
        shutil.rmtree(self.checkpoint.parent)
        self.lock.close()
        (self.path / "lock.part").unlink()

    def what_is_safe(self):
        if self.checkpoint.is_file():
            return f"{self.checkpoint} is whole: --resume goes on from it."
        return "No checkpoint was written yet."

    @writing
    def save(self, model, optimizer, progress: Progress):
        """Write all that a resumed run needs; UserError, and no change, if it is not finite.

        The order of the examples follows from seed and step, and nothing else is random.
        """
        if not self.keeps or progress.step == 0:
            return
        tensors = tensors_of(model, optimizer)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"step {progress.step} made {name} not finite: not saved. "
                                f"{self.what_is_safe()}")
        flush(self.metrics)  # its lines up to here will not be written again
        metadata = {"progress": json.dumps(asdict(progress))}
        replace_file(self.checkpoint, lambda path: save_file(tensors, path, metadata=metadata))

    @writing
    def restore(self, model, optimizer):
        """The checkpoint into model and optimizer; returns its Progress, or Progress()."""
        progress = Progress()
        if self.checkpoint.is_file():
            with report.contents_of(self.checkpoint):
                progress = load(self.checkpoint, tensors_of(model, optimizer))
        # Drop the lines after those of its step: they will be written again.
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        ends = [number for number, line in enumerate(lines, 1) if b'"train_loss"' in line]
        before = b"".join(lines[:max(ends[:progress.step], default=0)])
        replace_file(self.metrics, lambda path: path.write_bytes(before))
        return progress


def tensors_of(model, optimizer):
    """What training changes, by name: each weight, AdamW's two moments for it and its steps."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        zeros = torch.zeros_like(parameter)
        state = optimizer.state[parameter]
        for key, start in (("step", zeros.sum()), ("exp_avg", zeros), ("exp_avg_sq", zeros)):
            tensors[f"{key}.{name}"] = state.setdefault(key, start.clone())
    return tensors


def load(path, tensors):
    """A checkpoint into `tensors` -> its Progress. ValueError, before that, if it does not fit."""
    with safetensors.safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(file.metadata()["progress"]))
    for field in fields(Progress):
        value = getattr(progress, field.name)
        if not isinstance(value, field.type) or not math.isfinite(value or 0):
            raise ValueError(f"{field.name} is {value!r}")
    for name in tensors.keys() | saved.keys():
        if (saved[name].shape, saved[name].dtype) != (tensors[name].shape, tensors[name].dtype):
            raise ValueError(f"{name} has another shape or type")
        if name.startswith("step.") and saved[name] != progress.step:
            raise ValueError(f"{name} is of another step")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return progress
