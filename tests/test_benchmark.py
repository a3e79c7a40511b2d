"""The figures' arithmetic; how fast anything is, is no test."""

import json

import pytest
import torch
from conftest import some_records, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from parrot import benchmark
from parrot.attention import Ribbon
from parrot.console import run_program


def test_flop_are_those_that_torch_counts():
    """Documents of one token, where attention is next to nothing, and half of the rows supervised."""
    model = tiny_model()
    with FlopCounterMode(display=False) as counter:
        rows = model(torch.arange(40), Ribbon([1] * 40))[::2]
        model.logits(rows).sum().backward()
    assert benchmark.flop_of(model, [1] * 40, 20) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_is_counted_within_documents_and_into_the_past():
    model = tiny_model()
    config = model.config

    def attention(lengths):  # the rest grows with the number of tokens alone
        return benchmark.flop_of(model, lengths, 0) - benchmark.flop_of(model, [0] * sum(lengths), 0) - linear * sum(lengths)
    linear = 6 * sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    # q k^T and weights v: 2 FLOP each for half of n x n places, H x D wide, in each layer; three times that with the backward
    whole = 3 * 2 * 2 * (10 * 10 / 2) * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert attention([10]) == whole and attention([5, 5]) == whole / 2


def test_medians_leave_out_the_first(monkeypatch):
    clock = iter([0, 100, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert benchmark.seconds(lambda: None, torch.device("cpu"), times=3) == 2


def test_the_whole_table(tiny_folder, records_file, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "first_word", lambda *_: 1.5)
    monkeypatch.setattr("sys.argv", ["benchmark", "--weights", str(tiny_folder), "--data", str(records_file(some_records(9))),
                                     "--steps", "1", "--batch-size", "4", "--device", "cpu", "--json"])
    run_program(benchmark.main)
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 9 and all(value > 0 for value in found.values())
    assert found["training, share of the matrix product's rate"] < 1 and found["sample.py to its first word, s"] == 1.5
