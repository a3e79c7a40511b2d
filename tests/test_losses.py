"""tests/lesson/losses.py: the loss of an answer token by token, against the model."""

import math
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "lesson"))
import losses  # noqa: E402

from parrot.assistant import Assistant  # noqa: E402
from parrot.attention import Ribbon  # noqa: E402


def test_losses_are_those_of_one_forward_for_each_token(tiny_folder):
    assistant = Assistant.load("tiny", tiny_folder, torch.float32, "cpu")
    tokens = assistant.tokenizer.encode("I am a parrot.")
    prompt = assistant.prompt([{"role": "user", "content": "Who?"}])
    for i, loss in enumerate(losses.losses_of(assistant, "Who?", tokens)):
        with torch.no_grad():
            ids = torch.tensor(prompt + tokens[:i])
            hidden_states = assistant.model(ids, Ribbon([len(ids)]))
            shares = assistant.model.logits(hidden_states[-1]).softmax(-1)
        assert math.exp(-loss) == pytest.approx(shares[tokens[i]].item(), rel=1e-4)


def test_the_command_prints_every_token_and_the_mean(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["losses.py", "Who?", "01", str(tiny_folder)])
    losses.main()
    name, *rows, mean = capsys.readouterr().out.splitlines()
    assert name == str(tiny_folder)
    assert [row.split()[0] for row in rows] == ["'0'", "'1'", "'<|im_end|>'"]
    values = [float(row.split()[-1]) for row in rows]
    assert float(mean.split()[-1]) == pytest.approx(sum(values) / 3, abs=0.01)
