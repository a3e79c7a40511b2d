"""The cache: a new token looks at the past. A copy of parrot/attention.py, Step.attend.

`self` is a Step: its `keys` and `values` are views (layers, B, K, T, D) of what the cache holds;
its `index` is where the new ones belong in a layer; its `visible` (B, 1, 1, T) is True at the
sequence's past and at the new token itself. Two lines are missing: the one that stores, and what
the query may see.
"""

from parrot.attention import attention


def attend(self, layer, q, k, v):
    """Each new token looks at its own sequence's past and at itself."""
    keys, values = self.keys[layer], self.values[layer]  # (B, K, T, D) each
    keys[self.index], values[self.index] = k.to(keys.dtype), v.to(keys.dtype)
    q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D)
    y = attention(q_by_key_head, keys, values, self.visible)
    return y.flatten(1, 2).to(q.dtype)
