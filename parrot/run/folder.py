"""A run's folder: what was trained how, its metrics, its best model, and what --resume needs.

    model.safetensors, config.json, ...   the best model so far
    run.json        settings, versions, hashes, where things come from
    metrics.jsonl   a line for each step and each evaluation
    report.html     all of it as a page; README.md: the model card
    checkpoint/     step-000050.safetensors: all that --resume needs

A file is replaced whole, and an old checkpoint deleted when the new one is on the disk. So after a
crash at any moment the old one or the new one is there, complete.
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
from parrot.config import TrainConfig
from parrot.files.hub import MODEL_FILES, DataFiles, Found
from parrot.run import card, report
from parrot.system.console import UserError, say
from parrot.system.disk import flush, read_json, replace_file, sha256_of, write_json


@dataclass
class Progress:
    """How far a run is. `step` steps are done; the evaluation at `step` may still be due."""
    step: int = 0
    tokens: int = 0  # of all examples so far
    seconds: float = 0.0  # of training and evaluating, over all sessions
    best_loss: float | None = None  # lowest held-out loss of a trained model
    first_loss: float | None = None  # held-out loss before the first step


def describe(config: TrainConfig, weights: Found, data: DataFiles, dtype: torch.dtype, more):
    """What run.json says of a run: enough to repeat it, and to notice that another one differs.

    It may be published, so it names the files, but not the folders of this machine.
    """
    names = {"weights": public_name(weights), "data": public_name(data),
             "val_data": config.val_data and Path(config.val_data).name}
    paths = {path for pattern in MODEL_FILES for path in weights.path.glob(pattern)}
    files = {path.name: sha256_of(path) for path in sorted(paths) if path.is_file()}
    versions = {lib.__name__: lib.__version__ for lib in (torch, tokenizers, safetensors)}
    about = {
        "config": {**asdict(config), **names, "out": Path(config.out).name},
        "dtype": str(dtype).removeprefix("torch."),
        "weights": {**weights.origin, "name": names["weights"], "files": files},
        "data": {**data.origin, "name": names["data"], 
                 "files": {path.name: sha256 for path, sha256 in data.hashes.items()}},
        "versions": {"python": platform.python_version(), **versions},
        "machine": f"{platform.system()} {platform.machine()}", **more, "finished": False}
    text = json.dumps(about)
    for path in data.files:  # `more` may quote it
        text = text.replace(json.dumps(str(path))[1:-1], json.dumps(path.name)[1:-1])
    return json.loads(text)


def public_name(found: Found | DataFiles):
    """The name of weights or data without the folders of this machine; a Hub id stays whole."""
    name = found.origin["name"]
    return name if found.origin["from"].startswith("Hugging Face Hub") else Path(name).name


def check_same(path, now):
    """UserError naming the first thing that a resumed run must not change but does."""
    before = read_json(path)
    with report.contents_of(path):
        pairs = [("the data's sha256", before["data"]["files"], now["data"]["files"]),
                 ("the weights' sha256", before["weights"]["files"], now["weights"]["files"]),
                 ("--dtype", before.get("dtype"), now.get("dtype"))]
        for field in fields(TrainConfig):
            name, flag = field.name, "--" + field.name.replace("_", "-")
            if not field.metadata["may_change"] and name not in ("weights", "data", "dtype"):
                pairs.append((flag, before["config"].get(name), now["config"][name]))
    for what, old, new in pairs:
        if old != new:
            raise UserError(f"--resume: {what} was {old} and is now {new}. Resume with the same "
                            "settings and files, or start anew with another --out.")


def writing(method):
    """Run `method` only where the folder `writes`; a disk that refuses becomes a UserError."""
    def guarded(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs) if self.writes else None
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write into {self.path}: {reason}. {self.what_is_safe()}") from None
    return guarded


class RunFolder:
    """The files of one run in `path`. Of several processes, only one `writes`."""

    def __init__(self, path, writes=True, keeps=True):
        self.path = Path(os.path.expanduser(path))  # where the shell did not: --out=~/run
        self.writes, self.keeps = writes, keeps  # keeps: the weights, too
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoint"

    def begin(self, resume):
        """Refuse to write over another run, or to resume none; called before anything slow."""
        about = report.read_if_there(self.path / "run.json")
        names = self.path.iterdir() if self.path.is_dir() and not about else ()
        refusals = {
            "holds no run to resume": resume and not about,
            "holds a run that is finished: there is nothing to resume":
                resume and about.get("finished"),
            "holds a finished run": not resume and about.get("finished"),
            "holds an unfinished run (--resume goes on)": not resume and about,
            "is a file": self.path.is_file(),
            "is not empty and not a run's folder": any(path.suffix != ".part" for path in names)}
        for refusal, applies in refusals.items():
            if applies:
                raise UserError(f"{self.path} {refusal}. Choose another --out.")

    @writing
    def open(self, about, resume):
        """Write run.json; on resume, check first that nothing that matters has changed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.begin(resume)  # again: while this run loaded, another may have begun here, or ended
        if resume:
            check_same(self.path / "run.json", about)
        self.about = about
        write_json(self.path / "run.json", about)
        self.checkpoints.mkdir(exist_ok=True)
        self.metrics.touch()

    def _lock(self):
        """Refuse a folder where another process trains: they would delete each other's files."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.lock = os.fdopen(os.open(self.path / "lock.part", flags, 0o644), "wb")
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
        except BlockingIOError:
            raise UserError(f"another train.py is at work in {self.path}: wait until it ends, or "
                            "stop it (Ctrl-C, kill)") from None
        except (ImportError, OSError):
            pass  # no locking available here: Windows, some network disks

    @writing
    def log(self, **values):
        """Add a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    @writing
    def save_best(self, model, tokenizer, dtype):
        if self.keeps:
            assistant.save(self.path, model, tokenizer, dtype)

    @writing
    def show(self, **values):
        """Keep values for the report, and write it anew."""
        path = self.path / "report.json"
        write_json(path, report.read_if_there(path) | values)
        report.write(self.path)

    @writing
    def finish(self, **results):
        """Write the model card, mark the run as finished, delete the checkpoint."""
        about = {**self.about, **results}
        write_json(self.path / "run.json", about)
        card.write(self.path)
        report.write(self.path)
        write_json(self.path / "run.json", {**about, "finished": True})
        shutil.rmtree(self.checkpoints)
        self.lock.close()
        (self.path / "lock.part").unlink()

    def _newest(self):
        paths = self.checkpoints.glob("step-*.safetensors")
        return max(paths, key=lambda path: (len(path.name), path.name), default=None)

    def what_is_safe(self):
        """A sentence for somebody whose run broke off."""
        if newest := self._newest():
            return f"The checkpoint {newest.with_suffix('')} is whole: --resume goes on from it."
        return "No checkpoint was written yet."

    @writing
    def save(self, model, optimizer, progress: Progress):
        """Write all that a resumed run needs: the weights, AdamW's moments, the progress.

        The order of the examples follows from seed and step, and nothing else is random.
        UserError where a number is not finite; the checkpoint before it stays.
        """
        path = self.checkpoints / f"step-{progress.step:06d}.safetensors"
        if not self.keeps or progress.step == 0 or path.is_file():  # nothing new to keep
            return
        tensors = tensors_of(model, optimizer)
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(f"step {progress.step} made {broken[0]} not finite: not saved. "
                            f"{self.what_is_safe()}")
        flush(self.metrics)  # its lines up to here will not be written again
        metadata = {"progress": json.dumps(asdict(progress))}
        replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        for old in self.checkpoints.iterdir():
            if old.is_dir():  # left by a process that was killed
                shutil.rmtree(old)
            elif old != path:
                old.unlink()

    def restore(self, model, optimizer):
        """The newest checkpoint into model and optimizer; returns its Progress, or Progress()."""
        path, progress = self._newest(), Progress()
        if path:
            with report.contents_of(path):
                progress = load(path, tensors_of(model, optimizer))
            for state in optimizer.state.values():
                state["step"] = torch.tensor(float(progress.step), device=model.device)
        else:
            say(f"{self.checkpoints} holds no checkpoint yet: starting from the beginning")
        self._rewind_metrics(progress.step)
        return progress

    @writing
    def _rewind_metrics(self, step):
        """Drop the lines that a resumed run will write again: all after `step`'s own."""
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        ends = [number for number, line in enumerate(lines, 1) if b'"train_loss"' in line]
        before = lines[:max(ends[:step], default=0)]
        replace_file(self.metrics, lambda temporary: temporary.write_bytes(b"".join(before)))


def tensors_of(model, optimizer):
    """What training changes, by name: each weight, and AdamW's two moments for it."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter].setdefault(moment, torch.zeros_like(parameter))
            tensors[f"{moment}.{name}"] = state
    return tensors


def load(path, tensors):
    """A checkpoint into `tensors` -> its Progress. ValueError, before that, if it does not fit."""
    with safetensors.safe_open(path, framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        values = json.loads(file.metadata()["progress"])
    for field in fields(Progress):
        value = values[field.name]
        if not isinstance(value, field.type) or not math.isfinite(value or 0):
            raise ValueError(f"{field.name} is {value!r}")
    progress = Progress(**values)
    shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in group.items()}
              for group in (tensors, saved)]
    if path.stem != f"step-{progress.step:06d}" or shapes[0] != shapes[1]:
        raise ValueError(f"it is of step {progress.step}, or of another model")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    return progress
