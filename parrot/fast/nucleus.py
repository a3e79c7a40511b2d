"""The sort in sampling.nucleus, faster on a CPU: 1,024 tokens nearly always hold the nucleus.

Finding them takes 6 ms for 16 replies, not the sort's 30. Held equal by tests/fast/test_nucleus.py.
"""

import torch

FEW = 1024


def likeliest(probabilities, top_p):
    """(B, V) -> each row's largest, sorted, and ids (B, W): FEW if these hold `top_p`, else V."""
    V = probabilities.shape[-1]
    if probabilities.device.type == "cpu":
        # Positive floats sort as their bits do; ids below them break ties as a stable sort does.
        keys = (probabilities.view(torch.int32).long() << 32) + torch.arange(V - 1, -1, -1)
        tokens = keys.topk(min(V, FEW)).indices
        few = probabilities.gather(-1, tokens)
        if (few.sum(-1) >= top_p).all():
            return few, tokens
    return probabilities.sort(dim=-1, descending=True, stable=True)
