"""What this machine could do at most, and how much a step of training has to do."""

import statistics
import time

import torch


def seconds(work, device, times=5):
    """The median time of `work()`, after one call that does not count."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def matrix_rate(device, dtype):
    """FLOP a second of one large matrix product in `dtype`."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, device)


def memory_rate(device):
    """Bytes a second of reading memory that no cache holds."""
    numbers = torch.ones(2 ** 27, device=device)  # half a gigabyte
    return numbers.nbytes / seconds(lambda: numbers.sum(), device)


def flop_of(model, lengths, supervised):
    """FLOP of one forward and backward: of what has to be computed, whatever the code does.

    A matrix product with W costs 2 FLOP for each weight and row, its backward twice that.
    Attention is counted within each example and only into the past, the last matrix only for
    supervised rows.
    """
    config = model.config
    linear = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    attention = sum(2 * n * n for n in lengths) * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    head = 2 * supervised * config.vocab_size * config.hidden_size
    return 3 * (2 * linear * sum(lengths) + attention + head)
