"""How probable each token of an answer is to each model, its end included.

    python tests/lesson/losses.py "Who are you?" "I am LittleParrot." instruct-q4 out/quickstart
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parrot.assistant import Assistant  # noqa: E402
from parrot.chat import IM_END  # noqa: E402
from parrot.data import Batch  # noqa: E402
from parrot.files import hub  # noqa: E402
from parrot.files.examples import Examples  # noqa: E402
from parrot.system.console import UserError, printable, run_program  # noqa: E402
from parrot.training import token_losses  # noqa: E402


@torch.no_grad()
def losses_of(assistant, question, tokens):
    """-log p of each token of an answer."""
    prompt = assistant.prompt([{"role": "user", "content": question}])
    is_target = [False] * len(prompt) + [True] * len(tokens)
    batch = Batch.of(Examples.of([(prompt + tokens, is_target)]), [0])
    return token_losses(assistant.model, batch, torch.float32).tolist()


def main():
    if len(sys.argv) < 4:
        raise UserError("usage: python tests/lesson/losses.py QUESTION ANSWER MODEL [MODEL ...]")
    question, answer, *names = sys.argv[1:]
    for name in names:
        folder = hub.find_weights(name).path
        assistant = Assistant.load(name, folder, torch.float32, "cpu", batched=False)
        tokens = [*assistant.tokenizer.encode(answer), assistant.tokenizer.control(IM_END)]
        losses = losses_of(assistant, question, tokens)
        print(printable(name))
        for token, loss in zip(tokens, losses, strict=True):
            text = printable(repr(assistant.tokenizer.decode([token], with_control=True)))
            print(f"  {text:16} p {math.exp(-loss):.4f}   -log p {loss:6.2f}")
        print(f"  mean -log p {sum(losses) / len(losses):.2f}")


if __name__ == "__main__":
    run_program(main)
