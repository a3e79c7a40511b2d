"""The command line: derived, bounded, and contradiction-free before anything loads."""

import re
from dataclasses import fields

import pytest

from parrot.config import SampleConfig, TrainConfig, parse


def train(*argv):
    return parse(TrainConfig, argv, "")


def test_every_field_is_a_flag_with_its_default():
    assert train() == TrainConfig()
    assert parse(SampleConfig, [], "") == SampleConfig()
    assert train("--learning-rate", "1e-4", "--max-steps", "7", "--resume").max_steps == 7


def test_the_preset_sets_defaults_that_flags_override():
    assert (train("--quickstart").weights, train("--quickstart").out) == ("instruct-q4", "out/quickstart")
    assert train("--quickstart", "--data", "mine.jsonl").data == "mine.jsonl"


def test_the_floor_is_a_tenth_of_the_peak_unless_given():
    assert train("--learning-rate", "1e-3").min_learning_rate == pytest.approx(1e-4)
    assert train("--min-learning-rate", "0").min_learning_rate == 0


@pytest.mark.parametrize("argv, message", [
    (["--learning-rate", "-1"], "--learning-rate: -1 must be above 0"),
    (["--learning-rate", "nan"], "nan is not a finite number"), (["--epochs", "0"], "must be at least 1"),
    (["--epochs", "1.5"], "invalid int value"), (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--batch-size", "4", "--micro-batch-size", "8"], "--micro-batch-size 8 is larger than --batch-size 4"),
    (["--learning-rate", "1e-5", "--min-learning-rate", "1e-4"], "--min-learning-rate 0.0001 is above"),
    (["--out", "o\udce9x"], "is not UTF-8"),
    (["--out", "instruct"], "--out instruct is the name of a model"),
    (["--val-fraction", "1"], "must be at most 0.9"), (["--nonsense"], "unrecognized arguments")])
def test_wrong_settings_end_with_status_2_and_a_word(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--top-p", "0"], "must be above 0"), (["--top-p", "1.1"], "must be at most 1"),
    (["--temperature", "-1"], "must be at least 0"), (["--prompt", " "], "--prompt is empty"),
    (["--num-samples", "2"], "need a --prompt"), (["--compare", "a", "--model", "b", "--prompt", "x"], "--compare")])
def test_wrong_sampling_settings(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(SampleConfig, argv, "")
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    shown = capsys.readouterr().out
    assert all("--" + each.name.replace("_", "-") in shown for each in fields(TrainConfig))
    assert re.search(r"--seed INT\s+order of the examples \(default 0\)", shown) and "default False" not in shown
