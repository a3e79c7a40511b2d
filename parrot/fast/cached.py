"""attention.Step, faster: one new token per sequence looks into the key/value cache.

The H / K query heads that share a key head are queries of one head, so keys and values are not
repeated; only the positions that are filled are read. On a CPU the cache is in float32: its small
products are twice as fast as in bfloat16. Held equal by tests/fast/test_cached.py.
"""

import torch
import torch.nn.functional as F


def cache_dtype(model):
    return torch.float32 if model.device.type == "cpu" else model.dtype


class FastStep:
    def __init__(self, cache, positions):
        self.positions = positions  # (B,)
        device, longest = positions.device, cache.keys.shape[3]
        if device.type == "cpu":  # a GPU would have to wait, and a graph needs fixed shapes
            longest = int(positions.max()) + 1
        rows = torch.arange(len(positions), device=device)
        places = torch.arange(longest, device=device)
        self.index = (rows, slice(None), positions)
        self.visible = (places <= positions[:, None])[:, None, None]  # (B, 1, 1, T)
        if device.type == "cpu" and self.visible.all():  # as with replies to one prompt
            self.index, self.visible = (slice(None), slice(None), -1), None
        # All layers at once: 30 slices take longer.
        self.keys = cache.keys[:, :, :, :longest].unbind()
        self.values = cache.values[:, :, :, :longest].unbind()

    def attend(self, layer, q, k, v):
        """q (B, H, D), k and v (B, K, D) -> (B, H, D)."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, T, D)
        keys[self.index], values[self.index] = k.to(keys.dtype), v.to(keys.dtype)
        q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D)
        y = F.scaled_dot_product_attention(q_by_key_head, keys, values, self.visible)
        return y.flatten(1, 2).to(q.dtype)
