"""The benchmarks' tables come out whole; how fast anything is, is no test."""

import doctest
import json
import math
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, some_records, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from parrot import attention, fast, sampling
from parrot.attention import Ribbon
from parrot.fast import compiling, nucleus, ribbon
from parrot.system.console import run_program

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import compare
import gpu
import speed
import tricks


@pytest.fixture
def arguments(tiny_folder, records_file):
    """A function: options of the script -> a command line for the tiny model and tiny data."""
    data = records_file(some_records(9))

    def arguments(*options):
        return ["script", "--weights", str(tiny_folder), "--data", str(data), "--device", "cpu",
                *options]
    return arguments


def test_the_scripts_examples():
    for module in (compare, gpu, speed, tricks):
        assert doctest.testmod(module).failed == 0


# ---- speed.py

def test_speed_prints_the_whole_table(arguments, monkeypatch, capsys):
    monkeypatch.setattr(speed, "first_word", lambda *_: 1.5)
    monkeypatch.setattr("sys.argv", arguments("--steps", "1", "--batch-size", "4", "--json"))
    run_program(speed.main)
    figures = json.loads(capsys.readouterr().out)
    assert len(figures) == 9 and all(value > 0 for value in figures.values())
    assert figures["training, share of the matrix product's rate"] < 1
    assert figures["sample.py to its first word, s"] == 1.5


def test_flop_are_those_that_torch_counts(monkeypatch):
    """Documents of one token, where attention is next to nothing, and half of the rows targets."""
    monkeypatch.setattr(fast, "enabled", False)
    model = tiny_model()
    with FlopCounterMode(display=False) as counter:
        rows = model(torch.arange(40), Ribbon([1] * 40))[::2]
        model.logits(rows).sum().backward()
    flop = 40 * speed.flop_per_token(model, np.ones(40), 0.5)
    assert flop == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_is_counted_within_documents_and_into_the_past():
    model = tiny_model()
    config = model.config

    def of_attention(lengths):
        lengths = np.array(lengths, float)
        linear = speed.flop_per_token(model, np.array([1e-9]), 0)
        return lengths.sum() * (speed.flop_per_token(model, lengths, 0) - linear)
    # q k^T and weights v: 2 FLOP each for half of n x n places, H x D wide, in each layer; three
    # times that with the backward.
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert of_attention([10]) == pytest.approx(3 * 2 * 2 * (10 * 10 / 2) * width)
    assert of_attention([5, 5]) == pytest.approx(of_attention([10]) / 2)


def test_medians_leave_out_the_first(monkeypatch):
    clock = iter([0, 100, 0, 3, 0, 1, 0, 2])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed.seconds(lambda: None, torch.device("cpu"), times=3) == 2


# ---- tricks.py

NAMES = {  # speed-up -> what is in its place when it is on
    "ribbon attention": (attention, "FastAttention", ribbon.FastAttention),
    "training graphs": (compiling, "CapturedForward", compiling.CapturedForward),
    "compile": (compiling, "compile_blocks", compiling.compile_blocks),
    "step by torch's attention": (attention, "attention_by_torch", ribbon.attention_by_torch),
    "captured step": (sampling, "CapturedStep", sampling.CapturedStep),
    "nucleus": (sampling, "likeliest", nucleus.likeliest),
    "packed": (tricks.assistant, "pack", tricks.assistant.pack)}


@pytest.mark.parametrize("speed_ups", [[], ["compile"], ["ribbon attention", "nucleus"], list(NAMES)])
def test_only_these_speed_ups_are_on(speed_ups):
    assert NAMES.keys() == tricks.PLAIN_FORMS.keys()
    with tricks.only(speed_ups):
        assert fast.enabled == bool(speed_ups)
        for name, (module, attribute, function) in NAMES.items():
            assert (getattr(module, attribute) is function) == (name in speed_ups), name
    assert fast.enabled
    for module, attribute, function in NAMES.values():
        assert getattr(module, attribute) is function


@pytest.mark.parametrize("num_speed_ups", range(3))
def test_a_row_of_training_runs_what_it_says(num_speed_ups, arguments, monkeypatch):
    """On a CPU: plain, + attention by torch's own kernel, + compile (which is only called)."""
    calls = set()
    compile_blocks = mock.create_autospec(compiling.compile_blocks)  # it would take too long
    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)

    def watched(name, function):
        def call(*args):
            calls.add(name)
            return function(*args)
        return call
    monkeypatch.setattr(attention, "FastAttention", watched("FastAttention", ribbon.FastAttention))
    args = tricks.parser().parse_args(arguments("--steps", "1", "--batch-size", "4")[1:])
    assert tricks.run_row("training, tokens/s", num_speed_ups, args) > 0
    assert len(calls) == min(num_speed_ups, 1)
    assert compile_blocks.called == (num_speed_ups == 2)


@pytest.mark.parametrize("title", ["one greedy reply, tokens/s", "16 sampled replies, tokens/s"])
def test_every_row_of_writing_runs(title, arguments):
    args = tricks.parser().parse_args(arguments("--tokens", "3")[1:])
    for num_speed_ups in range(len(tricks.speed_ups_of(title, args)) + 1):
        assert tricks.run_row(title, num_speed_ups, args) > 0


def test_tricks_prints_its_table_row_by_row(arguments, monkeypatch, capsys):
    """With real children."""
    monkeypatch.setitem(tricks.ROWS, "one greedy reply, tokens/s", ["step by torch's attention"])
    monkeypatch.setattr("sys.argv", arguments("--rounds", "1", "--tokens", "3", "--only", "greedy"))
    tricks.main()
    heading, *rows = capsys.readouterr().out.splitlines()[2:]
    assert heading.startswith("one greedy reply, tokens/s") and "/ row before" in heading
    assert [row[:36].strip() for row in rows] == ["plain", "+ step by torch's attention"]
    median, lowest, highest, ratio, gigabytes = map(float, rows[1][36:].split())
    assert median == lowest == highest > 0 and ratio > 0 and 0.1 < gigabytes < 10


def test_a_row_that_fails_costs_no_other(monkeypatch, capsys):
    """What the others gave is printed; the reason goes to stderr, and the exit status says it."""
    def command_of(name):
        good = "print('warming up'); print('{\"figure\": 2, \"memory\": 3e9}')"
        bad = "raise SystemExit('no such thing')"
        return [sys.executable, "-c", good if name == "good" else bad]
    results = compare.rounds_of_children(["good", "bad"], 2, command_of)
    assert results == {"good": [(2, 3e9)] * 2, "bad": []}
    compare.print_table("figures", results, "/ row before", tricks.ratios_to_the_row_before)
    output = capsys.readouterr()
    assert "no such thing" in output.err
    assert output.out.splitlines()[2].split() == ["good", "2", "2", "2", "nan", "3.00"]
    with pytest.raises(SystemExit, match="failed, for the reasons above: bad"):
        compare.exit_if_incomplete(results, 2)


# ---- compare.py and gpu.py: as far as neither peers nor a GPU are needed

def test_our_own_sides_of_the_comparison(arguments, monkeypatch, tiny_folder):
    monkeypatch.setattr(compare, "weights_folder", lambda: tiny_folder)
    assert compare.write_ours(3) > 0
    assert compare.write_ours(3, samples=4) > 0
    args = tricks.parser().parse_args(arguments("--steps", "2")[1:])
    examples = compare.examples_of_steps(args)
    assert len(examples) == 18 and all(len(tokens) == len(flags) for tokens, flags in examples)


def test_gpu_checks_pass_on_a_cpu(arguments, monkeypatch, capsys):
    """And the short run that stands for the figures."""
    monkeypatch.setattr("sys.argv", arguments())
    monkeypatch.setattr(gpu, "train", lambda args, seconds_left, *options: print("run", *options))
    with pytest.raises(SystemExit) as error:
        run_program(gpu.main)
    output = capsys.readouterr().out
    assert error.value.code == 0 and "run --max-steps 1" in output
    for check in ("gradient, torch.float32", "attention, bfloat16", "are the same: True"):
        assert check in output


def test_a_wrong_gradient_is_noticed():
    expected = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert gpu.worst_error(expected, expected)[0] == 0
    error, name = gpu.worst_error({**expected, "a": torch.tensor([3.0, 4.5])}, expected)
    assert math.isclose(error, 0.1, rel_tol=1e-6) and name == "a"


def test_what_does_not_fit_into_the_minutes_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", arguments("--minutes", "0"))
    monkeypatch.setattr(gpu, "check_all", lambda *_: False)
    with pytest.raises(SystemExit) as error:
        run_program(gpu.main)
    assert error.value.code == 1
    assert "a short run: left out, no time" in capsys.readouterr().out


def test_a_part_that_fails_fails_the_whole(arguments, monkeypatch, capsys):
    def train(*_):
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=True)
    monkeypatch.setattr("sys.argv", arguments())
    monkeypatch.setattr(gpu, "check_all", lambda *_: True)
    monkeypatch.setattr(gpu, "train", train)
    with pytest.raises(SystemExit) as error:
        run_program(gpu.main)
    assert error.value.code == 1
    assert "a short run: failed with status 3" in capsys.readouterr().out
