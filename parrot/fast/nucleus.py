"""sampling.ordered, faster on a CPU: the likeliest 1,024 tokens nearly always hold the nucleus.

Finding them takes 6 ms for 16 replies, sorting all 49,152 takes 30. Positive floats sort as their
bits do, read as integers; ids in the 32 bits below break ties as a stable sort does.
Held equal to the sort by tests/fast/test_nucleus.py.
"""

import torch

FEW = 1024


def likeliest(probabilities, mass):
    """probabilities (B, V) -> the FEW largest of each row, in descending order, and their ids.

    Two tensors (B, W); None if in some row they do not hold `mass`.
    """
    V = probabilities.shape[-1]
    bits = probabilities.view(torch.int32).long() << 32
    tokens = (bits + torch.arange(V - 1, -1, -1)).topk(min(V, FEW)).indices
    ordered = probabilities.gather(-1, tokens)
    return (ordered, tokens) if (ordered.sum(-1) >= mass).all() else None
