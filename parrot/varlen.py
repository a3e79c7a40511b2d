"""All documents of a ribbon in one call, on a GPU: torch's variable-length flash attention.

On a CPU there is no such kernel, and on a GPU before compute capability 8.0 (a T4, say) it does
not run; there attention.py goes from document to document.
"""

import functools
import inspect

import torch


def works_on(device):
    """Whether this device and this torch have the kernel."""
    device = torch.device(device)
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) and kernel() is not None


def takes(q):
    """Whether the kernel knows this type and this size of heads; the rest goes from document to document."""
    return q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


@functools.cache
def kernel():
    """torch's varlen_attn, None before torch 2.10. Imported late: on a CPU that second would be for nothing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def seams(lengths):
    """Lengths of documents -> where each begins, and the end of the last (documents + 1,).

    >>> seams([3, 2])
    tensor([0, 3, 5], dtype=torch.int32)
    """
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attend(q, k, v, seams, longest):
    """Causal attention within documents: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
    options = inspect.signature(kernel()).parameters  # in 2.10 is_causal, then window_size, then enable_gqa, too
    if "enable_gqa" in options:
        causal = {"window_size": (-1, 0), "enable_gqa": True}  # torch 2.12 and newer
    else:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (N, H, D)
        causal = {"window_size": (-1, 0)} if "window_size" in options else {"is_causal": True}
    return kernel()(q, k, v, seams, seams, longest, longest, **causal)
