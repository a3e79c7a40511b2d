"""A run's folder: what was trained how, its metrics, its best model, and the way back in.

    out/littleparrot/   model.safetensors, config.json, ...   the best model so far
                        run.json        settings, versions, hashes, where things came from
                        metrics.jsonl   a line for each step and each evaluation
                        report.html     all of it as a picture (report.py); README.md: the model card
                        checkpoint/     step-000050/: all that --resume needs

A checkpoint is written under another name, flushed and renamed, and only then is the old
one deleted: after a crash at any moment, the old or the new one is there, whole.
"""

import functools
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import tokenizers
import torch
from safetensors.torch import save_file

from parrot import card, report
from parrot.config import TrainConfig
from parrot.console import UserError, say
from parrot.files import flush, read_json, replace_text, sha256_of, write_json
from parrot.weights import save_model


@dataclass
class Progress:
    """How far a run is. `step` steps are done; the evaluation at `step` may still be due."""
    step: int = 0
    tokens: int = 0  # tokens of all examples seen so far
    seconds: float = 0.0  # spent training and evaluating, over all sessions
    best_loss: float | None = None  # lowest held-out loss of a trained model
    first_loss: float | None = None  # held-out loss before the first step


def describe(config, weights, data, more):
    """What run.json says of a run: enough to repeat it, and to notice that it is another one."""
    model_files = [path for pattern in ("*.safetensors", "config.json", "tokenizer.json") for path in sorted(weights.path.glob(pattern))]
    return {
        "config": asdict(config),
        "weights": {**weights.origin, "files": {f.name: sha256_of(f) for f in model_files}},
        "data": {**data.origin, "file": data.path.name, "sha256": sha256_of(data.path)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__},
        "machine": f"{platform.system()} {platform.machine()}",
        **more, "finished": False}


def writing(method):
    """Only the process that writes does it; a disk that refuses is a UserError that says what is safe."""
    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs) if self.writes else None
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write into {self.path}: {reason}. {self.what_is_safe()}") from None
    return guarded


class RunFolder:
    """The files of one run in `path`. Of several processes, only one `writes`."""

    def __init__(self, path, writes=True):
        self.path = Path(os.path.expanduser(path))  # where the shell did not: --out=~/run
        self.writes = writes
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoint"

    def begin(self, resume):
        """Refuse to write over another run; called before anything slow."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file")
        about = read_json(self.path / "run.json") if (self.path / "run.json").is_file() else None
        if resume:
            if about is None:
                raise UserError(f"{self.path} holds no run to resume")
            if about.get("finished"):
                raise UserError(f"the run in {self.path} is finished: there is nothing to resume")
        elif about:
            state = "a finished run" if about.get("finished") else "an unfinished run (--resume goes on)"
            raise UserError(f"{self.path} holds {state}. Choose another --out, or delete that folder.")
        elif self.path.is_dir() and any(each.suffix != ".part" for each in self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and not a run's folder. Choose another --out.")

    @writing
    def open(self, about, resume):
        """Write run.json, or check on resume that nothing that matters is different."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim()
        self.begin(resume)  # once more: while we loaded, another may have begun here, or ended
        if resume:
            check_same(read_json(self.path / "run.json"), about)
        write_json(self.path / "run.json", about)
        self.checkpoints.mkdir(exist_ok=True)
        self.metrics.touch()
        self.about = about

    def _claim(self):
        """Refuse a folder in which another process is at work: the two would delete each other's checkpoints."""
        self.lock = open(self.path / "lock.part", "w")  # the kernel lets go of it when this process ends, however it ends
        try:
            import fcntl
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another train.py is at work in {self.path}: wait until it ends, or stop it (Ctrl-C, kill)") from None
        except (ImportError, OSError):
            pass  # Windows, or a disk without locks: there nobody watches

    @writing
    def log(self, **values):
        """Add a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    @writing
    def save_best(self, model, tokenizer, dtype):
        """Make `model` the one that this folder holds."""
        save_model(self.path, model, tokenizer, dtype)

    def what_is_safe(self):
        """A sentence for somebody whose run just broke off."""
        saved = self._saved()
        return (f"The checkpoint {saved[-1]} is whole: --resume goes on from it." if saved
                else "No checkpoint was written yet.")

    @writing
    def _rewind_metrics(self, step):
        """Drop the lines that a resumed run will write again: all after `step` steps.

        An evaluation at `step` itself comes after the checkpoint of that step.
        """
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # the line that the crash cut off
            if values["step"] < step or (values["step"] == step and "train_loss" in values):
                kept.append(line + "\n")
        replace_text(self.metrics, "".join(kept))

    @writing
    def show(self, **values):
        """Keep values for the report, and write it anew."""
        path = self.path / "report.json"
        if values:
            write_json(path, {**(read_json(path) if path.is_file() else {}), **values})
        report.write(self.path)

    @writing
    def finish(self, **results):
        """Write the model card, mark the run as finished and drop the checkpoint, which nobody needs any more."""
        self.about |= results
        write_json(self.path / "run.json", self.about)
        card.write(self.path)
        report.write(self.path)
        write_json(self.path / "run.json", {**self.about, "finished": True})
        shutil.rmtree(self.checkpoints)
        self.lock.close()
        (self.path / "lock.part").unlink()

    # ---- checkpoints

    def _saved(self):
        """The complete checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("step-*[0-9]"))

    @writing
    def save(self, model, optimizer, progress):
        """Keep all that a resumed run needs: the weights, AdamW's two moments, the progress.

        The order of the examples is a function of seed and step, and nothing else is random.
        """
        final = self.checkpoints / f"step-{progress.step:06d}"
        if progress.step == 0 or final.is_dir():  # nothing new to keep
            return
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
        temporary = self.checkpoints / "unfinished"
        flush(self.metrics)  # its lines up to here will not be written again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / "tensors.safetensors")
        flush(temporary / "tensors.safetensors")
        write_json(temporary / "progress.json", asdict(progress))  # flushes the folder, too
        temporary.rename(final)
        flush(self.checkpoints)
        for old in self._saved():
            if old != final:
                shutil.rmtree(old)

    def restore(self, model, optimizer):
        """Load the newest checkpoint into model and optimizer; Progress() where there is none."""
        if not self._saved():
            say(f"{self.checkpoints} holds no checkpoint yet: starting from the beginning")
            progress = Progress()
        else:
            newest = self._saved()[-1]
            progress = Progress(**read_json(newest / "progress.json"))
            path = newest / "tensors.safetensors"
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    for name, parameter in model.named_parameters():
                        parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                        optimizer.state[parameter] = {
                            "step": torch.tensor(float(progress.step), device=parameter.device),
                            **{moment: file.get_tensor(f"{moment}.{name}").to(parameter.device)
                               for moment in ("exp_avg", "exp_avg_sq")}}
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path} cannot be used: {error}") from None
        self._rewind_metrics(progress.step)
        return progress


def check_same(before, now):
    """UserError naming the first thing that a resumed run must not change but does."""
    pairs = [("the data's sha256", before["data"]["sha256"], now["data"]["sha256"]),
             ("the weights' sha256", before["weights"]["files"], now["weights"]["files"])]
    for each in fields(TrainConfig):
        if not each.metadata["may_change"] and each.name not in ("weights", "data"):
            flag = "--" + each.name.replace("_", "-")
            pairs.append((flag, before["config"].get(each.name), now["config"][each.name]))
    for what, old, new in pairs:
        if old != new:
            raise UserError(f"--resume: {what} was {old} and is now {new}. Resume with the same "
                            "settings and files, or start anew with another --out.")
