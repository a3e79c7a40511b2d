"""The rotation: how a vector comes to know its position. A copy of parrot/model.py, rotate.

Pair i of a head is (x[i], x[i + D / 2]): a point in a plane. Turn each by its angle.
"""

import torch


def rotate(x, cos, sin):
    """Turn each pair of x (N, heads, D) by its angle; cos and sin (N, 1, D / 2)."""
    first, second = x.float().chunk(2, dim=-1)  # (N, heads, D / 2) each
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
