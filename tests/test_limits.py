"""The arithmetic of FLOP and medians; how fast anything is, is no test."""

import pytest
import torch
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from parrot import limits
from parrot.attention import Ribbon


def test_flop_are_those_that_torch_counts():
    """Documents of one token, where attention is next to nothing, and half of the rows supervised."""
    model = tiny_model()
    ribbon = Ribbon([1] * 40)
    ribbon.tiles = None  # which do more than has to be done
    with FlopCounterMode(display=False) as counter:
        rows = model(torch.arange(40), ribbon)[::2]
        model.logits(rows).sum().backward()
    assert limits.flop_of(model, [1] * 40, 20) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_is_counted_within_documents_and_into_the_past():
    model = tiny_model()
    config = model.config

    def attention(lengths):  # the rest grows with the number of tokens alone
        return limits.flop_of(model, lengths, 0) - limits.flop_of(model, [0] * sum(lengths), 0) - linear * sum(lengths)
    linear = 6 * sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    # q k^T and weights v: 2 FLOP each for half of n x n places, H x D wide, in each layer; three times that with the backward
    whole = 3 * 2 * 2 * (10 * 10 / 2) * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert attention([10]) == whole and attention([5, 5]) == whole / 2


def test_medians_leave_out_the_first(monkeypatch):
    clock = iter([0, 100, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    assert limits.seconds(lambda: None, torch.device("cpu"), times=3) == 2
