"""What a model says, against the model."""

import math
import sys

import pytest
import torch

from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.run import portrait


@pytest.fixture(scope="module")
def assistant(tiny_folder):
    return Assistant.load("tiny", tiny_folder, torch.float32, "cpu")


def test_losses_are_those_of_one_forward_for_each_token(assistant):
    tokens = assistant.tokenizer.encode("I am a parrot.")
    prompt = assistant.prompt([{"role": "user", "content": "Who?"}])
    for i, loss in enumerate(portrait.losses_of(assistant, "Who?", tokens)):
        with torch.no_grad():
            ids = torch.tensor(prompt + tokens[:i])
            hidden_states = assistant.model(ids, Ribbon([len(ids)]))
            shares = assistant.model.logits(hidden_states[-1]).softmax(-1)
        assert math.exp(-loss) == pytest.approx(shares[tokens[i]].item(), rel=1e-4)


def test_the_command_prints_every_token_and_the_mean(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["portrait", "Who?", "01", str(tiny_folder)])
    portrait.main()
    name, *rows, mean = capsys.readouterr().out.splitlines()
    assert name == str(tiny_folder)
    assert [row.split()[0] for row in rows] == ["'0'", "'1'", "'<|im_end|>'"]
    losses = [float(row.split()[-1]) for row in rows]
    assert float(mean.split()[-1]) == pytest.approx(sum(losses) / 3, abs=0.01)


def test_prompts_are_asked_with_their_context(assistant):
    prompt = [{"role": "user", "content": "Count.", "context": "From 1."}]
    [[question, reply]] = portrait.ask(assistant, [prompt])
    assert question == "Count.\n\nFrom 1." and reply
