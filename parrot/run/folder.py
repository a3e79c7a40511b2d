"""A run's folder. A crash leaves files whole, but for a cut line of metrics.jsonl.

    model.safetensors, config.json, ...   the best model so far
    run.json        settings, versions, hashes, replies before and after training
    metrics.jsonl   a line for each step and each evaluation
    report.html, README.md   all of it as a page, and the model card
    checkpoint/     all that --resume needs, until the run is finished
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
from parrot.run import report
from parrot.system.console import UserError, refuse
from parrot.system.disk import flush, read_json, replace_file, write_json


@dataclass
class Progress:
    step: int = 0  # steps that are done; the evaluation at this one may still be due
    tokens: int = 0  # of all examples so far
    seconds: float = 0.0  # of training and evaluating, over all sessions
    best_loss: float | None = None  # lowest held-out loss of a trained model
    first_loss: float | None = None  # held-out loss before the first step


def describe(run):
    """What run.json says of a Trainer. It may be published: it names no folder of this machine."""
    config, sources, notes = asdict(run.config), {}, run.notes
    for option in {"out", "self_play"} & config.keys():
        config[option] = Path(config[option] or "").name
    for kind, found in run.sources.items():
        config[kind] = Path(found.origin["name"]).name  # "from" has the Hub's whole id
        files = {}
        for path, sha256 in found.hashes.items():
            files[f"{path.name} ({len(files)})" if path.name in files else path.name] = sha256
            notes = [note.replace(str(path), path.name) for note in notes]
        sources[kind] = {**found.origin, "name": config[kind], "files": files}
    device = run.model.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {lib.__name__: lib.__version__ for lib in (torch, tokenizers, safetensors)}
    return {"config": config, **sources, "notes": notes, "objective": run.objective,
            "examples": len(run.train_set), "held_out": len(run.val_set), "steps": run.total_steps,
            "longest": run.train_set.longest, "dtype": str(run.dtype).removeprefix("torch."),
            "versions": {"python": platform.python_version(), **versions}, "compiled": run.compiled,
            "machine": f"{platform.system()} {platform.machine()}",
            "device": card, "processes": run.processes.size, "micro_batch_tokens": run.max_tokens}


def check_same(path, about, config: Recipe):
    """Raise UserError, naming the first thing that a resumed run must not change but does."""
    names = [field.name for field in fields(config) if not field.metadata["may_change"]]

    def fixed(about):  # of files the hashes, of types the one that was computed in
        return {**{name: about["config"].get(name) for name in names}, "dtype": about["dtype"],
                **{kind: [*about[kind]["files"].items()]  # their order matters, too
                   for kind in ("weights", "data", "val_data")}}
    with report.blaming(path):
        before = fixed(read_json(path))
    for name, value in fixed(about).items():
        if before[name] != value:
            raise UserError(f"resume: --{name.replace('_', '-')} was {before[name]}, not {value}. "
                            "Resume with the same settings and files, or name another --out.")


def writing(method):
    """Run `method` only where the folder `writes`; a disk that refuses becomes a UserError."""
    def guarded(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs) if self.writes else None
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot write into {self.path}: {error}. {self.what_next()}") from None
    return guarded


class RunFolder:
    """The files of one run in `path`. Of several processes, only one `writes`."""

    def __init__(self, config: Recipe, writes=True):
        self.config, self.writes, self.keeps = config, writes, config.keep == "yes"
        self.path = Path(os.path.expanduser(config.out))  # where the shell did not: --out=~/run
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint" / "state.safetensors"

    @writing
    def check_free(self, resume):
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
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.lock = os.fdopen(os.open(self.path / "lock.part", flags, 0o644), "wb")
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            raise UserError(f"another train.py is at work in {self.path}: stop it first") from None
        except (ImportError, OSError):
            pass  # no locking available here: Windows, some network disks
        self.check_free(resume)  # again: another run may have begun or ended meanwhile
        if resume:
            check_same(self.path / "run.json", about, self.config)
        self.about = {**report.read_if_there(self.path / "run.json"), **about}
        self.metrics.touch()
        self.checkpoint.parent.mkdir(exist_ok=True)
        write_json(self.path / "run.json", self.about)

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

    def what_next(self):  # a sentence for the end of an error message
        return (f"{self.checkpoint} is intact: --resume continues from it."
                if self.checkpoint.is_file() else "No checkpoint was written yet.")

    @writing
    def save_checkpoint(self, model, optimizer, progress: Progress):
        """Write what a resumed run needs; its examples follow from seed and step."""
        tensors = tensors_of(model, optimizer)
        flush(self.metrics)  # its lines up to here will not be written again
        metadata = {"progress": json.dumps(asdict(progress))}
        replace_file(self.checkpoint, lambda path: save_file(tensors, path, metadata=metadata))

    @writing
    def restore(self, model, optimizer):
        """The checkpoint, if there is one, into model and optimizer -> Progress."""
        progress = Progress()
        if self.checkpoint.is_file():
            with report.blaming(self.checkpoint):
                progress = load_checkpoint(self.checkpoint, tensors_of(model, optimizer))
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        ends = [number for number, line in enumerate(lines, 1) if b'"train_loss"' in line]
        del lines[max(ends[:progress.step], default=0):]  # they will be written again
        replace_file(self.metrics, lambda path: path.write_bytes(b"".join(lines)))
        return progress


def tensors_of(model, optimizer):
    """What training changes, by name: each weight, AdamW's two moments for it and its steps."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        zeros = torch.zeros_like(parameter)
        for key, start in (("step", zeros.sum()), ("exp_avg", zeros), ("exp_avg_sq", zeros)):
            tensors[f"{key}.{name}"] = optimizer.state[parameter].setdefault(key, start.clone())
    return tensors


def load_checkpoint(path, tensors):
    """Copy a checkpoint into `tensors` -> its Progress. If it does not fit: an error, no copy."""
    with safetensors.safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(file.metadata()["progress"]))
    for name, value in vars(progress).items():
        if not isinstance(value, Progress.__annotations__[name]) or not math.isfinite(value or 0):
            raise ValueError(f"{name} is {value!r}")
    for name in tensors.keys() | saved.keys():
        fits = (saved[name].shape, saved[name].dtype) == (tensors[name].shape, tensors[name].dtype)
        if not fits or (name.startswith("step.") and saved[name] != progress.step):
            raise ValueError(f"{name} is of another model or another step")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return progress
