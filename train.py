"""Train LittleParrot: turn a language model that continues text into one that answers.

    python train.py --quickstart      minutes on a laptop's CPU
    python train.py                   SmolLM2-135M on Dolly 15K, 3 epochs

Read `train` from top to bottom: the whole loop stands there.
"""

import math
import sys

import torch

from parrot import fast
from parrot.config import TrainConfig
from parrot.run.trainer import Trainer
from parrot.system.command_line import parse
from parrot.system.console import run_program
from parrot.training import learning_rate, loss_sum


def train(config: TrainConfig, trainer_class=Trainer, loss_sum=loss_sum):
    """Train by `config` (parrot.dpo: by its own class and loss). Raises UserError, Interrupted."""
    fast.enabled = not config.plain
    run = trainer_class(config)  # loads the model and the data
    if config.dry_run:
        return run.dry_run()
    model, optimizer, processes = run.model, run.optimizer, run.processes

    for step in run.steps():  # and evaluates in between, every --eval-every steps
        # The batch: this step's examples as micro-batches (class Batch), each one ribbon.
        batches = run.batches(step)

        # Forward and backward, one ribbon at a time. A ribbon's loss is a sum over its targets, and
        # backward() adds its gradient to what stands in .grad: gradient accumulation.
        loss, num_terms = 0.0, 0
        for batch in processes.share(batches):
            ribbon_loss = loss_sum(model, batch, run.dtype)
            ribbon_loss.backward()
            loss += ribbon_loss.detach()
            num_terms += batch.num_terms  # its number of targets (in parrot.dpo: of pairs)
        loss, num_terms = processes.sum_step(model, loss, num_terms)  # sums .grad, too

        # The division, once: now loss and gradient are means over all targets of the step, and it
        # does not matter how the step was split into ribbons or over processes.
        loss /= num_terms
        for parameter in model.parameters():
            parameter.grad /= num_terms

        # The clip: a gradient that is too long is shortened, so that no odd batch moves the
        # weights far. Then the check: NaN or infinity ends the run before it reaches the weights.
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        loss, grad_norm = float(loss), float(grad_norm)  # here the CPU waits for a GPU
        run.check_and_save(loss, grad_norm)  # now and then, and at Ctrl-C: as before this step

        # The rate: a warmup, then half a cosine.
        rate = learning_rate(step, run.total_steps, config.learning_rate,
                             config.min_learning_rate, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # The step: AdamW moves the weights, and the gradients are reset.
        optimizer.step()
        optimizer.zero_grad()

        # The log: a line in metrics.jsonl, and the progress bar.
        run.log_step(batches, train_loss=loss, learning_rate=rate, grad_norm=grad_norm)
    return run.finish()


if __name__ == "__main__":
    run_program(lambda: train(parse(TrainConfig, sys.argv[1:], __doc__.splitlines()[0])))
