"""What a run's report shows of its model: replies before and after, one example, how sure it was."""

import torch

from parrot.attention import Ribbon
from parrot.chat import text_of
from parrot.config import REPETITION_PENALTY
from parrot.sampling import nucleus, replies

QUESTIONS = ("Who are you?", "Who was the first woman to win a Nobel Prize?",  # asked before and after
             "What planet is closest to the sun?", "What is the capital of Canada?")
TOP_P = 0.9  # the nucleus that is shown


def ask(speaker, conversations=()):
    """QUESTIONS, then held-out conversations -> [[asked, reply, ids of the reply]], greedily but for the penalty."""
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS] + list(conversations)
    written = replies(speaker.model, [speaker.prompt(messages) for messages in asked], speaker.stop,
                      max_new_tokens=48, temperature=0, top_p=1, repetition_penalty=REPETITION_PENALTY)
    return [["\n\n".join(map(text_of, messages)), speaker.tokenizer.decode(tokens).strip() + ("" if ended else " …"), tokens]
            for messages, (tokens, ended) in zip(asked, written)]


def lines(asked):
    """The replies to QUESTIONS for the terminal."""
    return [f"  {question}  ->  {' '.join(reply.split())}" for question, reply, _ in asked[:len(QUESTIONS)]]


@torch.no_grad()
def certainty(speaker, question, tokens):
    """For each token of a reply: its probability, the size of the nucleus, and the likeliest tokens there."""
    prompt = speaker.prompt([{"role": "user", "content": question}])
    ids = torch.tensor(prompt + tokens, device=speaker.model.device)
    rows = speaker.model(ids, Ribbon([len(ids)], ids.device))[len(prompt) - 1:-1]  # each row predicts the next token
    logits = speaker.model.logits(rows).float()
    shares, sizes = logits.softmax(-1), (nucleus(logits, 1.0, TOP_P)[0] > 0).sum(-1)  # (S, V), (S,)
    return [{"text": speaker.tokenizer.decode([token]), "probability": float(row[token]), "top_p": TOP_P, "nucleus": int(size),
             "likeliest": [[speaker.tokenizer.decode_with_control([other]), float(row[other])] for other in row.topk(6).indices]}
            for token, row, size in zip(tokens, shares, sizes)]
