"""The command line: derived, bounded, and contradiction-free before anything loads."""

import re
from dataclasses import dataclass, fields

import pytest

from parrot.config import SampleConfig, TrainConfig
from parrot.system.command_line import option, parse


def train(*argv):
    return parse(TrainConfig, argv, "")


def test_every_field_is_a_flag_with_its_default():
    assert train() == TrainConfig()
    assert parse(SampleConfig, [], "") == SampleConfig()
    assert train("--learning-rate", "1e-4", "--max-steps", "7", "--resume").max_steps == 7


def test_the_preset_sets_defaults_that_flags_override():
    preset = train("--quickstart")
    assert (preset.weights, preset.out) == ("instruct-q4", "out/quickstart")
    assert train("--quickstart", "--data", "mine.jsonl").data == ["mine.jsonl"]


def test_the_floor_is_a_tenth_of_the_peak_unless_given():
    assert train("--learning-rate", "1e-3").min_learning_rate == pytest.approx(1e-4)
    assert train("--min-learning-rate", "0").min_learning_rate == 0


@pytest.mark.parametrize("argv, message", [
    (["--learning-rate", "-1"], "--learning-rate: -1.0 must be above 0"),
    (["--learning-rate", "nan"], "nan must be above 0"), (["--learning-rate", "inf"], "inf must be below inf"),
    (["--epochs", "0"], "must be at least 1"),
    (["--epochs", "1.5"], "invalid int value"), (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--learning-rate", "1e-5", "--min-learning-rate", "1e-4"],
     "--min-learning-rate 0.0001 is above"),
    (["--out", "o\udce9x"], "is not UTF-8"),
    (["--resume", "--keep", "no"], "--resume and --keep no"), (["--seed", str(2**64)], "must be at most"),
    (["--epochs", "9" * 400], "must be at most"), (["--batch-size", "9" * 400], "must be at most"),
    (["--out", "instruct"], "--out instruct is the name of a model"),
    (["--data", "a", "--data", "b"], "name all values after one --data"),
    (["--ask=a", "--ask", "b"], "name all values after one --ask"),
    (["--val-fraction", "1"], "must be at most 0.9"), (["--nonsense"], "unrecognized arguments")])
def test_wrong_settings_end_with_status_2_and_a_word(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train(*argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--top-p", "0"], "must be above 0"), (["--top-p", "1.1"], "must be at most 1"),
    (["--temperature", "-1"], "must be at least 0"), (["--prompt", " "], "--prompt is empty"),
    (["--num-samples", "2"], "need a --prompt"),
    (["--compare", "a", "--model", "b", "--prompt", "x"], "--compare")])
def test_wrong_sampling_settings(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(SampleConfig, argv, "")
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        train("--help")
    shown = capsys.readouterr().out
    assert all("--" + setting.name.replace("_", "-") in shown for setting in fields(TrainConfig))
    assert re.search(r"--seed INT\s+order of the examples \(default 0\)", shown)
    assert "default False" not in shown and "default None" not in shown


@dataclass
class Base:
    seed: int = option(0, "of all", at_least=0)


@dataclass
class Middle(Base):
    share: float | None = option(None, "100% at most", at_most=1)


@dataclass
class Nested(Middle):
    names: list[str] = option(None, "some")
    seed: int = option(7, "a default of its own", at_least=0)


def test_the_fields_of_base_classes_are_options_too(capsys):
    assert parse(Nested, ["a", "b"], "") == Nested(7, None, ["a", "b"])
    assert parse(Nested, ["a", "--share", "0.5", "--seed", "1"], "") == Nested(1, 0.5, ["a"])
    for argv, message in ([["a", "--share", "1.5"], "argument --share: 1.5 must be at most 1"],
                          [["a", "--seed", "-1"], "argument --seed: -1 must be at least 0"],
                          [[], "the following arguments are required: NAME"]):
        with pytest.raises(SystemExit):
            parse(Nested, argv, "")
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Nested, ["--help"], "")
    assert "100% at most" in capsys.readouterr().out
