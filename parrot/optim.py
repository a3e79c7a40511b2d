"""How the weights move: AdamW, and a learning rate that warms up and cools down."""

import math

import torch


def make_optimizer(model, config):
    """AdamW (arXiv:1711.05101) that decays matrices and leaves the norms' scales alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    scales = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=1e-8, fused=True)


def learning_rate(step, total_steps, peak, floor, warmup_ratio):
    """The learning rate of step `step` (from 0): up in a line, down in half a cosine.

    >>> [round(learning_rate(step, 6, peak=1.0, floor=0.0, warmup_ratio=1 / 3), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """
    warmup = round(warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)  # 0 to 1
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
