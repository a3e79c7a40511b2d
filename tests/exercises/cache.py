"""The cache: a new token looks at the past. A copy of parrot/attention.py, Step.attend.

`self` is a Step: its `cache` has keys and values (layers, B, K, T, D) and `write`; its `index` is
where the new keys and values belong, its `T` how many positions to read; its `visible` (B, 1, 1, T)
is True at the sequence's past and at the new token itself. Two lines are missing: the one that stores, and what the query may see.
"""

from parrot.attention import attention


def attend(self, layer, q, k, v):
    """Each new token looks at its own sequence's past and at itself."""
    ...  # your line here
    keys = self.cache.keys[layer, :, :, :self.T]  # (B, K, T, D)
    values = self.cache.values[layer, :, :, :self.T]
    q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D)
    y = attention(q_by_key_head, keys, values, self.visible | True)  # your line here
    return y.flatten(1, 2).to(q.dtype)
