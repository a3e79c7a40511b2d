"""What is minimised, and what is watched: the loss on the tokens that the model should say."""

import torch
import torch.nn.functional as F
from tqdm import tqdm

from parrot.data import Batch, micro_batches
from parrot.device import autocast

ROWS_AT_ONCE = 1024  # the logits of so many rows are 200 MB in float32; fewer rows are slower


def supervised_rows(model, batch, dtype):
    """The hidden states (S, C) of the rows that have a target: logits of others are never needed."""
    with autocast(model.device, dtype):
        return model(batch.tokens, batch.ribbon)[batch.rows]


def token_losses(model, rows, targets, dtype):
    """Yield the cross-entropy (S,) of rows (S, C) and targets (S,) in nats, a piece at a time.

    No mean yet, because the one over a whole *step* is wanted: means of means would weigh a
    token by the company that it is in.
    """
    for some_rows, some_targets in zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE)):
        with autocast(model.device, dtype):
            logits = model.logits(some_rows)  # (at most ROWS_AT_ONCE, V)
        yield F.cross_entropy(logits.float(), some_targets, reduction="none")


def accumulate_gradients(model, batches, supervised, dtype):
    """Add to every .grad these ribbons' part of a step's mean loss; returns that part.

    supervised: the supervised tokens of the whole step, on all ribbons, counted before the
    first backward. So however the step is split, the parts add up to the same gradient.
    """
    loss = 0.0
    for batch in batches:
        rows = supervised_rows(model, batch, dtype)  # (S, C)
        # Logits are by far the largest tensors. So each piece is taken back to the rows at
        # once and forgotten; the collected gradient then goes on through the network.
        leaf = rows.detach().requires_grad_()
        for losses in token_losses(model, leaf, batch.targets, dtype):
            piece = losses.sum() / supervised
            piece.backward()
            loss += piece.item()
        rows.backward(leaf.grad)
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
        rows = supervised_rows(model, batch, dtype)
        total += sum(losses.sum().item() for losses in token_losses(model, rows, batch.targets, dtype))
        count += len(batch.targets)
    total, count, stopped = processes.sum(total, count, stopped)
    return None if stopped else total / count
