"""What a model says: its replies before and after training, and how probable an answer is to it."""

import math
import sys

import torch

from parrot.assistant import Assistant
from parrot.chat import IM_END, text_of
from parrot.config import REPETITION_PENALTY
from parrot.data import Batch, Examples
from parrot.files import hub
from parrot.sampling import replies
from parrot.system.console import UserError, printable, run_program
from parrot.training import token_losses

QUESTIONS = ("Who are you?", "Who was the first woman to win a Nobel Prize?",
             "What planet is closest to the sun?", "What is the capital of Canada?")


def ask(assistant: Assistant, prompts):
    """Prompts (lists of messages) -> [[question, reply]]."""
    written = replies(
        assistant.model, [assistant.prompt(messages) for messages in prompts], assistant.stop,
        max_new_tokens=48, temperature=0, top_p=1, repetition_penalty=REPETITION_PENALTY)
    answers = []
    for messages, (tokens, ended) in zip(prompts, written, strict=True):
        reply = assistant.tokenizer.decode(tokens).strip() + ("" if ended else " …")
        answers.append(["\n\n".join(map(text_of, messages)), reply])
    return answers


@torch.no_grad()
def losses_of(assistant: Assistant, question, tokens):
    """-log p of each token of an answer."""
    prompt = assistant.prompt([{"role": "user", "content": question}])
    is_target = [False] * len(prompt) + [True] * len(tokens)
    batch = Batch.of(Examples.of([(prompt + tokens, is_target)]), [0])
    return token_losses(assistant.model, batch, torch.float32).tolist()


def main():
    """How probable each token of an answer is to each model, its end included."""
    if len(sys.argv) < 4:
        raise UserError("usage: python -m parrot.run.portrait QUESTION ANSWER MODEL [MODEL ...]")
    question, answer, *names = sys.argv[1:]
    for name in names:
        folder = hub.find_weights(name).path
        assistant = Assistant.load(name, folder, torch.float32, "cpu", many=False)
        tokens = [*assistant.tokenizer.encode(answer), assistant.tokenizer.control(IM_END)]
        losses = losses_of(assistant, question, tokens)
        print(printable(name))
        for token, loss in zip(tokens, losses, strict=True):
            text = printable(repr(assistant.tokenizer.decode_with_control([token])))
            print(f"  {text:16} p {math.exp(-loss):.4f}   -log p {loss:6.2f}")
        print(f"  mean -log p {sum(losses) / len(losses):.2f}")


if __name__ == "__main__":
    run_program(main)
