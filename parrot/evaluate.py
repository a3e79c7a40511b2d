"""How good is it? Several models on the same questions, side by side.

    python -m parrot.evaluate instruct-q4 out/littleparrot

    held-out loss   nats a token on replies that no training saw, for each category
    replies         to held-out prompts: do they end by themselves, how long are they beside the
                    reference, how often do they repeat themselves, how much of it do they hit
    facts           short questions with known answers (questions.jsonl)

Results are kept in the user's cache by the hashes of model, data and settings.
"""

import hashlib
import json
import math
import random
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot import card, hub, report
from parrot.chat import text_of, with_system
from parrot.config import EvaluateConfig, parse
from parrot.console import UserError, printable, run_program, say
from parrot.data import Batch, Examples, is_held_out, micro_batches
from parrot.device import pick, tokens_a_forward
from parrot.files import read_json, sha256_of, write_json
from parrot.records import read_conversations
from parrot.sampling import replies
from parrot.shorten import fit
from parrot.speaker import Speaker
from parrot.tokenizer import Tokenizer
from parrot.training import token_losses

QUESTIONS = Path(__file__).with_name("questions.jsonl")  # the first three are shown in full


# ---- measures of text, each a pure function

def share_repeated(replies, n=4):
    """Of all n-grams of the replies' tokens, the share that stood before in the same reply.

    >>> share_repeated([[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 5, 6]])
    0.25
    """
    grams = [[tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)] for tokens in replies]
    return sum(len(each) - len(set(each)) for each in grams) / max(sum(map(len, grams)), 1)


def rouge_l(reply, reference):
    """The F-measure of the longest common subsequence of words (Lin 2004).

    >>> rouge_l("the cat sat", "the cat on the mat sat")
    0.6666666666666666
    """
    a, b = (re.findall(r"\w+", text.lower()) for text in (reply, reference))
    lengths = [0] * (len(b) + 1)  # of the common subsequence with the first j words of b
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if word == other else max(lengths[j], lengths[j - 1])
    return 2 * lengths[-1] / (len(a) + len(b)) if a and b else 0.0


def is_right(reply, accepted):
    """Whether one of the accepted answers stands in the reply, as whole words.

    >>> is_right("It is the planet Mercury.", ["mercury"]), is_right("A mercurial one", ["mercury"])
    (True, False)
    """
    return any(re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", reply.lower()) for answer in accepted)


def mean_and_error(losses, counts):
    """Mean loss a token, and its standard error (None of a single example).

    Examples are what was drawn at random, not tokens: the error is that of a ratio of sums.
    """
    mean, n = losses.sum() / counts.sum(), len(losses)
    spread = ((losses - mean * counts) ** 2).sum() * n / (n - 1) if n > 1 else None
    return float(mean), None if spread is None else float(math.sqrt(spread) / counts.sum())


# ---- the held-out loss

def encode(messages, speaker, max_length):
    """Messages in the format of the speaker -> (tokens, supervised)."""
    if not speaker.chats:
        return as_plain_text(messages, speaker, max_length)
    return fit(with_system(messages, speaker.system), speaker.tokenizer, max_length)[:2]


def as_plain_text(messages, speaker, max_length):
    """What a base model might have read: the turns as paragraphs, a reply ending with its end of text."""
    tokens, supervised = [], []
    for message in messages:
        learned = message["role"] == "assistant"
        end = sorted(speaker.stop)[:1] if learned else speaker.tokenizer.encode("\n\n")
        new = speaker.tokenizer.encode(text_of(message)) + end
        tokens, supervised = tokens + new, supervised + [learned] * len(new)
    supervised[0] = False  # nothing stands before it to be predicted from
    return tokens[:max_length], supervised[:max_length]


def prompt_of(messages, speaker):
    """The tokens that a reply to `messages` follows."""
    return speaker.prompt(messages) if speaker.chats else as_plain_text(messages, speaker, None)[0]


@torch.no_grad()
def losses_of(speaker, examples, max_tokens):
    """The loss of each example, summed over its supervised tokens (n,), and their counts (n,)."""
    losses, counts = np.zeros(len(examples)), np.array([supervised.sum() for _, supervised in examples])
    for indices in tqdm(micro_batches(range(len(examples)), examples.lengths, None, max_tokens),
                        desc=f"{speaker.name}: held-out loss", leave=False):
        batch = Batch.of(examples, indices, speaker.model.device)
        each = token_losses(speaker.model, batch, speaker.model.dtype).cpu().double()  # (S,)
        losses[indices] = [some.sum().item() for some in each.split(counts[indices].tolist())]
    return losses, counts


def loss_table(speaker, conversations, config):
    """{"all": [mean, standard error, examples], category: ...}"""
    parts = [encode(conversation.messages, speaker, config.max_length) for conversation in conversations]
    kept = [i for i, (_, supervised) in enumerate(parts) if any(supervised)]
    if not kept:
        raise UserError(f"no held-out example fits --max-length {config.max_length}")
    examples = Examples.of([parts[i] for i in kept])
    losses, counts = losses_of(speaker, examples, tokens_a_forward(speaker.model, speaker.model.dtype))
    categories = np.array([conversations[i].category for i in kept])
    groups = {name: categories == name for name in sorted(set(categories) - {""})} | {"all": np.ones(len(kept), bool)}
    return {name: [*mean_and_error(losses[group], counts[group]), int(group.sum())] for name, group in groups.items()}


# ---- replies

def write_all(speaker, prompts, config, what, **how):
    """Replies to many prompts, in batches of prompts of similar length: [(tokens, ended)]."""
    written = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(prompts), desc=f"{speaker.name}: {what}", leave=False) as bar:
        for start in range(0, len(order), config.batch_size):
            some = order[start:start + config.batch_size]
            for i, reply in zip(some, replies(speaker.model, [prompts[i] for i in some], speaker.stop,
                                              repetition_penalty=config.repetition_penalty, **how)):
                written[i] = reply
            bar.update(len(some))
    return written


def reply_table(speaker, conversations, config):
    """What is measured of the replies to held-out prompts, greedy and sampled."""
    chosen = random.Random(0).sample(conversations, min(config.max_prompts, len(conversations)))
    prompts, references = [], []
    for conversation in chosen:
        until = next(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
        if not until:  # it begins with a reply
            continue
        prompt = prompt_of(conversation.messages[:until], speaker)
        if len(prompt) + config.max_new_tokens <= speaker.model.config.max_position_embeddings:
            prompts.append(prompt)
            references.append(text_of(conversation.messages[until]))
    as_tokens = [speaker.tokenizer.encode(reference) for reference in references]
    table = {"references": {"repeated": share_repeated(as_tokens)}} if prompts else {}  # people repeat themselves, too
    for name, temperature in (("greedy", 0), ("sampled", config.temperature)) if prompts else ():
        generator = torch.Generator(speaker.model.device).manual_seed(config.seed)
        written = write_all(speaker, prompts, config, name, max_new_tokens=config.max_new_tokens,
                            temperature=temperature, top_p=config.top_p, generator=generator)
        table[name] = {
            "prompts": len(written), "ended": sum(ended for _, ended in written) / len(written),
            "length": sum(len(tokens) for tokens, _ in written) / sum(map(len, as_tokens)),
            "repeated": share_repeated([tokens for tokens, _ in written]),
            "rouge_l": float(np.mean([rouge_l(speaker.tokenizer.decode(tokens), reference)
                                      for (tokens, _), reference in zip(written, references)]))}
    return table


def facts_table(speaker, config):
    """Right answers among the known ones, and what was said to the first three."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    prompts = [prompt_of([{"role": "user", "content": each["question"]}], speaker) for each in questions]
    written = write_all(speaker, prompts, config, "facts", max_new_tokens=48, temperature=0, top_p=1)
    texts = [speaker.tokenizer.decode(tokens).strip() for tokens, _ in written]
    right = [is_right(text, each["accepted"]) for text, each in zip(texts, questions)]
    return {"right": sum(right), "of": len(right),
            "shown": [[each["question"], text] for each, text in zip(questions[:3], texts)]}


# ---- all of it

def evaluate(name, folder, format, conversations, config, data_hash):
    """All measures of one model in one format, from the cache where they were taken before."""
    device, dtype = pick(config)
    settings = {key: value for key, value in asdict(config).items() if key not in ("models", "json", "data")}
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())
             if any(path.match(pattern) for pattern in hub.MODEL_FILES)}
    key = json.dumps([3, files, data_hash, sha256_of(QUESTIONS), format, settings], sort_keys=True)

    def measure(made):
        speaker = Speaker.load(name, folder, dtype, device, format)
        write_json(made / "results.json", {
            "format": format, "penalty": config.repetition_penalty, "loss": loss_table(speaker, conversations, config),
            "replies": reply_table(speaker, conversations, config), "facts": facts_table(speaker, config)})
    kept = hub.kept(f"evaluations/{hashlib.sha256(key.encode()).hexdigest()[:24]}", measure)
    return {"model": name, "data": Path(config.data).name, **read_json(kept / "results.json")}


def formats_of(folder):
    """A model without a template is judged in plain text too, not only in a format that it never saw."""
    return ("chat",) if Tokenizer(folder).chat_template else ("plain", "chat")


def with_error(mean, error):
    """A mean and its standard error as text; "" of a category in which this model had no example."""
    return "" if mean is None else f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def rows_of(results):
    """All numbers as rows of text, a column for each model."""
    rows = [[title, *(form.format(**each) for each in results)] for title, form in (("", "{model}"), ("data", "{data}"),
            ("held-out examples", "{loss[all][2]}"), ("format", "{format}"), ("repetition penalty of all replies", "{penalty:g}"))]
    for name in sorted({name for each in results for name in each["loss"]}, key=lambda name: (name != "all", name)):
        rows.append([f"held-out loss, {name}", *(with_error(*each["loss"].get(name, (None, None))[:2]) for each in results)])
    for how, whose in (("greedy", "greedy replies"), ("sampled", "sampled replies"), ("references", "references")):
        for key, title, form in (("ended", "ended by themselves", "{:.1%}"), ("length", "length / reference", "{:.2f}"),
                                 ("repeated", "repeated 4-grams", "{:.1%}"), ("rouge_l", "ROUGE-L", "{:.3f}")):
            if all(key in each["replies"].get(how, {}) for each in results):
                rows.append([f"{whose}, {title}", *(form.format(each["replies"][how][key]) for each in results)])
    rows.append(["facts", *("{right} of {of}".format(**each["facts"]) for each in results)])
    return rows


def as_table(rows, results):
    """The rows, and the replies to the first questions, as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for i, (question, _) in enumerate(results[0]["facts"]["shown"]):
        lines += ["", question, *(f"  {each['model']} ({each['format']}): {each['facts']['shown'][i][1]}" for each in results)]
    return printable("\n".join(lines))


def main():
    """Read the command line, evaluate, print."""
    config = parse(EvaluateConfig, sys.argv[1:], __doc__.splitlines()[0])
    path = hub.find_data(config.data).path
    conversations = [each for each in read_conversations(path, [] if config.skip_bad_records else None)
                     if is_held_out(each.messages, config.val_fraction)]
    if not conversations:
        raise UserError(f"{path}: nothing is held out by --val-fraction {config.val_fraction}")
    folders = [(name, hub.find_weights(name).path) for name in config.models]
    data_hash = sha256_of(path)
    runs = {folder: read_json(folder / "run.json") for _, folder in folders if (folder / "run.json").is_file()}
    for folder, about in runs.items():
        fraction = about.get("config", {}).get("val_fraction", 0)
        if about.get("data", {}).get("sha256") == data_hash and fraction < config.val_fraction:
            say(f"{folder} held out only {fraction:g} of this data: it was trained on some of what it is measured on here")
    results = [evaluate(name, folder, format, conversations, config, data_hash)
               for name, folder in folders for format in formats_of(folder)]
    rows = rows_of(results)
    print(json.dumps(results, indent=2, ensure_ascii=False) if config.json else as_table(rows, results))
    for folder, about in runs.items():
        if about.get("finished"):  # our own run: show it there
            write_json(folder / "evaluation.json", {"table": rows})
            report.write(folder)
            card.write(folder)


if __name__ == "__main__":
    run_program(main)
