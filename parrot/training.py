"""What is minimised, and what is watched: the loss on the tokens that the model should say."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from parrot.data import Batch, micro_batches
from parrot.device import autocast


def loss_sum(model, batch):
    """The cross-entropy of a ribbon's supervised tokens, summed, in nats (a scalar).

    A sum, because the mean over a *step* is wanted: the caller divides by the number of
    supervised tokens of all its ribbons together. Means of means would weigh a token by
    the company that it is in. Logits exist only for the S rows that have a target.
    """
    hidden_states = model(batch.tokens, batch.ribbon)  # (N, C)
    logits = model.logits(hidden_states[batch.rows])  # (S, V)
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def accumulate_gradients(model, batches, supervised, dtype):
    """Add to every .grad these ribbons' part of a step's mean loss; returns that part.

    supervised: the supervised tokens of the whole step, on all ribbons, counted before the
    first backward. So however the step is split, the parts add up to the same gradient.
    """
    loss = 0.0
    for batch in batches:
        with autocast(model.device, dtype):
            share = loss_sum(model, batch) / supervised
        share.backward()
        loss += share.item()
    return loss


@torch.no_grad()
def held_out_loss(model, examples, max_tokens, dtype, processes, should_stop=lambda: False):
    """Mean loss over all supervised tokens of `examples`, in nats a token.

    None where `should_stop()` turned true on the way, in this process or another.
    """
    total, count, stopped = 0.0, 0, 0
    splits = processes.share(micro_batches(range(len(examples)), examples.lengths, None, max_tokens))
    for indices in tqdm(splits, desc="evaluating", leave=False, disable=processes.rank > 0):
        if should_stop():
            stopped = 1
            break
        batch = Batch.of(examples, indices, model.device)
        with autocast(model.device, dtype):
            total += loss_sum(model, batch).item()
        count += len(batch.targets)
    total, count, stopped = processes.sum(total, count, stopped)
    return None if stopped else total / count
