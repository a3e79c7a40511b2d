"""The cache: a new token looks at the past. A copy of parrot/attention.py, Step.attend.

`self` is a Step: its `cache` has keys and values (layers, B, K, T, D) and `write`; its `index` is
where the new keys and values belong; its `visible` (B, 1, 1, T) is True at the sequence's past and
at the new token itself. Two lines are missing: the one that stores, and what the query may see.
"""

from parrot.attention import attention


def attend(self, layer, q, k, v):
    """Each new token looks at its own sequence's past and at itself."""
    ...  # your line here
    keys, values = self.cache.keys[layer], self.cache.values[layer]  # (B, K, T, D)
    q_rows = q[:, :, None].to(keys.dtype)  # (B, H, 1, D)
    y = attention(q_rows, keys, values, self.visible | True)  # your line here
    return y[:, :, 0].to(q.dtype)
