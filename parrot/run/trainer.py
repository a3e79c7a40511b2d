"""All of a training run that is not the loop of train.py: its start, its pauses, its end."""

import math
import shlex
import sys
import time
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from parrot import assistant, fast
from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.chat import coloured
from parrot.config import TrainConfig
from parrot.data import (
    Batch,
    examples_of_step,
    load_examples,
    micro_batches,
    short_questions,
    steps_per_epoch,
)
from parrot.fast import compiling, memory
from parrot.files import hub, model_folder
from parrot.run import portrait
from parrot.run.folder import Progress, RunFolder, describe, tensors_of
from parrot.system.console import Interrupted, StopSignal, UserError, say
from parrot.system.device import peak_memory, pick, tokens_per_forward
from parrot.system.distributed import Processes
from parrot.training import held_out_loss, make_optimizer


class Trainer:
    """What a run consists of: model, data, optimizer, folder, progress.

    parrot.dpo trains on pairs: it replaces the methods from `find_data` to `held_out`.
    """
    objective = "the loss of each token of the replies and of their end"

    def __init__(self, config: TrainConfig, loss_sum):
        """Load everything, and tell on the way what is worth knowing. UserError."""
        self.config, self.loss_sum, self.processes = config, loss_sum, Processes()
        self.folder = RunFolder(config, self.processes.rank == 0)
        self.folder.begin(config.resume)
        device, self.dtype = pick(config.device, config.dtype)
        if fast.enabled:
            memory.keep_freed()  # before the first tensor
        with self.processes.one_after_the_other():  # the first downloads and tokenises
            data, weights = self.find_data(), hub.find_weights(config.weights)
            self.model, self.tokenizer = assistant.load(weights.path, torch.float32, device)
            self.saved_dtype = model_folder.stored_dtype(weights.path)
            self.max_tokens = config.micro_batch_tokens or tokens_per_forward(
                self.model, self.dtype, 0 if fast.enabled else config.max_length)
            self.train_set, self.val_set, notes = self.load_data(data)
        longest, context = self.train_set.longest, self.model.config.max_position_embeddings
        if longest > context:
            raise UserError(f"the longest example has {longest} tokens, but the context of "
                            f"{config.weights} holds {context}: set --max-length {context}")
        self.steps_per_epoch = steps_per_epoch(self.train_set, config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        compiled = fast.enabled and compiling.compile_blocks(
            self.model, config.compile, self.dtype, Ribbon([256], device),
            self.total_steps * config.batch_size * self.train_set.lengths.mean())
        self.optimizer = make_optimizer(self.model, config)
        say(f"{len(self.train_set)} examples to train on, {len(self.val_set)} held out, "
            f"{self.total_steps} steps on {device}, up to {self.max_tokens} tokens in a forward"
            f"{', compiled' if compiled else ''}", *notes)
        questions = [*portrait.QUESTIONS, *(config.ask or ())]
        self.prompts = [[{"role": "user", "content": question}] for question in questions]
        self.prompts += islice(short_questions(self.val_set, self.tokenizer), 3)
        self.progress = Progress()
        if not config.dry_run:
            self._open(weights, data, notes, compiled)

    def _open(self, weights, data, notes, compiled):
        """Begin the run's folder, or go on from its checkpoint."""
        config, device, folder = self.config, self.model.device, self.folder
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        about = describe(
            config, weights, data, self.dtype, notes, objective=self.objective,
            examples=len(self.train_set), held_out=len(self.val_set), steps=self.total_steps,
            longest=self.train_set.longest, device=name, processes=self.processes.size,
            compiled=compiled, micro_batch_tokens=self.max_tokens)
        self.processes.check_same({what: about[what]["files"] for what in ("data", "weights")})
        folder.open(about, config.resume)
        if config.resume:  # one process reads the checkpoint: the others may share no disk with it
            restored = folder.restore(self.model, self.optimizer)
            tensors = tensors_of(self.model, self.optimizer).values()
            self.progress = self.processes.copy_first(restored, tensors)

    def find_data(self):
        """The DataFiles to train on."""
        return hub.find_data(self.config.data)

    def load_data(self, data, **kind):
        """DataFiles -> (train Examples, held-out Examples, remarks)."""
        config = self.config
        return load_examples(
            data, self.tokenizer, config.max_length, config.val_fraction, **kind,
            skip_bad=config.skip_bad_records, max_examples=config.max_examples,
            val_data=config.val_data and hub.find_data(config.val_data, of=config.data))

    def batch_of(self, examples, indices):
        """The ribbon of some examples."""
        return Batch.of(examples, indices, self.model.device)

    def held_out(self, should_stop):
        """{"val_loss": ...}; None where `should_stop()` turned true."""
        loss = held_out_loss(self.model, self.val_set, self.max_tokens, self.dtype, self.processes,
                             should_stop)
        return None if loss is None else {"val_loss": loss}

    def dry_run(self):
        """Say what the run would be, from the data and one ribbon; nothing is written."""
        data, config = self.train_set, self.config
        num_targets = sum(int(data[i][1].sum()) for i in range(len(data)))
        num_tokens = self.total_steps / self.steps_per_epoch * data.lengths.sum()
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        say(f"an example has {np.median(data.lengths):.0f} tokens (median), at most "
            f"{max(data.lengths)}; {num_targets / sum(data.lengths):.0%} of the tokens are targets",
            f"{num_parameters:,} parameters, {self.total_steps} steps of up to {config.batch_size} "
            f"examples, {num_tokens:,.0f} tokens in all", f"the first example, {data.source(0)}:")
        print(coloured(*data[0], self.tokenizer, colour=sys.stdout.isatty()))

        batch = self.batches(0)[0]
        for _ in range(2):  # the first time is slower
            started = time.perf_counter()
            loss = self.loss_sum(self.model, batch, self.dtype)
            loss.backward()
            loss.item()  # a GPU is waited for
            seconds = time.perf_counter() - started
        hours = num_tokens * seconds / len(batch.tokens) / self.processes.size / 3600
        memory = (peak_memory(self.model.device) or 0) + 8 * num_parameters  # AdamW's two moments
        disk = (2 * 12 + 4) * num_parameters  # two checkpoints at a time, and the model
        say(f"a ribbon of {len(batch.tokens)} tokens takes {seconds:.1f} s, so the steps about "
            f"{hours:.1f} h; about {memory / 1e9:.1f} GB of memory; {disk / 1e9:.1f} GB of disk. "
            "Nothing was written.")

    def steps(self):
        """Yield the number of each step to do, from 0; evaluate in between."""
        progress, config = self.progress, self.config
        if progress.step == 0:
            self._ask("before", Assistant.of("", self.model, self.tokenizer, "chat"))
        self.bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", desc="training",
                        disable=self.processes.rank > 0)
        with StopSignal() as self.stop, self.bar:
            while True:
                if progress.step % config.eval_every == 0 or progress.step == self.total_steps:
                    self._evaluate()
                if progress.step == self.total_steps:
                    return
                self.started = time.perf_counter()
                yield progress.step
                if fast.enabled:
                    memory.give_back()

    def _ask(self, when, assistant):
        """Show the replies to the questions, in the terminal and in the report."""
        if self.processes.rank == 0:
            answers = portrait.ask(assistant, self.prompts)
            say(f"{when} training:", *(f"  {' '.join(question.split()):.80}  ->  "
                                       f"{' '.join(reply.split())}" for question, reply in answers))
            self.folder.update(**{when: answers})

    def batches(self, step) -> list[Batch]:
        """The ribbons of a step, enough for all processes where that can be."""
        config = self.config
        self.indices = examples_of_step(step, self.train_set, config.batch_size, config.seed)
        share = math.ceil(len(self.indices) / self.processes.size)
        max_examples = min(share, config.micro_batch_size or share)
        splits = micro_batches(self.indices, self.train_set.lengths, max_examples, self.max_tokens)
        return [self.batch_of(self.train_set, split) for split in splits]

    def check(self, loss, grad_norm):
        """Weights that give a finite loss and gradient are sound: save them, when it is time.

        UserError names the examples of a step that is not finite. Interrupted after a signal.
        """
        progress = self.progress
        if not math.isfinite(loss + grad_norm):
            names = ", ".join(self.train_set.source(index) for index in self.indices)
            raise self._diverged(f"the loss is {loss} and the gradient's length {grad_norm}. Its "
                                 f"examples: {names}")
        status = self.processes.largest(self.stop.status)
        if status or progress.step % self.config.save_every == 0:
            self.folder.save(self.model, self.optimizer, progress)
        if status:
            command = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
            raise Interrupted(f"stopped after step {progress.step} of {self.total_steps}; to go "
                              f"on: {shlex.join(command)}", status)

    def log_step(self, batches, **values):
        """Count the step: a line in metrics.jsonl, and the progress bar."""
        progress, tokens = self.progress, sum(len(batch.tokens) for batch in batches)
        seconds = time.perf_counter() - self.started
        speed = tokens / seconds
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        self._log(**values, tokens=progress.tokens, tokens_per_second=round(speed, 1))
        self.bar.set_postfix_str(f"loss {values['train_loss']:.3f}, {speed:.0f} tokens/s", False)
        self.bar.update()

    def _log(self, **values):
        step, seconds = self.progress.step, round(self.progress.seconds, 2)
        epoch = round(step / self.steps_per_epoch, 4)
        self.folder.log(step=step, epoch=epoch, **values, seconds=seconds)

    def _evaluate(self):
        """Log the held-out loss; keep the model if it is the best yet. A signal cuts it short."""
        progress, started = self.progress, time.perf_counter()
        if not len(self.val_set):
            return
        values = self.held_out(lambda: self.stop.status and progress.step < self.total_steps)
        if values is None:
            return
        loss = values["val_loss"]
        progress.seconds += time.perf_counter() - started
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss is {loss}")
        if progress.step == 0:
            progress.first_loss = loss
        elif progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss = loss
            self.folder.save_best(self.model, self.tokenizer, self.saved_dtype)
        self._log(**values)
        self.folder.update(first_loss=progress.first_loss, best_loss=progress.best_loss)
        if self.processes.rank == 0:
            figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
            figures = figures.replace("val_", "held-out ")
            self.bar.write(f"step {progress.step}: {figures}", file=sys.stderr)

    def _diverged(self, reason):
        return UserError(
            f"step {self.progress.step + 1}: {reason}. {self.folder.what_is_safe()} If it happens "
            "again, start anew with a lower --learning-rate and another --out.")

    def finish(self):
        """Leave the folder as a finished run, and show what was learned."""
        progress, folder, device = self.progress, self.folder, self.model.device
        if not len(self.val_set):
            folder.save_best(self.model, self.tokenizer, self.saved_dtype)  # the best we know
        best = Assistant.of("", self.model, self.tokenizer, "chat")
        if folder.keeps:
            best = Assistant.load("", folder.path, torch.float32, device)
        self._ask("after", best)
        peak = peak_memory(device) or 0
        folder.finish(peak_memory=peak)
        say(f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s, "
            f"{peak / 1e9:.1f} GB at most")
        if len(self.val_set):
            say(f"held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}")
        if folder.keeps:
            name = shlex.quote(str(folder.path))
            say(f'Ask it: python sample.py --model {name} --prompt "Who are you?"')
        self.processes.close()
