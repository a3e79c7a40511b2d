"""What is minimised, and what is watched: the loss on the tokens that the model should say."""

import torch
from tqdm import tqdm

from parrot.data import Batch, micro_batches
from parrot.device import autocast

ROWS_AT_ONCE = 1024  # the logits of so many rows are 200 MB in float32; fewer rows are slower
ROWS_IN_CACHE = 8  # so many fit a CPU's caches


def supervised_rows(model, batch, dtype):
    """The hidden states (S, C) of the rows that have a target: logits of others are never needed."""
    with autocast(model.device, dtype):
        return model(batch.tokens, batch.ribbon)[batch.rows]


def token_losses(model, batch, dtype):
    """The cross-entropy (S,) of a ribbon's supervised tokens, in nats.

    No mean yet: that of a whole *step* is wanted, and means of means would weigh a token by
    the company that it is in.
    """
    rows, losses = supervised_rows(model, batch, dtype), []  # (S, C)
    for some_rows, some_targets in zip(rows.split(ROWS_AT_ONCE), batch.targets.split(ROWS_AT_ONCE)):
        with autocast(model.device, dtype):
            logits = model.logits(some_rows)  # (at most ROWS_AT_ONCE, V)
        losses.append(cross_entropy(logits, some_targets, 1.0)[0])
    return torch.cat(losses)


def cross_entropy(logits, targets, scale):
    """logits (S, V), which are overwritten; targets (S,) -> losses (S,), scale x their gradient (S, V).

    The loss is -log p(target) with p = softmax(logits). Its gradient by the logits is p, less 1 at
    the target. A few rows at a time stay in a CPU's caches: 40 ms for 1,024 rows, where
    F.cross_entropy and autograd, which pass through memory for each operation, take 65 to 250.
    """
    losses = torch.empty(len(logits), device=logits.device)
    at_once = ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    for some, target, loss in zip(logits.split(at_once), targets[:, None].split(at_once), losses.split(at_once)):
        p = some.float()
        p -= p.amax(-1, keepdim=True)
        at_target = p.gather(-1, target)
        total = p.exp_().sum(-1, keepdim=True)
        loss.copy_((total.log() - at_target)[:, 0])
        p *= scale / total
        some.copy_(p.scatter_add_(-1, target, torch.full_like(at_target, -scale)))
    return losses, logits


def accumulate_gradients(model, batches, supervised, dtype):
    """Add to every .grad these ribbons' part of a step's mean loss; returns that part.

    It is returned as a tensor, so that a GPU need not be waited for.

    supervised: the supervised tokens of the whole step, on all ribbons, counted before the
    first backward. So however the step is split, the parts add up to the same gradient.
    """
    embedding, head = model.model.embed_tokens, model.lm_head  # one matrix, where they are tied
    for parameter in (embedding.weight, head.weight):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    embedding.sparse = model.device.type == "cpu"  # add to the rows that were read, not zeros to all others
    loss = 0.0
    for batch in batches:
        rows = supervised_rows(model, batch, dtype)  # (S, C)
        # Logits are by far the largest tensors. So this last matrix goes forward and back by hand, a
        # piece at a time that is then forgotten; the gradient goes on from the rows through the network.
        weight, parts = head.weight.detach().to(dtype), []  # (V, C)
        for some_rows, some_targets in zip(rows.detach().to(dtype).split(ROWS_AT_ONCE), batch.targets.split(ROWS_AT_ONCE)):
            losses, gradient = cross_entropy(some_rows @ weight.T, some_targets, 1 / supervised)  # (S,), (S, V)
            head.weight.grad += gradient.T @ some_rows  # (V, C)
            parts.append(gradient @ weight)  # (S, C)
            loss = loss + losses.sum() / supervised
        rows.backward(torch.cat(parts).to(rows.dtype))
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
        total += token_losses(model, batch, dtype).sum().item()
        count += len(batch.targets)
    total, count, stopped = processes.sum(total, count, stopped)
    return None if stopped else total / count
