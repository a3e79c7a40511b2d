"""Attention over a ribbon on a CPU: the formula on tiles of its triangle, forward and back by hand.

A tile is some hundred queries: several short documents, or a part of a long one with all keys up to its
end. Its matrix products are large enough to be fast and small enough for the caches: for one layer and two
steps of Dolly 0.19 s, where torch's own attention, a document at a time, takes 0.62 (bfloat16, 2 cores).

Shapes: N tokens, H query heads, K key/value heads, G = H / K, D head size; a tile has n queries, m keys.
"""

import torch

TILE = 256  # queries at most
LONGEST = 2048  # of a document: m x n weights wait for the backward, 40 MB a layer for one of this length in bfloat16


def cut(lengths):
    """Lengths of documents -> tiles (first key, first query, end), places on the ribbon.

    >>> cut([100, 60, 300])  # two together; then one in halves, the second half with the first's keys
    [(0, 0, 160), (160, 160, 310), (160, 310, 460)]
    """
    tiles, start, full = [], 0, TILE  # full: queries in the last tile
    for length in lengths:
        end, full = start + length, full + length
        if full <= TILE:
            tiles[-1] = (*tiles[-1][:2], end)
        else:
            full, size = length, -(-length // -(-length // TILE))
            tiles += [(start, first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return tiles


class Tiles:
    """The tiles of a ribbon of documents of these lengths."""

    def __init__(self, lengths):
        self.document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # (N,)
        self.places, self.masks = cut(lengths), {}

    def attend(self, q, k, v):
        """Causal attention within documents: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        if q.dtype not in self.masks:  # the same for all layers
            self.masks[q.dtype] = [self._mask(*place, q.dtype) for place in self.places]
        with torch.autocast(q.device.type, enabled=False):  # its softmax would be in float32, and kept
            return _Attention.apply(q, k, v, self.places, self.masks[q.dtype])

    def _mask(self, key, query, end, dtype):
        """(n, 1, m): 0, and minus infinity where what a query would see comes later, or is of another document."""
        seen = self.document[query:end, None] == self.document[key:end]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen.tril(query - key), float("-inf"))[:, None]


class _Attention(torch.autograd.Function):
    """y = weights v with weights = softmax(q k^T / sqrt(D) + mask), a tile at a time; then the same backwards."""

    @staticmethod
    def forward(ctx, q, k, v, places, masks):
        """Tiles.attend; of each tile its weights are kept."""
        y, K, all_weights = torch.empty_like(q), k.shape[1], []
        result = by_key_head(y, K)  # the same memory
        q, k, v = (by_key_head(x, K).contiguous() for x in (q * q.shape[2] ** -0.5, k, v))  # once, not once a tile
        for (key, query, end), mask in zip(places, masks):
            scores = rows(q, query, end) @ rows(k, key, end).transpose(1, 2)  # (K, n G, m)
            scores.view(K, len(mask), -1, mask.shape[2]).add_(mask)
            weights = scores.softmax(-1)
            result[:, query:end] = (weights @ rows(v, key, end)).view_as(result[:, query:end])
            all_weights.append(weights)
        ctx.places = places
        ctx.save_for_backward(q, k, v, *all_weights)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """grad_y (N, H, D) -> those of q, k and v: products with the weights, and softmax's own backward."""
        q, k, v, *all_weights = ctx.saved_tensors
        grad_y = by_key_head(grad_y, len(k)).contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (key, query, end), weights in zip(ctx.places, all_weights):
            grad = rows(grad_y, query, end)  # (K, n G, D)
            rows(grad_v, key, end).add_(weights.transpose(1, 2) @ grad)  # several tiles of a document share its keys
            grad_scores = torch._softmax_backward_data(grad @ rows(v, key, end).transpose(1, 2), weights, -1, weights.dtype)
            rows(grad_k, key, end).add_(grad_scores.transpose(1, 2) @ rows(q, query, end))
            rows(grad_q, query, end).copy_(grad_scores @ rows(k, key, end))
        grad_q *= q.shape[3] ** -0.5
        return *(x.transpose(0, 1).flatten(1, 2) for x in (grad_q, grad_k, grad_v)), None, None


def by_key_head(x, K):
    """x (N, heads, D) -> (K, N, heads / K, D): the query heads that share keys stand together."""
    return x.unflatten(1, (K, -1)).transpose(0, 1)


def rows(x, first, end):
    """These tokens of x (K, N, G, D), as the rows of one matrix for each key head: (K, n G, D)."""
    return x[:, first:end].flatten(1, 2)
