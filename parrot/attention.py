"""Attention: which tokens each token looks at, and how much of each it takes.

A *layout* says how the N tokens of a forward belong together: a *ribbon* of documents, end to end
(training, prompts), or the next tokens of several replies, with a *key/value cache*. It has their
positions (N,), from 0 in each document, and attend(layer, q, k, v), as in `Ribbon.attend`.

Shapes: N tokens, H query heads, K key/value heads (H is a multiple of K), D head size,
B sequences, T cached positions.
"""

from __future__ import annotations

import math

import torch

from parrot import fast
from parrot.fast.ribbon import FastAttention, attention_by_torch


def attention(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v: a mean of the values, weighted by how well query and key agree.

    q (..., H, n, D), k and v (..., K, m, D), visible (..., n, m) bool -> (..., H, n, D). Undivided,
    sums of D products would grow with sqrt(D), and softmax pick one value (arXiv:1706.03762).

    >>> q, k = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> v = torch.tensor([[[10.0, 0.0], [0.0, 10.0]]])
    >>> attention(q, k, v, torch.tensor([[True, True]]))  # e^(2 / sqrt(2)) : e^0 = 4.11 : 1
    tensor([[[8.0443, 1.9557]]])
    >>> attention(q, k, v, torch.tensor([[False, True]]))  # the first key may not be seen
    tensor([[[ 0., 10.]]])
    """
    group = q.shape[-3] // k.shape[-3]  # query heads per key/value head
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))  # (..., H, m, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (..., H, n, m)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return weights.to(v.dtype) @ v


def causal(n, device="cpu"):
    """(n, n) bool: a token sees itself and what came before; if it saw the next, it would copy it.

    >>> causal(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


class Ribbon:
    """Documents of `lengths` tokens laid end to end, without padding between them.

    >>> Ribbon([3, 2]).positions
    tensor([0, 1, 2, 0, 1])
    """

    def __init__(self, lengths: list[int], device="cpu", cache: KVCache | None = None):
        self.lengths, self.cache = lengths, cache
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,)
        sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,)
        self.index = sequences.to(device), slice(None), self.positions  # (N, K, D) of a layer
        self.fast = FastAttention(lengths, device) if fast.enabled else None  # fast/ribbon.py

    def attend(self, layer, q, k, v):
        """q (N, H, D), k and v (N, K, D) -> (N, H, D): causal inside each document."""
        if self.cache:  # a prompt fills it
            self.cache.keys[layer][self.index] = k.to(self.cache.keys.dtype)
            self.cache.values[layer][self.index] = v.to(self.cache.keys.dtype)
        if self.fast:
            return self.fast.attend(q, k, v)
        q, k, v = (x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v))  # (heads, n, D)
        documents = zip(q, k, v, strict=True)
        outputs = [attention(q, k, v, causal(q.shape[1], q.device)) for q, k, v in documents]
        return torch.cat(outputs, dim=1).transpose(0, 1)  # (N, H, D)


class KVCache:
    """The keys and values that B sequences have so far: a new token costs the work of one token.

    `model(tokens, cache.prefill(lengths))` reads prompts, `model(tokens, cache.step())` one token.
    """

    def __init__(self, config, batch_size, capacity, dtype=torch.float32, device="cpu"):
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.keys = torch.zeros(layers, batch_size, K, capacity, D, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)  # (layers, B, K, T, D)
        self.filled = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        self.is_cuda = self.filled.device.type == "cuda"

    def prefill(self, lengths: list[int]) -> Ribbon:
        """The ribbon of the B prompts, which writes into this cache as it attends."""
        self.filled = torch.tensor(lengths, device=self.keys.device)
        return Ribbon(lengths, self.keys.device, self)

    def select(self, sequences):
        """Keep these sequences (B', indices) in this order: some of them, or one several times."""
        self.keys, self.values = self.keys[:, sequences], self.values[:, sequences]
        self.filled = self.filled[sequences]

    def step(self) -> Step:
        positions = self.filled.clone()  # (B,)
        self.filled += 1  # in place, so that fast/captured.py can replay it
        return Step(self, positions)


class Step:
    """One new token for each of B sequences: N = B."""

    def __init__(self, cache: KVCache, positions):
        self.positions = positions
        sequences = torch.arange(len(positions), device=positions.device)
        self.index = sequences, slice(None), positions  # (B, K, D) of a layer of the cache
        # Empty places are not read; but on a GPU, asking for the largest position costs a wait.
        T = cache.keys.shape[3] if cache.is_cuda else int(positions.max()) + 1
        self.keys, self.values = (x[:, :, :, :T] for x in (cache.keys, cache.values))
        places = torch.arange(T, device=positions.device)
        self.visible = (places <= positions[:, None])[:, None, None]  # (B, 1, 1, T)

    def attend(self, layer, q, k, v):
        """Each new token looks at its own sequence's past and at itself."""
        keys, values = self.keys[layer], self.values[layer]  # (B, K, T, D) each
        keys[self.index], values[self.index] = k.to(keys.dtype), v.to(keys.dtype)
        # Query heads with one key head act as queries of one head, so nothing is repeated.
        q_by_key_head = q.unflatten(1, (k.shape[1], -1)).to(keys.dtype)  # (B, K, H / K, D)
        attend = attention_by_torch if fast.enabled else attention  # fast/ribbon.py
        return attend(q_by_key_head, keys, values, self.visible).flatten(1, 2).to(q.dtype)
