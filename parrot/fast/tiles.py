"""attention.attention over the documents of a ribbon, faster on a CPU: in tiles.

A tile has up to 256 queries, of several short documents or a part of a long one, and all keys up
to its end: large enough to be fast, small enough for the caches. 0.19 s for a layer in two steps of
Dolly, with torch's attention 0.62 (two cores, bfloat16). Held equal by tests/fast/test_tiles.py.
Shapes: as in attention.py, G = H / K; a tile has n queries and m keys.
"""

import math

import torch

TILE = 256  # queries at most
LONGEST = 2048  # tokens of a document, whose softmax is kept: 40 MB a layer in bfloat16


def cut(lengths):
    """Lengths of documents -> tiles [first key, first query, end], positions on the ribbon.

    >>> cut([100, 60, 300])  # two together; then one in halves, the second with the first's keys
    [[0, 0, 160], [160, 160, 310], [160, 310, 460]]
    """
    tiles, start, room = [], 0, 0  # room: for queries in the last tile
    for length in lengths:
        end = start + length
        if length <= room:
            tiles[-1][2] = end
            room -= length
        else:
            parts = math.ceil(length / TILE)
            size = math.ceil(length / parts)
            tiles += [[start, first, min(first + size, end)] for first in range(start, end, size)]
            room = TILE - length
        start = end
    return tiles


class Tiles:
    def __init__(self, lengths):
        document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,)
        self.places = cut(lengths)
        self.masks = [mask_of(document, *place) for place in self.places]  # once for all layers

    def attend(self, q, k, v):
        """Causal attention within documents: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        with torch.autocast(q.device.type, enabled=False):  # its softmax would keep float32
            return _Attention.apply(q, k, v, self.places, self.masks)


def mask_of(document, key, query, end):
    """(n, 1, m): minus infinity where a key is later or of another document, else 0."""
    visible = document[query:end, None] == document[key:end]
    return torch.where(visible.tril(query - key), 0.0, -math.inf)[:, None]


class _Attention(torch.autograd.Function):
    """y = weights v, weights = softmax(q k^T / sqrt(D) + mask), tile by tile; then backwards."""

    @staticmethod
    def forward(ctx, q, k, v, places, masks):
        """q (N, H, D), k and v (N, K, D) -> y (N, H, D)."""
        y, K, all_weights = torch.empty_like(q), k.shape[1], []
        result = by_key_head(y, K)  # the same memory
        q = by_key_head(q * q.shape[2] ** -0.5, K).contiguous()  # once, not once a tile
        k, v = by_key_head(k, K).contiguous(), by_key_head(v, K).contiguous()
        for (key, query, end), mask in zip(places, masks, strict=True):
            scores = rows(q, query, end) @ rows(k, key, end).transpose(1, 2)  # (K, n G, m)
            scores.view(K, len(mask), -1, mask.shape[2]).add_(mask)
            weights = scores.softmax(-1)
            y_rows = weights @ rows(v, key, end)
            result[:, query:end] = y_rows.view_as(result[:, query:end])
            all_weights.append(weights)
        ctx.places = places
        ctx.save_for_backward(q, k, v, *all_weights)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """The gradient of y -> those of q, k and v."""
        q, k, v, *all_weights = ctx.saved_tensors
        grad_y = by_key_head(grad_y, len(k)).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (key, query, end), weights in zip(ctx.places, all_weights, strict=True):
            grad = rows(grad_y, query, end)  # (K, n G, D)
            # Several tiles of a document share its keys and values: their gradients add up.
            rows(grad_v, key, end).add_(weights.transpose(1, 2) @ grad)
            grad_weights = grad @ rows(v, key, end).transpose(1, 2)  # (K, n G, m)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            rows(grad_k, key, end).add_(grad_scores.transpose(1, 2) @ rows(q, query, end))
            rows(grad_q, query, end).copy_(grad_scores @ rows(k, key, end))
        grad_q *= q.shape[3] ** -0.5
        grads = (x.transpose(0, 1).flatten(1, 2) for x in (grad_q, grad_k, grad_v))
        return *grads, None, None


def by_key_head(x, K):
    """x (N, heads, D) -> (K, N, heads / K, D): query heads that share keys stand together."""
    return x.unflatten(1, (K, -1)).transpose(0, 1)


def rows(x, first, end):
    """These tokens of x (K, N, G, D) as one matrix per key head: (K, n G, D), a view."""
    return x[:, first:end].flatten(1, 2)
