"""How good is it? Several models on the same questions, side by side, each in the chat format.

    python -m parrot.evaluate instruct-q4 out/littleparrot

    held-out loss   nats per token, on replies that were not trained on
    replies         to held-out prompts: do they end, their length, repetitions, ROUGE-L
    facts           short questions with known answers (questions.jsonl)
"""

import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot import fast, sampling, training
from parrot.assistant import Assistant
from parrot.config import EvaluateConfig
from parrot.data import Examples, is_held_out, tokenised
from parrot.files import hub
from parrot.run import report
from parrot.system.command_line import parse
from parrot.system.console import printable, refuse, run_program, say
from parrot.system.device import pick

FACTS = Path(__file__).with_name("questions.jsonl")


def share_repeated(replies, n=4):
    """The share of n-grams of tokens that occurred earlier in the same reply."""
    grams = [(number, *tokens[i:i + n]) for number, tokens in enumerate(replies)
             for i in range(len(tokens) - n + 1)]
    return (len(grams) - len(set(grams))) / max(len(grams), 1)


def rouge_l(reply, reference):
    """The F-measure of the longest common subsequence of words (Lin 2004)."""
    words, expected = (re.findall(r"\w+", text.lower()) for text in (reply, reference))
    before = [0] * (len(expected) + 1)  # entry j: the longest with the first j
    for word in words:
        longest = [0]
        for j, other in enumerate(expected):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
        before = longest
    return 2 * before[-1] / max(len(words) + len(expected), 1)


def is_right(reply, accepted):
    """Whether one of the accepted answers stands in the reply, as whole words."""
    answers = "|".join(map(re.escape, accepted))
    return bool(re.search(rf"(?<!\w)({answers})(?!\w)", reply, re.IGNORECASE))


def mean_and_error(losses, counts):
    """Sum of losses / sum of counts, and its standard error (None for one example)."""
    mean, n = losses.sum() / counts.sum(), len(losses)
    spread = ((losses - mean * counts) ** 2).sum() * n / max(n - 1, 1)
    return float(mean), float(spread ** 0.5 / counts.sum()) if n > 1 else None


@torch.no_grad()
def held_out_loss(model, examples: Examples):  # (mean, standard error), in nats per target
    counts = np.array([is_target.sum() for _, is_target in examples])
    sums = np.zeros(len(examples))
    for indices, batch in training.held_out_batches(examples, 640, model.device, "held-out loss"):
        losses = training.token_losses(model, batch, model.dtype).cpu().double()  # (S,)
        sums[indices] = [part.sum().item() for part in losses.split(counts[indices].tolist())]
    return mean_and_error(sums, counts)


def write_replies(assistant: Assistant, prompts, config: EvaluateConfig):
    """Replies to prompts, in batches -> (their tokens, whether they ended), two lists."""
    written, generator = [], torch.Generator().manual_seed(config.seed)
    for start in tqdm(range(0, len(prompts), config.batch_size), "replies", leave=False):
        written += sampling.generate(
            assistant.model, prompts[start:start + config.batch_size], assistant.stop,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature,
            top_p=config.top_p, repetition_penalty=config.repetition_penalty, generator=generator)
    return zip(*written, strict=True)


def reply_table(assistant: Assistant, examples: Examples, config: EvaluateConfig):
    """{"kind of replies, measure": value} of the replies to some held-out prompts."""
    chosen = random.Random(0).sample(range(len(examples)), min(config.max_prompts, len(examples)))
    room = assistant.model.config.max_position_embeddings - config.max_new_tokens
    pairs = []  # the tokens of a prompt, and of the first reply in the data without its end
    for tokens, is_target in (examples[i] for i in chosen):
        start = is_target.argmax()
        end = start + is_target[start:].argmin()
        if start <= room:
            pairs.append((tokens[:start].tolist(), tokens[start:end - 1].tolist()))
    if left_out := len(chosen) - len(pairs):
        say(f"{left_out} prompts left out: no room for --max-new-tokens {config.max_new_tokens}")
    if not pairs:
        return {}
    pairs.sort(key=lambda pair: len(pair[0]))  # a batch has similar lengths
    prompts, references = zip(*pairs, strict=True)
    table = {"prompts": len(prompts), "references, repeated 4-grams": share_repeated(references)}
    for kind, settings in (("greedy", replace(config, temperature=0)), ("sampled", config)):
        tokens, ended = write_replies(assistant, prompts, settings)
        texts = (map(assistant.tokenizer.decode, several) for several in (tokens, references))
        table |= {
            f"{kind}, ended by themselves": sum(ended) / len(prompts),
            f"{kind}, length / reference": sum(map(len, tokens)) / sum(map(len, references)),
            f"{kind}, repeated 4-grams": share_repeated(tokens),
            f"{kind}, ROUGE-L": sum(map(rouge_l, *texts)) / len(prompts)}
    return table


def facts_right(assistant: Assistant, config: EvaluateConfig):  # such as "80 of 118"
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    prompts = [assistant.prompt([{"role": "user", "content": fact["question"]}]) for fact in facts]
    tokens, _ = write_replies(assistant, prompts, replace(config, temperature=0, max_new_tokens=48))
    right = [is_right(assistant.tokenizer.decode(reply), fact["accepted"])
             for reply, fact in zip(tokens, facts, strict=True)]
    return f"{sum(right)} of {len(right)}"


def evaluate(assistant: Assistant, data: hub.Found, config: EvaluateConfig):
    """{measure: value} of a model on the held-out data. Raises UserError if there is none."""
    limit = min(config.max_length, assistant.model.config.max_position_embeddings)
    examples, remarks = tokenised(data, assistant.tokenizer, limit, config.skip_bad_records,
                                  system=assistant.system)
    examples = examples.where(is_held_out(examples.hashes, config.val_fraction))
    say(*remarks)
    refuse("--val-fraction", {f"holds out no example of up to {limit} tokens": not len(examples)})
    loss = held_out_loss(assistant.model, examples)
    return {"model": assistant.name, "data": Path(data.origin["name"]).name,
            "held-out examples": len(examples), "held-out loss": loss,
            **reply_table(assistant, examples, config), "facts": facts_right(assistant, config)}


def cell(value):
    if isinstance(value, tuple):  # a mean and its error, which may be None
        return " ± ".join(f"{number:.3f}" for number in value if number is not None)
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value)).replace("\n", " ")


def as_text(results):
    """A row for each measure, a column for each model."""
    titles = dict.fromkeys(title for result in results for title in result)
    rows = [[title, *(cell(result.get(title, "")) for result in results)] for title in titles]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main():  # a table, or JSON, on stdout
    config = parse(EvaluateConfig, sys.argv[1:], __doc__.splitlines()[0])
    fast.enabled = not config.plain
    data = hub.find_data(config.data)
    folders = {name: hub.find_weights(name).path for name in config.models}
    for folder in folders.values():
        warn_if_trained_on(data, folder, config)
    device, dtype = pick(config.device, config.dtype)
    results = [evaluate(Assistant.load(name, folder, dtype, device, "chat"), data, config)
               for name, folder in folders.items()]
    print(json.dumps(results, indent=2) if config.json else as_text(results))


def warn_if_trained_on(data: hub.Found, folder, config: EvaluateConfig):
    """Say so if the run in this folder was trained on what is held out now."""
    with report.blaming(folder / "run.json"):
        if about := report.read_if_there(folder / "run.json"):
            fraction = 0 if about["config"].get("val_data") else about["config"]["val_fraction"]
            shared = set(about["data"]["files"].values()) & set(data.hashes.values())
            if shared and fraction < config.val_fraction:
                say(f"{folder} held out only {fraction:g} of this data: it was trained on the rest")


if __name__ == "__main__":
    run_program(main)
