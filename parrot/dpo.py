r"""Preferences: of two replies, make the chosen one more probable than the rejected one.

    python -m parrot.dpo --weights out/littleparrot --data PAIRS      prompt, chosen, rejected
    python -m parrot.dpo --weights out/littleparrot --self-play DATA  rejected: the model's own

Direct Preference Optimization (arXiv:2305.18290). A judge who gives a reply y the reward r(y)
prefers y to z with probability sigmoid(r(y) - r(z)). The best policy p for that reward, at a price
of beta for each nat that it moves away from a reference q, is p(y) ~ q(y) exp(r(y) / beta). Solved
for r, up to a term that y and z share:

    r(y) = beta (log p(y) - log q(y))

So the reward needs no model of its own: the loss is -log sigmoid(r(chosen) - r(rejected)), with the
starting weights as q. log p of a reply is a sum over its tokens. With a small beta, log p has to
move far from the reference before the loss is small.

The loop is that of train.py; the self-play is SPIN (arXiv:2401.01335).
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from parrot.assistant import Assistant
from parrot.chat import text_of
from parrot.config import DATA, WEIGHTS, Recipe
from parrot.data import Batch, micro_batches
from parrot.files import hub
from parrot.files.cache import kept
from parrot.files.examples import Examples
from parrot.files.hub import Found
from parrot.files.records import read_conversations
from parrot.run.trainer import Trainer
from parrot.sampling import replies
from parrot.system.command_line import option, parse
from parrot.system.console import run_program
from parrot.system.device import pick, send
from parrot.training import token_losses
from train import train

AT_ONCE = 64  # replies that self-play writes together, and keeps together


@dataclass
class PreferenceConfig(Recipe):
    weights: str = option("out/littleparrot", f"the policy's start, and the reference: {WEIGHTS}")
    data: list[str] | str | None = option(None, "pairs: records with prompt, chosen, rejected")
    self_play: str | None = option(None, "in place of pairs: data, to be preferred to the model's "
                                   f"own replies: {DATA}")
    out: str = option("out/preferred", "the run's folder", may_change=True)
    beta: float = option(0.1, "the price of moving away from the reference", above=0)
    epochs: int = option(1, "how often every pair is seen", at_least=1)
    learning_rate: float = option(5e-6, "the peak", above=0)
    eval_every: int = option(10, "steps between two held-out losses", at_least=1)

    def contradictions(self):
        return {**super().contradictions(),
                "name either --data or --self-play": bool(self.data) == bool(self.self_play)}


class Pairs(Examples):
    """Examples 2 i (chosen) and 2 i + 1 (rejected), which lie end to end, as one: a pair."""

    def __init__(self, examples: Examples):
        index = examples.index[::2].copy()
        index[:, 2] += examples.lengths[1::2]
        super().__init__(examples.parts, index)
        self.examples, self.longest = examples, examples.longest
        self.reference = np.zeros(len(self), np.float32)  # log q(chosen) - log q(rejected)


@dataclass
class PairBatch(Batch):
    """Pairs on a ribbon, both replies of each as documents of their own."""
    counts: list[int]  # the targets of each document
    reference: torch.Tensor  # (P,)
    beta: float

    @property
    def num_terms(self):
        return len(self.reference)


def preference_margins(model, batch: PairBatch, dtype):
    """log p(chosen) - log p(rejected) of each pair (P,)."""
    losses = token_losses(model, batch, dtype)  # (S,), -log p of each token
    sums = torch.stack([part.sum() for part in losses.split(batch.counts)])  # (2 P,)
    return sums[1::2] - sums[0::2]


def preference_loss(model, batch: PairBatch, dtype):
    """The loss, summed over the pairs."""
    rewards = batch.beta * (preference_margins(model, batch, dtype) - batch.reference)
    return loss_of(rewards).sum()


def loss_of(rewards):
    """r(chosen) - r(rejected) (P,) -> the loss (P,); its slope is how wrong the preference is.

    >>> rewards = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    >>> loss_of(rewards).detach()
    tensor([2.1269, 0.6931, 0.1269])
    >>> loss_of(rewards).sum().backward()
    >>> rewards.grad
    tensor([-0.8808, -0.5000, -0.1192])
    """
    return -F.logsigmoid(rewards)


class PreferenceTrainer(Trainer):
    """A Trainer of pairs, whose reference is the model as it was loaded."""
    objective = "Direct Preference Optimization (arXiv:2305.18290) against the starting weights"

    def find_data(self):
        return super().find_data() if self.config.data else self_play(self.config)

    @torch.no_grad()
    def load_data(self, data: Found):
        *sets, notes = super().load_data(data, pairs=True)
        sets = [Pairs(examples) for examples in sets]
        for pairs in sets:  # the model is still the reference, in a resumed run, too
            for indices, batch in self._batches(pairs, "reference"):
                margins = preference_margins(self.model, batch, self.dtype)
                pairs.reference[indices] = margins.cpu().numpy()
        return *sets, notes

    def batch_of(self, pairs: Pairs, indices):
        both = [row for i in indices for row in (2 * i, 2 * i + 1)]
        counts = [int(pairs.examples[row][1].sum()) for row in both]
        batch, device = Batch.of(pairs.examples, both, self.model.device), self.model.device
        reference = send(torch.from_numpy(pairs.reference[indices]), device)
        return PairBatch(**vars(batch), counts=counts, reference=reference, beta=self.config.beta)

    def _batches(self, pairs, title, share=list):
        """Yield (indices, batch) of all pairs, or of the share of this process."""
        splits = share(micro_batches(range(len(pairs)), pairs.lengths, None, self.max_tokens))
        for indices in tqdm(splits, desc=title, leave=False, disable=self.processes.rank > 0):
            yield indices, self.batch_of(pairs, indices)

    @torch.no_grad()
    def held_out(self, should_stop):
        """{"val_loss", "val_margin" (of rewards), "val_accuracy"} of the held-out pairs."""
        pairs, sums = self.val_set, torch.zeros(3, dtype=torch.float64)
        for _, batch in self._batches(pairs, "evaluating", self.processes.share):
            if should_stop():
                break
            margins = preference_margins(self.model, batch, self.dtype)
            rewards = batch.beta * (margins - batch.reference)
            terms = torch.stack([loss_of(rewards), rewards, (rewards > 0).float()])  # (3, P)
            sums += terms.sum(dim=1).cpu()
        if self.processes.largest(bool(should_stop())):
            return None
        loss, margin, accuracy = self.processes.sum(*sums.tolist())
        return {"val_loss": loss / len(pairs), "val_margin": margin / len(pairs),
                "val_accuracy": accuracy / len(pairs)}


def self_play(config: PreferenceConfig) -> Found:
    """Data -> pairs, AT_ONCE in a file that is cached, so an interruption loses no more."""
    data, weights = hub.find_data(config.self_play), hub.find_weights(config.weights)
    device, _ = pick(config.device, config.dtype)
    conversations = [item.messages for path in data.files for item in read_conversations(path)
                     if len(item.messages) == 2][:config.max_examples]
    assistant = Assistant.load("self-play", weights.path, torch.float32, device, "chat")
    recipe = [*data.hashes.values(), *weights.hashes.values(), config.seed, config.max_examples]
    key, files = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16], []
    for start in tqdm(range(0, len(conversations), AT_ONCE), "self-play", leave=False):
        name, some = f"pairs-{start:07d}.jsonl", conversations[start:start + AT_ONCE]
        make = partial(write_pairs, name, some, assistant, config.seed + start)
        files.append(kept(f"self-play/{key}-{start}", make) / name)
    return Found(files, {"name": Path(config.self_play).name, "from": "self-play"})


def write_pairs(name, conversations, assistant: Assistant, seed, folder):
    """Pairs of which the data's reply is chosen, and a sample of the model is rejected."""
    prompts = [assistant.prompt([question]) for question, _ in conversations]
    samples = replies(assistant.model, prompts, assistant.stop, max_new_tokens=256, temperature=1.0,
                      top_p=1.0, generator=torch.Generator().manual_seed(seed))
    with open(folder / name, "w", encoding="utf-8") as file:
        for messages, (tokens, _) in zip(conversations, samples, strict=True):
            prompt, chosen = map(text_of, messages)
            rejected = assistant.tokenizer.decode(tokens).strip()
            if rejected not in ("", chosen):
                pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    run_program(lambda: train(parse(PreferenceConfig, sys.argv[1:], __doc__.splitlines()[0]),
                              PreferenceTrainer, preference_loss))
