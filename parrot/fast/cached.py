"""attention.Step, faster: query heads that share a key head are queries of one head.

So keys and values are not repeated, and only positions that are filled are read. On a CPU the
cache is in float32: small products take half as long. Held equal by tests/fast/test_cached.py.
"""

import math

import torch
import torch.nn.functional as F


def cache_dtype(model):
    """The type of the keys and values that wait for the next token."""
    return torch.float32 if model.device.type == "cpu" else model.dtype


class FastStep:
    """The cache's next column: one new token per sequence, at `positions` (B,)."""

    def __init__(self, cache, positions):
        device, T = positions.device, cache.keys.shape[3]
        is_cpu = device.type == "cpu"  # a GPU would have to wait, and a graph needs fixed shapes
        if is_cpu:
            T = int(positions.max()) + 1
        rows = torch.arange(len(positions), device=device)
        self.positions, self.index, self.mask = positions, (rows, slice(None), positions), None
        if is_cpu and positions.min() == T - 1:  # as with replies to one prompt
            self.index = slice(None), slice(None), -1
        else:  # (B, 1, 1, T): added to the scores; its rows lie in memory as a GPU wants them
            columns = torch.arange(T + -T % 16, device=device)
            mask = torch.where(columns <= positions[:, None], 0.0, -math.inf)[:, None, None]
            self.mask = mask.to(cache.keys.dtype)[..., :T]
        # All layers at once: 30 slices take longer.
        self.keys = cache.keys[:, :, :, :T].unbind()
        self.values = cache.values[:, :, :, :T].unbind()

    def attend(self, layer, q, k, v):
        """q (B, H, D), k and v (B, K, D) -> (B, H, D)."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, T, D)
        keys[self.index], values[self.index] = k.to(keys.dtype), v.to(keys.dtype)
        q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D)
        y = F.scaled_dot_product_attention(q_by_key_head, keys, values, self.mask)
        return y.flatten(1, 2).to(q.dtype)
