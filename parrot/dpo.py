r"""Preferences: of two replies, make the chosen one more probable than the rejected one.

    python -m parrot.dpo --weights out/littleparrot --data PAIRS      prompt, chosen, rejected
    python -m parrot.dpo --weights out/littleparrot --self-play DATA  rejected: the model's own

Direct Preference Optimization (arXiv:2305.18290): a judge who gives a reply y the reward r(y)
prefers y to z with probability sigmoid(r(y) - r(z)). The best policy p for that reward, at a price
of beta for each nat that it moves from a reference q, is proportional to q(y) exp(r(y) / beta).
Solving for r, up to a term that y and z share, with log p summed over the reply's tokens:

    r(y) = beta (log p(y) - log q(y))

So no model of the reward is needed: the loss is -log sigmoid(r(chosen) - r(rejected)), and q are
the starting weights. The self-play is SPIN (arXiv:2401.01335).
"""

import json
import sys
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

from parrot import attention, model, sampling, training
from parrot.assistant import Assistant
from parrot.config import DATA, WEIGHTS, Recipe
from parrot.data import CODE, Batch
from parrot.files import cache, hub, records
from parrot.files.examples import Examples
from parrot.run.trainer import Trainer
from parrot.system.command_line import option, parse
from parrot.system.console import run_program, say
from parrot.system.device import pick_device
from train import train

# If what writes or judges replies is edited, cached ones are stale: its hash is in their keys.
SOURCES = [CODE, cache.source_hash(__file__, attention, model, sampling, training)]
AT_ONCE = 64  # replies that self-play writes together, and keeps together
SAMPLING = {"top_p": 0.9, "max_new_tokens": 256}  # no penalty: loops are to be rejected


@dataclass
class PreferenceConfig(Recipe):
    weights: str = option("out/littleparrot", f"the policy's start, and the reference: {WEIGHTS}")
    data: list[str] | str | None = option(None, "pairs: records with prompt, chosen, rejected")
    self_play: str | None = option(None, f"in place of pairs: data with better replies: {DATA}")
    out: str = option("out/preferred", "the run's folder", may_change=True)
    temperature: float = option(0.0, "of self-play's replies; 0: greedy", at_least=0)
    beta: float = option(0.1, "the price of moving away from the reference", above=0)
    epochs: int = option(1, "how often every pair is seen", at_least=1, at_most=10**9)
    learning_rate: float = option(5e-6, "the peak", above=0)
    eval_every: int = option(10, "steps between two held-out losses", at_least=1)

    def contradictions(self):
        return {**super().contradictions(),
                "name either --data or --self-play": bool(self.data) == bool(self.self_play)}


class Pairs(Examples):
    """Examples 2 i (chosen) and 2 i + 1 (rejected), which lie end to end, as one."""

    def __init__(self, examples: Examples, beta):
        index = examples.index[::2].copy()
        index[:, 2] += examples.lengths[1::2]
        super().__init__(examples.parts, index)
        self.examples, self.longest, self.beta = examples, examples.longest, beta
        self.reference = torch.zeros(len(self))  # log q(chosen) - log q(rejected)


@dataclass
class PairBatch(Batch):
    """P pairs on a ribbon, both replies of each as documents of their own."""
    counts: list[int]  # the targets of each document
    reference: torch.Tensor  # (P,)
    beta: float

    @classmethod
    def of(cls, pairs: Pairs, indices, device="cpu"):
        rows = [row for i in indices for row in (2 * i, 2 * i + 1)]
        counts = [int(pairs.examples[row][1].sum()) for row in rows]
        reference = pairs.reference[indices].to(device)
        laid = {**vars(Batch.of(pairs.examples, rows, device)), "num_terms": len(indices)}
        return cls(**laid, counts=counts, reference=reference, beta=pairs.beta)


def log_ratios(model, batch: PairBatch, dtype):
    """log p(chosen) - log p(rejected) of each pair (P,)."""
    losses = training.token_losses(model, batch, dtype)  # (S,), -log p of each token
    sums = torch.stack([part.sum() for part in losses.split(batch.counts)])  # (2 P,)
    return sums[1::2] - sums[0::2]


def preference_terms(model, batch: PairBatch, dtype):
    """(3, P), of each pair: loss, margin r(chosen) - r(rejected), whether that is above 0."""
    margins = batch.beta * (log_ratios(model, batch, dtype) - batch.reference)
    return torch.stack([-F.logsigmoid(margins), margins, (margins > 0).float()])


def preference_loss(model, batch: PairBatch, dtype):
    """The loss, summed over the pairs. Its slope is how wrong each preference is:

    >>> margins = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    >>> losses = -F.logsigmoid(margins)
    >>> losses.detach(), torch.autograd.grad(losses.sum(), margins)[0]
    (tensor([2.1269, 0.6931, 0.1269]), tensor([-0.8808, -0.5000, -0.1192]))
    """
    return preference_terms(model, batch, dtype)[0].sum()


class PreferenceTrainer(Trainer):
    objective = "Direct Preference Optimization (arXiv:2305.18290) against the starting weights"
    batch_type, terms_of = PairBatch, staticmethod(preference_terms)
    names = ("val_loss", "val_margin", "val_accuracy")  # the margin of the rewards

    def find_data(self):
        return super().find_data() if self.config.data else self_play(self.config)

    @torch.no_grad()
    def load_data(self):  # the model is still the reference
        *sets, notes = super().load_data(pairs=True)
        sets = [Pairs(examples, self.config.beta) for examples in sets]
        for pairs in sets:
            for indices, batch in training.held_out_batches(
                    pairs, self.max_tokens, self.model.device, "reference", batch_type=PairBatch):
                pairs.reference[indices] = log_ratios(self.model, batch, self.dtype).cpu()
        return *sets, notes


def self_play(config: PreferenceConfig) -> hub.Found:
    """Data -> pairs, AT_ONCE in a file that is cached, so an interruption loses no more."""
    data, weights, files = hub.find_data(config.self_play), hub.find_weights(config.weights), []
    assistant = Assistant.load("", weights.path, torch.float32, pick_device(config.device), "chat")
    room = assistant.model.config.max_position_embeddings - SAMPLING["max_new_tokens"]
    bad = [] if config.skip_bad_records else None
    every = [item.messages for path in data.files for item in records.read_conversations(path, bad)]
    conversations = [messages for messages in every
                     if [message["role"] for message in messages] == ["user", "assistant"]
                     and len(assistant.prompt(messages[:1])) <= min(room, config.max_length)
                     ][:config.max_examples]
    if bad:
        say(f"{len(bad)} bad records are left out (the first: {bad[0][0]}, {bad[0][1]})")
    say(f"self-play with {len(conversations)} of {len(every)} records: one question, one reply")
    for start in tqdm(range(0, len(conversations), AT_ONCE), "self-play", leave=False):
        name, chunk = f"pairs-{start:07d}.jsonl", conversations[start:start + AT_ONCE]
        recipe = [name, chunk, config.temperature, config.seed + start]
        key = cache.key_of(SOURCES, recipe, *weights.hashes.values())
        make = partial(write_pairs, assistant, *recipe)
        files.append(cache.kept(f"self-play/{key}", make) / name)
    pairs = hub.Found(files, {"name": config.self_play, "from": "self-play"})
    pairs.hashes.update(data.hashes)  # for parrot.evaluate: on what it was trained
    return pairs


def write_pairs(assistant: Assistant, name, conversations, temperature, seed, folder):
    """Pairs of which the data's reply is chosen, and one of the model's is rejected."""
    prompts = [assistant.prompt([question]) for question, _ in conversations]
    samples = sampling.generate(assistant.model, prompts, assistant.stop, temperature=temperature,
                                generator=torch.Generator().manual_seed(seed), **SAMPLING)
    with open(folder / name, "w", encoding="utf-8") as file:
        for messages, (tokens, _) in zip(conversations, samples, strict=True):
            prompt, chosen = (message["content"].strip() for message in messages)
            rejected = assistant.tokenizer.decode(tokens).strip()
            if rejected not in ("", chosen):
                pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    run_program(lambda: train(parse(PreferenceConfig, sys.argv[1:], __doc__.splitlines()[0]),
                              PreferenceTrainer, preference_loss))
