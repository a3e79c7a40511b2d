"""What the report shows of the model, against the model."""

import pytest
import torch

from parrot import portrait
from parrot.attention import Ribbon
from parrot.speaker import Speaker


@pytest.fixture(scope="module")
def speaker(tiny_folder):
    return Speaker.load("tiny", tiny_folder, torch.float32, "cpu")


def test_probabilities_are_those_of_a_sum_over_the_vocabulary(speaker):
    """Brute force: one forward for each token, the nucleus counted by adding up."""
    asked = portrait.ask(speaker)
    question, _, tokens = asked[0]
    prompt = speaker.prompt([{"role": "user", "content": question}])
    assert len(asked) == 4 and tokens
    for i, shown in enumerate(portrait.certainty(speaker, question, tokens)):
        with torch.no_grad():
            ids = torch.tensor(prompt + tokens[:i])
            shares = speaker.model.logits(speaker.model(ids, Ribbon([len(ids)]))[-1]).softmax(-1)
        assert shown["probability"] == pytest.approx(shares[tokens[i]].item(), rel=1e-4)
        total, count = 0.0, 0
        for share in shares.sort(descending=True).values.tolist():
            if total >= 0.9:
                break
            total, count = total + share, count + 1
        assert shown["nucleus"] == count and shown["likeliest"][0][1] == pytest.approx(shares.max().item(), rel=1e-4)
        assert shown["text"] == speaker.tokenizer.decode([tokens[i]])


def test_held_out_prompts_are_asked_too(speaker):
    asked = portrait.ask(speaker, [[{"role": "user", "content": "Count.", "context": "From 1."}]])
    assert len(asked) == 5 and asked[4][0] == "Count.\n\nFrom 1." and len(portrait.lines(asked)) == 4
