"""What a report shows of a model: replies before and after training, and how sure one was."""

import math
import sys

import torch

from parrot.assistant import Assistant
from parrot.attention import Ribbon
from parrot.chat import IM_END, text_of
from parrot.config import REPETITION_PENALTY
from parrot.files import hub
from parrot.sampling import nucleus, replies
from parrot.system.console import UserError, printable, run_program
from parrot.system.device import pick

QUESTIONS = ("Who are you?", "Who was the first woman to win a Nobel Prize?",
             "What planet is closest to the sun?", "What is the capital of Canada?")
TOP_P = 0.9  # of the nucleus that is shown


def ask(assistant: Assistant, prompts=()):
    """QUESTIONS, then prompts (lists of messages) -> [[question, reply, ids of the reply]]."""
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS] + list(prompts)
    written = replies(
        assistant.model, [assistant.prompt(messages) for messages in asked], assistant.stop,
        max_new_tokens=48, temperature=0, top_p=1, repetition_penalty=REPETITION_PENALTY)
    answers = []
    for messages, (tokens, ended) in zip(asked, written, strict=True):
        question, reply = "\n\n".join(map(text_of, messages)), assistant.tokenizer.decode(tokens)
        answers.append([question, reply.strip() + ("" if ended else " …"), tokens])
    return answers


def lines(answers, own=None):
    """The replies to QUESTIONS, and to the user's own, for the terminal."""
    return [f"  {question}  ->  {' '.join(reply.split())}"
            for question, reply, _ in answers[:len(QUESTIONS) + len(own or ())]]


@torch.no_grad()
def certainty(assistant: Assistant, question, tokens):
    """For each token of a reply: its probability, the size of the nucleus, the likeliest tokens."""
    prompt = assistant.prompt([{"role": "user", "content": question}])
    ids = torch.tensor(prompt + tokens, device=assistant.model.device)
    hidden_states = assistant.model(ids, Ribbon([len(ids)], ids.device))
    logits = assistant.model.logits(hidden_states[len(prompt) - 1:-1]).float()  # (S, V)
    sizes = (nucleus(logits, 1.0, TOP_P)[0] > 0).sum(-1).tolist()  # (S,)
    shares, words = logits.softmax(-1), assistant.tokenizer
    likeliest = shares.topk(6).indices.tolist()  # (S, 6)
    return [{"text": words.decode([token]), "probability": row[token].item(), "top_p": TOP_P,
             "nucleus": size, "likeliest": [[words.decode_with_control([other]), row[other].item()]
                                            for other in others]}
            for token, size, row, others in zip(tokens, sizes, shares, likeliest, strict=True)]


def main():
    """How probable each token of an answer is to each model, its end included."""
    if len(sys.argv) < 4:
        raise UserError("usage: python -m parrot.run.portrait QUESTION ANSWER MODEL [MODEL ...]")
    question, answer, *names = sys.argv[1:]
    for name in names:
        device, dtype = pick("auto", "float32")
        assistant = Assistant.load(name, hub.find_weights(name).path, dtype, device, writes=False)
        tokens = assistant.tokenizer.encode(answer) + [assistant.tokenizer.control(IM_END)]
        rows = certainty(assistant, question, tokens)
        losses = [-math.log(max(row["probability"], 1e-45)) for row in rows]
        print(printable(name))
        for row, loss in zip(rows, losses, strict=True):
            text = printable(repr(row["text"])) if row["text"] else IM_END
            print(f"  {text:16} p {row['probability']:.4f}   -log p {loss:6.2f}")
        print(f"  mean -log p {sum(losses) / len(losses):.2f}")


if __name__ == "__main__":
    run_program(main)
