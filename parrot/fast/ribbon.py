"""attention.Ribbon.attend, faster: which kernel takes the documents of a ribbon.

    a CPU                                       tiles.py, documents of up to 2,048 tokens
    CUDA, 16 bits, compute capability 8.0       torch's varlen_attn: all documents in one call
    the rest, and ROCm, where it was never run  torch's own attention, a document at a time

Held equal by tests/test_attention.py, on a GPU by tests/benchmarks/gpu.py.
"""

import torch
import torch.nn.functional as F

from parrot.fast import tiles
from parrot.system.device import send


class FastAttention:
    def __init__(self, lengths, device):
        self.lengths, self.longest, self.tiles, self.seams = lengths, max(lengths), None, None
        device = torch.device(device)
        if device.type == "cpu" and self.longest <= tiles.MAX_LENGTH:
            self.tiles = tiles.Tiles(lengths)
        elif (device.type == "cuda" and not torch.version.hip
              and torch.cuda.get_device_capability(device) >= (8, 0)):
            seams = torch.tensor([0, *lengths]).cumsum(0)  # where each begins, the end of the last
            self.seams = send(seams.to(torch.int32), device)

    def has_kernel(self, dtype, head_dim):
        """Whether varlen_attn takes the ribbon."""
        is_known = dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= 256
        return self.seams is not None and is_known

    def attend(self, q, k, v):
        """Causal attention inside each document: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        if self.tiles:
            return self.tiles.attend(q, k, v)
        # As many key/value heads as query heads: with fewer, torch has no kernel for older cards
        # that does without n x n weights.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (N, H, D)
        if self.has_kernel(q.dtype, q.shape[-1]):
            seams, longest = self.seams, self.longest
            from torch.nn.attention.varlen import varlen_attn  # takes a second, so only on a GPU
            return varlen_attn(q, k, v, seams, seams, longest, longest, window_size=(-1, 0))
        q, k, v = (x.transpose(0, 1)[None].split(self.lengths, dim=2) for x in (q, k, v))
        outputs = [F.scaled_dot_product_attention(*document, is_causal=True)
                   for document in zip(q, k, v, strict=True)]  # (1, H, n, D) each
        return torch.cat(outputs, dim=2)[0].transpose(0, 1)  # (N, H, D)
