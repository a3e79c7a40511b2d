"""What the report shows of the model, against the model."""

import pytest
import torch

from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.run import portrait


@pytest.fixture(scope="module")
def assistant(tiny_folder):
    return Assistant.load("tiny", tiny_folder, torch.float32, "cpu")


def test_probabilities_are_those_of_a_sum_over_the_vocabulary(assistant):
    """Brute force: one forward for each token, the nucleus counted by adding up."""
    answers = portrait.ask(assistant)
    question, _, tokens = answers[0]
    prompt = assistant.prompt([{"role": "user", "content": question}])
    assert len(answers) == 4 and tokens
    for i, shown in enumerate(portrait.certainty(assistant, question, tokens)):
        with torch.no_grad():
            ids = torch.tensor(prompt + tokens[:i])
            hidden_states = assistant.model(ids, Ribbon([len(ids)]))
            shares = assistant.model.logits(hidden_states[-1]).softmax(-1)
        assert shown["probability"] == pytest.approx(shares[tokens[i]].item(), rel=1e-4)
        total, count = 0.0, 0
        for share in shares.sort(descending=True).values.tolist():
            if total >= 0.9:
                break
            total, count = total + share, count + 1
        assert shown["nucleus"] == count
        assert shown["likeliest"][0][1] == pytest.approx(shares.max().item(), rel=1e-4)
        assert shown["text"] == assistant.tokenizer.decode([tokens[i]])


def test_held_out_prompts_are_asked_too(assistant):
    prompt = [{"role": "user", "content": "Count.", "context": "From 1."}]
    answers = portrait.ask(assistant, [prompt])
    assert len(answers) == 5 and answers[4][0] == "Count.\n\nFrom 1."
    assert len(portrait.lines(answers)) == 4
