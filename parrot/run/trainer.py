"""All of a training run that is not the loop of train.py: its start, its pauses, its end."""

from __future__ import annotations

import math
import shlex
import sys
import time
from itertools import islice

import torch
from tqdm import tqdm

from parrot import assistant, fast
from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.chat import spans_of
from parrot.config import TrainConfig
from parrot.data import (
    Batch,
    examples_of_step,
    load_examples,
    micro_batches,
    questions,
    steps_per_epoch,
)
from parrot.fast import memory
from parrot.fast.compiling import compile_blocks
from parrot.files import hub
from parrot.run import portrait
from parrot.run.folder import Progress, RunFolder, describe
from parrot.system.console import Interrupted, StopSignal, UserError, say
from parrot.system.device import peak_memory, pick, tokens_per_forward
from parrot.system.distributed import Processes
from parrot.training import held_out_loss, make_optimizer


class Trainer:
    """What a run consists of: model, data, optimizer, folder, progress."""

    def __init__(self, config: TrainConfig):
        """Load everything, and tell on the way what is worth knowing. UserError."""
        self.config, self.processes = config, Processes()
        self.folder = RunFolder(config.out, self.processes.rank == 0, config.keep == "yes")
        self.folder.begin(config.resume)
        device, self.dtype = pick(config.device, config.dtype)
        if fast.enabled:
            memory.keep_freed()  # before the first tensor
        with self.processes.one_after_the_other():  # the first downloads and tokenises
            data, weights = hub.find_data(config.data), hub.find_weights(config.weights)
            val_data = config.val_data and hub.find_data(config.val_data, of=config.data)
            self.model, self.tokenizer = assistant.load(weights.path, torch.float32, device)
            self.train_set, self.val_set, told = load_examples(
                data, self.tokenizer, config.max_length, config.val_fraction, val_data=val_data,
                skip_bad=config.skip_bad_records, max_examples=config.max_examples)
        longest, context = self.train_set.lengths.max(), self.model.config.max_position_embeddings
        if longest > context:
            raise UserError(f"{data.origin['name']} has an example of {longest} tokens, but the context of "
                            f"{config.weights} holds {context}: set --max-length {context}")
        self.max_tokens = config.micro_batch_tokens or tokens_per_forward(self.model, self.dtype)
        self.steps_per_epoch = steps_per_epoch(self.train_set, config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.total_steps = min(self.total_steps, config.max_steps or self.total_steps)
        compiled = fast.enabled and compile_blocks(  # fast/compiling.py
            self.model, config.compile, self.dtype, Ribbon([256], device),
            self.total_steps * config.batch_size * self.train_set.lengths.mean())
        self.optimizer = make_optimizer(self.model, config)
        say(f"{len(self.train_set)} examples to train on, {len(self.val_set)} held out, "
            f"{self.total_steps} steps on {device}, up to {self.max_tokens} tokens in a forward"
            f"{', compiled' if compiled else ''}", *told)
        about = describe(config, weights, data, self.dtype, {
            "examples": len(self.train_set), "held_out": len(self.val_set), "notes": told,
            "longest": int(longest), "device": str(device), "compiled": compiled,
            "processes": self.processes.size, "micro_batch_tokens": self.max_tokens,
            "steps": self.total_steps})
        self.progress = Progress()
        self.prompts = [[{"role": "user", "content": question}] for question in config.ask or ()]
        self.prompts += islice(questions(self.val_set, self.tokenizer), 3)
        if config.dry_run:
            return
        with self.processes.one_after_the_other():
            self.folder.open(about, config.resume)
            if config.resume:
                self.progress = self.folder.restore(self.model, self.optimizer)

    def steps(self):
        """Yield the number of each step to do, from 0; evaluate in between."""
        progress, config = self.progress, self.config
        if progress.step == 0 and self.processes.rank == 0:
            before = portrait.ask(Assistant.of("", self.model, self.tokenizer), self.prompts)
            say("before training:", *portrait.lines(before, config.ask))
            self.folder.show(before=before, example=spans_of(*self.train_set[0], self.tokenizer))
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

    def batches(self, step) -> list[Batch]:
        """The ribbons of a step, enough for all processes where that can be."""
        config = self.config
        self.indices = examples_of_step(step, self.train_set, config.batch_size, config.seed)
        share = math.ceil(len(self.indices) / self.processes.size)
        max_examples = min(share, config.micro_batch_size or share)
        splits = micro_batches(self.indices, self.train_set.lengths, max_examples, self.max_tokens)
        return [Batch.of(self.train_set, split, self.model.device) for split in splits]

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
            torchrun = ["torchrun", f"--nproc_per_node={self.processes.size}"]
            command = ["python"] if self.processes.size == 1 else torchrun
            command += [*(word for word in sys.argv if word != "--resume"), "--resume"]
            raise Interrupted(f"stopped after step {progress.step} of {self.total_steps}; to go "
                              f"on: {shlex.join(command)}", status)

    def log_step(self, batches, **values):
        """Count the step, and tell of it."""
        seconds = time.perf_counter() - self.started
        tokens = sum(len(batch.tokens) for batch in batches)
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        self._log(**values, tokens=self.progress.tokens,
                  tokens_per_second=round(tokens / seconds, 1))
        self.bar.set_postfix_str(
            f"loss {values['train_loss']:.3f}, lr {values['learning_rate']:.1e}, "
            f"{tokens / seconds:.0f} tokens/s", refresh=False)
        self.bar.update()

    def _log(self, **values):
        epoch = round(self.progress.step / self.steps_per_epoch, 4)
        seconds = round(self.progress.seconds, 2)
        self.folder.log(step=self.progress.step, epoch=epoch, **values, seconds=seconds)

    def _evaluate(self):
        """Log the held-out loss; keep the model if it is the best yet. A signal cuts it short."""
        started, progress = time.perf_counter(), self.progress
        if not len(self.val_set):
            return
        loss = held_out_loss(self.model, self.val_set, self.max_tokens, self.dtype, self.processes,
                             lambda: self.stop.status and progress.step < self.total_steps)
        if loss is None:
            return
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss is {loss}")
        progress.seconds += time.perf_counter() - started
        if progress.step == 0:
            progress.first_loss = loss
        elif progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss = loss
            self.folder.save_best(self.model, self.tokenizer, self.dtype)
        self._log(val_loss=loss)
        self.folder.show()
        if self.processes.rank == 0:
            self.bar.write(f"step {progress.step}: held-out loss {loss:.4f}", file=sys.stderr)

    def _diverged(self, reason):
        return UserError(
            f"step {self.progress.step + 1}: {reason}. {self.folder.what_is_safe()} If it happens "
            "again, start anew with a lower --learning-rate and another --out.")

    def finish(self):
        """Leave the folder as a finished run, and show what was learned."""
        progress, folder, device = self.progress, self.folder, self.model.device
        if not len(self.val_set):
            self.folder.save_best(self.model, self.tokenizer, self.dtype)  # the best we know
        if self.processes.rank == 0:
            best = Assistant.of("", self.model, self.tokenizer)
            if folder.keeps:
                best = Assistant.load("", folder.path, torch.float32, device)
            after = portrait.ask(best, self.prompts)
            question, _, tokens = after[0]
            folder.show(after=after, answer=portrait.certainty(best, question, tokens))
            say("after training:", *portrait.lines(after, self.config.ask))
        peak = peak_memory(device)
        folder.finish(first_loss=progress.first_loss, best_loss=progress.best_loss,
                      seconds=progress.seconds, peak_memory=peak)
        summary = f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s"
        if peak:
            summary += f", {peak / 1e9:.1f} GB at most"
        summary += f". The model is in {folder.path}" if folder.keeps else ". No model was kept"
        if progress.best_loss is not None:
            summary += f"; held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}"
            if progress.best_loss >= progress.first_loss:
                summary += " (no better than before training: try a lower --learning-rate)"
        name = shlex.quote(str(folder.path))
        say(f'{summary}.\nAsk it: python sample.py --model {name} --prompt "Who are you?"')
        self.processes.close()
