"""Where tokens stand, and which earlier tokens each may look at.

The model is the same everywhere; only attention knows whether its N tokens are a *ribbon*
(documents laid end to end, for training and for reading prompts) or the next tokens of
several replies that look back into a *key/value cache*. Both answer two questions:

    positions            (N,)  the place of each token in its own document, from 0
    attend(layer, q, k, v)     q (N, H, D), k and v (N, K, D) -> (N, H, D)

Shapes: N tokens, H query heads, K key/value heads (H is a multiple of K), D head size,
B sequences, T cached positions.
"""

import torch
import torch.nn.functional as F

from parrot import tiles, varlen
from parrot.device import send


class Ribbon:
    """Documents of `lengths` tokens laid end to end, without padding between them.

    >>> Ribbon([3, 2]).positions
    tensor([0, 1, 2, 0, 1])
    """

    def __init__(self, lengths, device="cpu"):
        self.lengths = lengths
        self.positions = send(torch.cat([torch.arange(n) for n in lengths]), device)  # (N,)
        self.seams = send(varlen.seams(lengths), device) if varlen.works_on(device) else None
        self.tiles = tiles.Tiles(lengths) if torch.device(device).type == "cpu" and max(lengths) <= tiles.LONGEST else None

    def attend(self, layer, q, k, v):
        """Causal attention inside each document; never across a seam."""
        if self.seams is not None and varlen.takes(q):
            return varlen.attend(q, k, v, self.seams, max(self.lengths))
        if self.tiles is not None:
            return self.tiles.attend(q, k, v)
        documents = zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v)))  # each (heads, n, D)
        return torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
                          for q, k, v in documents], dim=1).transpose(0, 1)  # (N, H, D)


class KVCache:
    """The keys and values of B sequences, so that a new token costs one token's work.

    First the prompts are read as a ribbon: `model(tokens, cache.prefill(lengths))`. Then each
    call of `model(tokens (B,), cache.step())` adds one token to every sequence.
    """

    def __init__(self, config, batch_size, capacity, dtype=torch.float32, device="cpu"):
        self.model_dtype = dtype  # prompts are read in it
        if torch.device(device).type == "cpu":
            dtype = torch.float32  # its small products are twice as fast as those of bfloat16
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (layers, B, K, T, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.filled = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        # Fixed shapes: the CPU need not wait for a GPU to tell the longest length, and captured.py can replay.
        self.static = self.keys.device.type == "cuda"

    def write(self, layer, here, k, v):
        """Keep k and v (N, K, D) at `here`, an index of (B, K, T)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[here], values[here] = k.to(keys.dtype), v.to(values.dtype)

    def prefill(self, lengths):
        """The ribbon of the B prompts, which writes into this cache as it attends."""
        self.filled = torch.tensor(lengths, device=self.keys.device)
        return _Prefill(self, lengths)

    def select(self, rows):
        """Keep these sequences (B', indices) in this order: some of them, or one several times."""
        self.keys, self.values, self.filled = self.keys[:, rows], self.values[:, rows], self.filled[rows]

    def step(self):
        """Where the next token of every sequence stands."""
        positions = self.filled.clone()
        self.filled += 1  # in place: captured.py replays it
        return _Step(self, positions)


class _Prefill(Ribbon):
    def __init__(self, cache, lengths):
        super().__init__(lengths, cache.keys.device)
        rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,) whose token it is
        self.cache, self.here = cache, (rows.to(cache.keys.device), slice(None), self.positions)

    def attend(self, layer, q, k, v):
        self.cache.write(layer, self.here, k, v)
        return super().attend(layer, *(x.to(self.cache.model_dtype) for x in (q, k, v)))


class _Step:
    def __init__(self, cache, positions):
        self.cache, self.positions = cache, positions  # positions (B,): N = B here
        first, last = (0, cache.keys.shape[3] - 1) if cache.static else positions.aminmax()
        self.longest = int(last) + 1
        if first == last:  # replies to one prompt: all stand at one place, and nothing lies beyond it
            self.here, self.visible = (slice(None), slice(None), int(last)), None
        else:
            rows, places = (torch.arange(n, device=positions.device) for n in (len(positions), self.longest))
            self.here = (rows, slice(None), positions)
            self.visible = (places <= positions[:, None])[:, None, None]  # (B, 1, 1, T)
        self.past = [x[:, :, :, :self.longest].unbind() for x in (cache.keys, cache.values)]  # at once: 30 slices take longer

    def attend(self, layer, q, k, v):
        """Each new token looks at its own sequence's past and at itself."""
        self.cache.write(layer, self.here, k, v)
        keys, values = self.past[0][layer], self.past[1][layer]  # (B, K, T, D)
        q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D): as if H / K tokens asked
        return F.scaled_dot_product_attention(q_by_key_head, keys, values, self.visible).flatten(1, 2).to(q.dtype)
