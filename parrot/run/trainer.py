"""All of a training run that is not the loop of train.py: its start, its pauses, its end."""

import math
import shlex
import sys
import time
from itertools import islice

import torch
from tqdm import tqdm

from parrot import assistant, data, fast
from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.chat import coloured
from parrot.config import TrainConfig
from parrot.fast import compiling, memory
from parrot.files import hub, model_folder
from parrot.run import portrait
from parrot.run.folder import Progress, RunFolder, describe, tensors_of
from parrot.system.console import Interrupted, StopSignal, UserError, say
from parrot.system.device import name_of, peak_memory, pick, tokens_per_forward
from parrot.system.distributed import Processes
from parrot.training import held_out_loss, make_optimizer


class Trainer:
    """What a run consists of: model, data, optimizer, folder, progress.

    parrot.dpo trains on pairs: it replaces the methods from `find_data` to `held_out`.
    """
    objective = "the loss of each token of the replies and of their end"

    def __init__(self, config: TrainConfig, loss_sum):
        self.config, self.loss_sum, self.processes = config, loss_sum, Processes()
        self.folder = RunFolder(config, self.processes.rank == 0)
        self.folder.begin(config.resume)
        device, self.dtype = pick(config.device, config.dtype)
        if fast.enabled:
            memory.keep_freed()  # before the first tensor
        with self.processes.one_after_the_other():  # the first downloads and tokenises
            files, weights = self.find_data(), hub.find_weights(config.weights)
            self.model, self.tokenizer = assistant.load(weights.path, torch.float32, device)
            self.saved_dtype = model_folder.stored_dtype(weights.path)
            longest = 0 if fast.enabled else config.max_length
            budget = tokens_per_forward(self.model, self.dtype, longest)
            self.max_tokens = config.micro_batch_tokens or budget
            self.train_set, self.val_set, notes = self.load_data(files)
        longest, context = self.train_set.longest, self.model.config.max_position_embeddings
        if longest > context:
            raise UserError(f"the longest example has {longest} tokens, but the model's context "
                            f"holds {context}: set --max-length {context}")
        self.steps_per_epoch = data.steps_per_epoch(self.train_set, config.batch_size)
        total_steps = config.epochs * self.steps_per_epoch
        self.total_steps = min(total_steps, config.max_steps or total_steps)
        self.num_tokens = self.total_steps / self.steps_per_epoch * self.train_set.lengths.sum()
        compiled = fast.enabled and compiling.compile_blocks(
            self.model, config.compile, self.dtype, Ribbon([256], device), self.num_tokens)
        self.optimizer, self.progress = make_optimizer(self.model, config), Progress()
        say(f"{len(self.train_set)} examples to train on, {len(self.val_set)} held out, "
            f"{self.total_steps} steps on {device}, up to {self.max_tokens} tokens in a forward"
            f"{', compiled' if compiled else ''}", *notes)
        if not config.dry_run:
            self._open(describe(
                config, weights, files, self.dtype, notes, objective=self.objective,
                val_files=list(self.val_data.hashes.values()) if self.val_data else [],
                examples=len(self.train_set), held_out=len(self.val_set), steps=self.total_steps,
                longest=longest, device=name_of(device), processes=self.processes.size,
                compiled=compiled, micro_batch_tokens=self.max_tokens))

    def _open(self, about):
        """Begin the run's folder, or go on from its checkpoint."""
        self.processes.check_same("data", about["data"]["files"])
        self.processes.check_same("weights", about["weights"]["files"])
        self.folder.open(about, self.config.resume)
        if self.config.resume:  # the first process reads; the others may not share its disk
            progress = self.folder.restore(self.model, self.optimizer)
            tensors = tensors_of(self.model, self.optimizer).values()
            self.progress = self.processes.copy_first(progress, tensors)

    def find_data(self):
        return hub.find_data(self.config.data)

    def load_data(self, files, **kind):
        """Found -> (train Examples, held-out Examples, remarks)."""
        config = self.config
        self.val_data = config.val_data and hub.find_data(config.val_data, of=config.data)
        return data.load_examples(
            files, self.tokenizer, config.max_length, config.val_fraction, val_data=self.val_data,
            skip_bad=config.skip_bad_records, max_examples=config.max_examples, **kind)

    def batch_of(self, examples, indices):
        return data.Batch.of(examples, indices, self.model.device)

    def held_out(self, should_stop):
        """{"val_loss": ...}; None where `should_stop()` turned true."""
        loss = held_out_loss(self.model, self.val_set, self.max_tokens, self.dtype, self.processes,
                             should_stop)
        return None if loss is None else {"val_loss": loss}

    def dry_run(self):
        """Say what the run would be, from the data and one ribbon; nothing is written."""
        examples, num_tokens = self.train_set, self.train_set.lengths.sum()
        num_targets = sum(int(is_target.sum()) for _, is_target in examples)
        say(f"an example has {num_tokens / len(examples):.0f} tokens (mean), at most "
            f"{examples.longest}; {num_targets / num_tokens:.0%} of the tokens are targets",
            f"the first example, {examples.source(0)}:")
        print(coloured(*examples[0], self.tokenizer, colour=sys.stdout.isatty()))

        batch = self.batches(0)[0]
        for _ in range(2):  # the first time is slower
            started = time.perf_counter()
            loss = self.loss_sum(self.model, batch, self.dtype)
            loss.backward()
            loss.item()  # waits for a GPU
            seconds = time.perf_counter() - started
        hours = self.num_tokens * seconds / len(batch.tokens) / self.processes.size / 3600
        moments = 8 * sum(parameter.numel() for parameter in self.model.parameters())  # AdamW's
        memory = (peak_memory(self.model.device) + moments) / 1e9
        say(f"a ribbon of {len(batch.tokens)} tokens takes {seconds:.1f} s, all steps about "
            f"{hours:.1f} h, {memory:.1f} GB of memory, {3.5 * moments / 1e9:.1f} GB of disk. "
            f"{self.num_tokens:,.0f} tokens, {moments // 8:,} parameters. Nothing was written.")

    def steps(self):
        """Yield the number of each step to do, from 0; evaluate in between."""
        progress, config = self.progress, self.config
        if progress.step == 0:
            self._ask("before", Assistant.of("", self.model, self.tokenizer, "chat"))
        self.bar = tqdm(total=self.total_steps, initial=progress.step, unit="step", desc="training",
                        disable=self.processes.rank > 0)
        with StopSignal() as self.stop, self.bar:
            while True:
                is_last = progress.step == self.total_steps
                if len(self.val_set) and (progress.step % config.eval_every == 0 or is_last):
                    self._evaluate()
                if is_last:
                    return
                self.started = time.perf_counter()
                yield progress.step
                if fast.enabled:
                    memory.give_back()

    def _ask(self, when, assistant):
        """Show the replies to the questions, in the terminal and in the report."""
        if self.processes.rank > 0:
            return
        questions = [*portrait.QUESTIONS, *(self.config.ask or ())]
        prompts = [[{"role": "user", "content": question}] for question in questions]
        prompts += islice(data.short_questions(self.val_set, self.tokenizer), 3)
        answers = portrait.ask(assistant, prompts)
        say(f"{when} training:")
        for question, reply in answers:
            say(f"  {' '.join(question.split()):.80}  ->  {' '.join(reply.split())}")
        self.folder.update(**{when: answers})

    def batches(self, step) -> list[data.Batch]:
        """The ribbons of a step, enough for all processes where that can be."""
        config, examples = self.config, self.train_set
        self.indices = data.examples_of_step(step, examples, config.batch_size, config.seed)
        share = math.ceil(len(self.indices) / self.processes.size)
        max_examples = min(share, config.micro_batch_size or share)
        splits = data.micro_batches(self.indices, examples.lengths, max_examples, self.max_tokens)
        return [self.batch_of(examples, split) for split in splits]

    def check(self, loss, grad_norm):
        """Save the weights now and then: they are sound if loss and gradient are finite.

        UserError if not, with the examples of the step. Interrupted after a signal.
        """
        step = self.progress.step
        names = ", ".join(map(self.train_set.source, self.indices))
        self._check_finite(loss + grad_norm, f"the loss is {loss} and the gradient's length "
                                             f"{grad_norm}. Its examples: {names}")
        status = self.processes.largest(self.stop.status)
        if status or step % self.config.save_every == 0:
            self.folder.save(self.model, self.optimizer, self.progress)
        if status:
            command = ["python", *(word for word in sys.argv if word != "--resume"), "--resume"]
            raise Interrupted(f"stopped after step {step} of {self.total_steps}; to go on: "
                              f"{shlex.join(command)}", status)

    def _check_finite(self, value, words):
        if not math.isfinite(value):
            raise UserError(
                f"step {self.progress.step + 1}: {words}. {self.folder.what_is_safe()} If it "
                "happens again, start anew with a lower --learning-rate and another --out.")

    def log_step(self, batches, **values):
        """Count the step: a line in metrics.jsonl, and the progress bar."""
        progress, tokens = self.progress, sum(len(batch.tokens) for batch in batches)
        seconds = time.perf_counter() - self.started
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        speed = round(tokens / seconds, 1)
        self._log(**values, tokens=progress.tokens, tokens_per_second=speed)
        self.bar.set_postfix_str(f"loss {values['train_loss']:.3f}, {speed} tokens/s", False)
        self.bar.update()

    def _log(self, **values):
        step, seconds = self.progress.step, round(self.progress.seconds, 2)
        epoch = round(step / self.steps_per_epoch, 4)
        self.folder.log(step=step, epoch=epoch, **values, seconds=seconds)

    def _evaluate(self):
        """Log the held-out loss; keep the model if it is the best yet. A signal cuts it short."""
        progress, started = self.progress, time.perf_counter()
        values = self.held_out(lambda: self.stop.status and progress.step < self.total_steps)
        if values is None:
            return
        progress.seconds += time.perf_counter() - started
        loss = values["val_loss"]
        self._check_finite(loss, f"the held-out loss is {loss}")
        if progress.step == 0:
            progress.first_loss = loss
        elif progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss = loss
            self.folder.save_best(self.model, self.tokenizer, self.saved_dtype)
        self._log(**values)
        self.folder.update(first_loss=progress.first_loss, best_loss=progress.best_loss)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        if self.processes.rank == 0:
            figures = figures.replace("val_", "held-out ")
            self.bar.write(f"step {progress.step}: {figures}", file=sys.stderr)

    def finish(self):
        """Leave the folder as a finished run, and show what was learned."""
        folder, device, progress = self.folder, self.model.device, self.progress
        if not len(self.val_set):  # the last is the best that we know
            folder.save_best(self.model, self.tokenizer, self.saved_dtype)
        best = Assistant.of("", self.model, self.tokenizer, "chat")
        if folder.keeps and folder.writes:
            best = Assistant.load("", folder.path, torch.float32, device)
        self._ask("after", best)
        folder.finish(peak_memory=peak_memory(device))
        say(f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s, "
            f"{peak_memory(device) / 1e9:.1f} GB at most")
        if len(self.val_set):
            say(f"held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}")
        if folder.keeps:
            say(f"Ask it: python sample.py --model {shlex.quote(str(folder.path))}")
        self.processes.close()
