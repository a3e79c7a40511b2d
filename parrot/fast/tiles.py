"""attention.attention over the documents of a ribbon, faster on a CPU: in tiles.

A tile has up to 256 queries, of several short documents or a part of a long one, and all keys up
to its end: large enough to be fast, small enough for the caches. The quick start trains 7% faster
than by the formula (two cores, float32). Held equal by tests/fast/test_tiles.py.
Shapes: as in attention.py, G = H / K; a tile has n queries and m keys.
"""

import math

import torch

TILE = 256  # queries at most
MAX_LENGTH = 2048  # tokens of a document, whose softmax is kept: 40 MB a layer in bfloat16


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
        self.spans = cut(lengths)
        self.masks = [mask_of(document, *span) for span in self.spans]  # once for all layers

    def attend(self, q, k, v):
        """Causal attention within documents: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        K, outputs = k.shape[1], []
        starts = [query for _, query, _ in self.spans]
        sizes = [end - query for _, query, end in self.spans]
        # (K, n, G, D) for each tile: query heads that share a key head stand together.
        q, k, v = (x.unflatten(1, (K, -1)).transpose(0, 1).contiguous().split(sizes, dim=1)
                   for x in (q * q.shape[2] ** -0.5, k, v))
        with torch.autocast(q[0].device.type, enabled=False):  # its softmax would keep float32
            for tile, ((key, _, _), mask) in enumerate(zip(self.spans, self.masks, strict=True)):
                seen = slice(starts.index(key), tile + 1)  # the tiles that hold its keys
                keys, values = (torch.cat(x[seen], dim=1).squeeze(2) for x in (k, v))  # (K, m, D)
                scores = q[tile].flatten(1, 2) @ keys.transpose(1, 2)  # (K, n G, m)
                scores.unflatten(1, (len(mask), -1)).add_(mask)
                weights = scores.softmax(-1)
                outputs.append((weights @ values).unflatten(1, (len(mask), -1)))  # (K, n, G, D)
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1, 2)


def mask_of(document, key, query, end):
    """(n, 1, m): minus infinity where a key is later or of another document, else 0."""
    visible = document[query:end, None] == document[key:end]
    return torch.where(visible.tril(query - key), 0.0, -math.inf)[:, None]
