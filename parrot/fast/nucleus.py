"""sampling.ordered, faster on a CPU: the likeliest tokens without sorting the vocabulary.

A few of the 49,152 tokens nearly always hold the nucleus; finding 1,024 of them takes 6 ms for 16
replies, sorting all takes 30. The bits of positive floats are in the order of the floats; below
them stands what breaks a tie, so equal tokens come in the order of their ids, as in a stable sort.
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
