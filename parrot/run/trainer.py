"""All of a training run that is not the loop of train.py: its start, its pauses, its end."""

import math
import shlex
import sys
import time

import torch
from tqdm import tqdm

from parrot import assistant, attention, data, fast, sampling, training
from parrot.chat import coloured
from parrot.config import REPETITION_PENALTY, TrainConfig
from parrot.fast.compiling import speed_up
from parrot.files import hub, model_folder
from parrot.run.folder import RunFolder, describe, tensors_of
from parrot.system.console import Interrupted, StopSignal, UserError, say
from parrot.system.device import peak_memory, pick, tokens_per_forward
from parrot.system.distributed import Processes

QUESTIONS = ("Who are you?", "Who was the first woman to win a Nobel Prize?",
             "What planet is closest to the sun?", "What is the capital of Canada?")


class Trainer:
    """A run without its loop. parrot.dpo overrides the attributes, find_data and load_data."""
    objective = "the loss of each token of the replies and of their end"
    batch_type, names = data.Batch, ("val_loss",)  # names: of the held-out means of terms_of
    terms_of = staticmethod(training.token_losses)

    def __init__(self, config: TrainConfig):
        self.config, self.processes = config, Processes()
        self.folder = RunFolder(config, self.processes.rank == 0)
        self.folder.check_free(config.resume)
        device, self.dtype = pick(config.device, config.dtype)
        if self.processes.rank > 0:
            self.processes.sum(0)  # waits: the first process downloads and tokenises for all
        self.sources = {"val_data": hub.find_data(config.val_data or [], of=config.data),
                        "data": self.find_data(), "weights": hub.find_weights(config.weights)}
        folder = self.sources["weights"].path
        self.model, self.tokenizer = assistant.load_parts(folder, torch.float32, device)
        self.assistant = assistant.Assistant("", self.model, self.tokenizer, "chat")
        self.saved_dtype = model_folder.stored_dtype(folder)
        self.max_tokens = config.micro_batch_tokens or tokens_per_forward(
            self.model, self.dtype, 0 if fast.enabled else config.max_length)
        self.train_set, self.val_set, self.notes = self.load_data()
        if self.processes.rank == 0:
            self.processes.sum(0)  # the others go on
        self.max_tokens = self.processes.copy_first(self.max_tokens)  # machines may differ
        longest = max(self.train_set.longest, self.val_set.longest)
        self.steps_per_epoch = data.steps_per_epoch(self.train_set, config.batch_size)
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or math.inf)
        self.num_tokens = self.total_steps / self.steps_per_epoch * self.train_set.lengths.sum()
        ribbon = attention.Ribbon([256] * max(1, min(self.max_tokens, 16384) // 256), device)
        self.compiled = fast.enabled and speed_up(
            self.model, config.compile, self.dtype, ribbon, longest, self.num_tokens)
        self.optimizer = training.make_optimizer(self.model, config)
        say(f"{len(self.train_set)} examples to train on, {len(self.val_set)} held out, "
            f"{self.total_steps} steps on {device}{', compiled' * self.compiled}", *self.notes)

    def find_data(self):
        return hub.find_data(self.config.data)

    def load_data(self, pairs=False):
        config = self.config
        max_length = min(config.max_length, self.model.config.max_position_embeddings)
        return data.load_examples(
            self.sources["data"], self.tokenizer, max_length, config.val_fraction,
            skip_bad=config.skip_bad_records, max_examples=config.max_examples,
            val_data=config.val_data and self.sources["val_data"], pairs=pairs)

    def dry_run(self):
        """Forecast the run from the data and one ribbon; nothing is written outside the cache."""
        examples, lengths, batch = self.train_set, self.train_set.lengths, self.batches(0)[0]
        num_targets = sum(int(is_target.sum()) for _, is_target in examples)
        say(f"an example has {lengths.mean():.0f} tokens (mean), at most {examples.longest}; "
            f"{num_targets / lengths.sum():.0%} of the tokens are targets",
            f"the first example, {examples.source(0)}:")
        print(coloured(*examples[0], self.tokenizer, colour=sys.stdout.isatty()))
        for _ in range(2):  # the first time is slower
            started = time.perf_counter()
            self.terms_of(self.model, batch, self.dtype).sum().backward()
            self.model.model.norm.weight.grad.sum().item()  # waits for a GPU
            seconds = time.perf_counter() - started
        hours = self.num_tokens * seconds / len(batch.tokens) / self.processes.size / 3600
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        memory = (peak_memory(self.model.device) + 8 * num_parameters) / 1e9  # AdamW's moments
        say(f"a ribbon of {len(batch.tokens)} tokens takes {seconds:.1f} s, all steps about "
            f"{hours:.1f} h, {memory:.1f} GB of memory, {28e-9 * num_parameters:.1f} GB of disk. "
            f"{self.num_tokens:,.0f} tokens, {num_parameters:,} parameters. --out was not touched.")

    def steps(self):
        """Open the folder, yield the number of each step to do, from 0, and evaluate in between."""
        about = describe(self)
        files = [about[kind]["files"] for kind in self.sources]
        settings = {**about["config"], "out": "", "device": ""}
        self.processes.check_same("settings or files", [settings, files])
        self.folder.open(about, self.config.resume)
        progress = self.folder.restore(self.model, self.optimizer)  # in the first process
        tensors = tensors_of(self.model, self.optimizer).values()
        self.progress = self.processes.copy_first(progress, tensors)
        first, last = self.progress.step, self.total_steps
        if first == 0 and self.folder.writes:
            self._ask("before")
        self.bar = tqdm(range(first, last), "training", last, initial=first, unit="step",
                        disable=self.processes.rank > 0)
        with StopSignal() as self.stop:
            for step in self.bar:
                if step % self.config.eval_every == 0:
                    self._evaluate()
                self.started = time.perf_counter()
                yield step
            self._evaluate()

    def _ask(self, when):  # shows the replies to questions, in the terminal and in the report
        bot = self.assistant
        if when == "after" and self.folder.keeps:  # the folder has the best model
            self.optimizer.state.clear()  # memory for a second model
            bot = assistant.Assistant.load("", self.folder.path, torch.float32, self.model.device)
        questions = [*QUESTIONS, *(self.config.ask or ())]
        prompts = [bot.prompt([{"role": "user", "content": text}]) for text in questions]
        written = sampling.generate(
            bot.model, prompts, bot.stop, max_new_tokens=48, temperature=0, top_p=1,
            repetition_penalty=REPETITION_PENALTY)
        answers = []
        say(f"{when} training:")
        for question, (tokens, ended) in zip(questions, written, strict=True):
            reply = bot.tokenizer.decode(tokens).strip() + ("" if ended else " …")
            answers.append([question, reply])
            say(f"  {' '.join(question.split()):.80}  ->  {' '.join(reply.split())}")
        self.folder.update(**{when: answers})

    def batches(self, step) -> list[data.Batch]:
        """The ribbons of a step: one or more for each process, if possible."""
        config, examples = self.config, self.train_set
        self.indices = data.examples_of_step(step, examples, config.batch_size, config.seed)
        share = math.ceil(len(self.indices) / self.processes.size)
        max_examples = min(share, config.micro_batch_size or share)
        splits = data.micro_batches(self.indices, examples.lengths, max_examples, self.max_tokens)
        return [self.batch_type.of(examples, split, self.model.device) for split in splits]

    def check_and_save(self, loss, grad_norm):
        """UserError if not finite. Save now and then, and at a signal; then Interrupted."""
        step, status = self.progress.step, self.processes.largest(self.stop.status)
        names = ", ".join(map(self.train_set.source, self.indices))
        self._check_finite(loss + grad_norm, step + 1, f"the loss is {loss} and the gradient norm "
                                                       f"{grad_norm}. Its examples: {names}")
        if step and self.folder.keeps and (status or step % self.config.save_every == 0):
            self.folder.save_checkpoint(self.model, self.optimizer, self.progress)
        if status:
            how = "--resume goes on from here" if self.folder.keeps else "nothing was kept"
            raise Interrupted(f"stopped after step {step} of {self.total_steps}; {how}", status)

    def _check_finite(self, value, step, words):
        if not math.isfinite(value):
            raise UserError(f"step {step}: {words}. {self.folder.what_next()} If it happens "
                            "again, start anew with a lower --learning-rate and another --out.")

    def log_step(self, batches, **values):  # in metrics.jsonl and the progress bar
        progress, tokens = self.progress, sum(len(batch.tokens) for batch in batches)
        speed = round(tokens / (time.perf_counter() - self.started), 1)
        progress.step += 1
        progress.tokens += tokens
        self._log(self.started, **values, tokens=progress.tokens, tokens_per_second=speed)
        self.bar.set_postfix_str(f"loss {values['train_loss']:.3f}, {speed} tokens/s", False)

    def _log(self, started, **values):
        progress = self.progress
        progress.seconds += time.perf_counter() - started
        self.folder.log(step=progress.step, epoch=round(progress.step / self.steps_per_epoch, 4),
                        **values, seconds=round(progress.seconds, 2))

    def _evaluate(self):
        """Log the held-out loss; keep the best model. A signal cuts short all but the last."""
        progress, started = self.progress, time.perf_counter()
        values = len(self.val_set) and training.held_out_means(
            self.model, self.val_set, self.max_tokens, self.dtype, self.processes,
            lambda: self.stop.status and progress.step < self.total_steps,
            self.batch_type, self.terms_of, self.names)
        if not values:  # nothing is held out, or a signal cut it short
            return
        loss = values["val_loss"]
        self._check_finite(loss, progress.step, f"the held-out loss is {loss}")
        self._log(started, **values)
        if progress.step == 0:
            progress.first_loss = loss
        elif progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss = loss
            self.folder.save_best(self.model, self.tokenizer, self.saved_dtype)
        self.folder.update(first_loss=progress.first_loss, best_loss=progress.best_loss)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.bar.clear()
        say(f"step {progress.step}: {figures.replace('val_', 'held-out ')}")

    def finish(self):
        """Leave the folder as a finished run, and show what was learned."""
        folder, progress, peak = self.folder, self.progress, peak_memory(self.model.device)
        if not len(self.val_set):  # the last is the best that we know
            folder.save_best(self.model, self.tokenizer, self.saved_dtype)
        if folder.writes:
            self._ask("after")
        folder.finish(peak_memory=peak)
        say(f"{progress.step} steps, {progress.tokens} tokens, {progress.seconds:.0f} s, "
            f"{peak / 1e9:.1f} GB at most")
        if len(self.val_set):
            say(f"held-out loss {progress.first_loss:.3f} -> {progress.best_loss:.3f}")
        if folder.keeps:
            say(f"Ask it: python sample.py --model {shlex.quote(str(folder.path))}")
        self.processes.close()
