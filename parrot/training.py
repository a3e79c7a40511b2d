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


def accumulate_gradients(model, batches, dtype):
    """Add to every .grad the gradient of the step's mean loss; returns that loss, nats a token.

    The supervised tokens of all ribbons are counted before the first backward, so however
    the step is split into ribbons, the gradient is the same.
    """
    supervised = sum(len(batch.targets) for batch in batches)
    loss = 0.0
    for batch in batches:
        with autocast(batch.tokens.device, dtype):
            share = loss_sum(model, batch) / supervised
        share.backward()
        loss += share.item()
    return loss


@torch.no_grad()
def held_out_loss(model, examples, max_tokens, dtype, should_stop=lambda: False):
    """Mean loss over all supervised tokens of `examples`, in nats a token.

    None where `should_stop()` turned true on the way.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    splits = micro_batches(range(len(examples)), examples.lengths, None, max_tokens)
    for indices in tqdm(splits, desc="evaluating", leave=False):
        if should_stop():
            return None
        batch = Batch.of(examples, indices, device)
        with autocast(device, dtype):
            total += loss_sum(model, batch).item()
        count += len(batch.targets)
    return total / count
