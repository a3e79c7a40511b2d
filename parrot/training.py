"""What is minimised, how the weights move, and what is watched on the way."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from parrot.config import TrainConfig
from parrot.data import Batch, Examples, micro_batches
from parrot.model import Llama
from parrot.system.device import autocast
from parrot.system.distributed import Processes, torchrun_place


def token_losses(model: Llama, batch: Batch, dtype):
    """The loss (S,) of each target: the cross-entropy -log p(target), in nats.

    To guess among n equally likely tokens costs log(n): 1.39 for four, 10.8 for all 49,152.

    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> loss = F.cross_entropy(logits, torch.tensor([2]))
    >>> loss.item(), torch.autograd.grad(loss, logits)[0].tolist()  # p, and p - 1 at the target
    (1.3862943649291992, [[0.25, 0.25, -0.75, 0.25]])
    """
    with autocast(model.device, dtype):  # products in `dtype`; the weights stay float32
        hidden_states = model(batch.tokens, batch.ribbon)  # (N, C)
        logits = model.logits(hidden_states[batch.rows])  # (S, V): no other row needs logits
    return F.cross_entropy(logits.float(), batch.targets, reduction="none")


def loss_sum(model: Llama, batch: Batch, dtype):
    """The loss of a ribbon, summed over its targets; the caller divides, once for a whole step.

    Averaging per-ribbon means would weight tokens by how the step was split.
    """
    return token_losses(model, batch, dtype).sum()


def held_out_batches(examples: Examples, max_tokens, device, title, share=list, batch_type=Batch):
    """Yield (indices, batch) of all examples; `share` may pick the batches of one process."""
    splits = share(micro_batches(range(len(examples)), examples.lengths, None, max_tokens))
    for indices in tqdm(splits, title, leave=False, disable=torchrun_place()[0] > 0):
        yield indices, batch_type.of(examples, indices, device)


@torch.no_grad()
def held_out_means(model: Llama, examples: Examples, max_tokens, dtype, processes: Processes,
                   should_stop=lambda: False, batch_type=Batch, terms_of=token_losses,
                   names=("val_loss",)):
    """{"val_loss": mean over all targets, in nats}; None if stopped.

    parrot.dpo passes its own batches and `terms_of`, which returns a row for each of `names`.
    """
    sums, num_terms = torch.zeros(len(names), dtype=torch.float64), 0
    for _, batch in held_out_batches(examples, max_tokens, model.device, "evaluating",
                                     processes.share, batch_type):
        if should_stop():
            break
        sums += terms_of(model, batch, dtype).sum(-1).cpu()
        num_terms += batch.num_terms
    *sums, num_terms, stopped = processes.sum(*sums.tolist(), num_terms, bool(should_stop()))
    return None if stopped else {name: x / num_terms for name, x in zip(names, sums, strict=True)}


def make_optimizer(model: Llama, config: TrainConfig):
    """AdamW (arXiv:1711.05101): weight -= lr * mean gradient / root of the mean square.

    Both means are running; the betas set over how many steps. Matrices also shrink by lr *
    weight_decay of their value per step. The norms' scales do not: at 0 they silence a layer.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=True)


def learning_rate(step, total_steps, peak, floor, warmup_ratio):
    """The learning rate of step `step` (from 0): up in a line, down in half a cosine.

    >>> [round(learning_rate(step, 6, 1.0, 0.0, 1 / 3), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)  # 0 to 1
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
