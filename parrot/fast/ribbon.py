"""attention.Ribbon.attend, faster: by kernels that keep no weight for each pair of tokens.

With short examples on a CPU it is as fast as the formula, which for a document of 2,048 tokens
keeps 4.5 GB. Held equal by tests/test_attention.py, on a GPU by tests/benchmarks/gpu.py.
"""

import torch
import torch.nn.functional as F


def attention_by_torch(q, k, v, visible):  # attention.attention in one operation
    return F.scaled_dot_product_attention(q, k, v, visible)


class FastAttention:
    def __init__(self, lengths, device):
        self.lengths, self.longest, self.seams = lengths, max(lengths), None
        is_cuda = torch.device(device).type == "cuda" and not torch.version.hip  # ROCm: never tried
        if is_cuda and torch.cuda.get_device_capability(device) >= (8, 0):
            seams = torch.tensor([0, *lengths]).cumsum(0)  # where each begins, the end of the last
            self.seams = seams.to(device, torch.int32)

    def has_kernel(self, dtype, head_dim):
        """Whether torch's varlen_attn takes the ribbon, all documents in one call."""
        is_supported = dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= 256
        return self.seams is not None and is_supported

    def attend(self, q, k, v):
        """Causal attention inside each document: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        # With fewer key/value than query heads, kernels for older cards keep n x n weights.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (N, H, D)
        if self.has_kernel(q.dtype, q.shape[-1]):
            seams, longest = self.seams, self.longest
            from torch.nn.attention.varlen import varlen_attn  # takes a second, so only on a GPU
            return varlen_attn(q, k, v, seams, seams, longest, longest, window_size=(-1, 0))
        # On a CPU bfloat16 takes four times as long as float32 for a short document's backward.
        dtype = torch.float32 if q.device.type == "cpu" else q.dtype
        documents = zip(*(x.to(dtype).transpose(0, 1)[None].split(self.lengths, dim=2)
                          for x in (q, k, v)), strict=True)
        with torch.autocast(q.device.type, enabled=False):
            outputs = [F.scaled_dot_product_attention(*document, is_causal=True)
                       for document in documents]  # (1, H, n, D) each
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).to(q.dtype)  # (N, H, D)
