"""The shift by one: which row predicts which token. A copy of parrot/data.py, Batch.of.

`tokens` are those of all examples, end to end, and `is_target` says of each whether it is one.
Say which rows have a target, and what these targets are: row r predicts token r + 1.
"""

import numpy as np
import torch

from parrot.attention import Ribbon


def of(cls, examples, indices, device="cpu"):
    """The ribbon of some examples."""
    parts = [examples[index] for index in indices]
    tokens = np.concatenate([tokens for tokens, _ in parts]).astype(np.int64)  # (N,)
    is_target = np.concatenate([is_target for _, is_target in parts])  # (N,) bool
    rows = is_target  # your line here
    targets = tokens  # your line here
    ribbon = Ribbon([len(tokens) for tokens, _ in parts], device)
    tokens, rows, targets = (torch.from_numpy(array) for array in (tokens, rows, targets))
    return cls(tokens, ribbon, rows, targets, len(targets))
