"""How good is it? Several models on the same questions, side by side, each in the chat format.

    python -m parrot.evaluate instruct-q4 out/littleparrot

    held-out loss   nats per token, on replies that were not trained on, for each category
    replies         to held-out prompts: do they end, their length, repetitions, ROUGE-L
    facts           short questions with known answers (questions.jsonl)
"""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from parrot import fast
from parrot.assistant import Assistant
from parrot.chat import encode_chat, with_system
from parrot.config import EvaluateConfig
from parrot.data import is_held_out, prompt_hash
from parrot.files import hub
from parrot.files.examples import Examples
from parrot.files.records import is_learned, read_conversations
from parrot.run import report
from parrot.run.folder import public_name
from parrot.sampling import generate
from parrot.system.command_line import parse
from parrot.system.console import UserError, printable, run_program, say
from parrot.system.device import pick
from parrot.system.disk import write_json
from parrot.training import held_out_batches, token_losses

FACTS = Path(__file__).with_name("questions.jsonl")
TOTAL = ""  # the name of all categories together: no category has it


def share_repeated(replies, n=4):
    """Of all n-grams of the replies' tokens, the share that stood before in the same reply.

    >>> share_repeated([[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 5, 6]])
    0.25
    """
    grams = [(number, *tokens[i:i + n]) for number, tokens in enumerate(replies)
             for i in range(len(tokens) - n + 1)]
    return (len(grams) - len(set(grams))) / max(len(grams), 1)


def rouge_l(reply, reference):
    """The F-measure of the longest common subsequence of words (Lin 2004).

    >>> rouge_l("the cat sat", "the cat on the mat sat")
    0.6666666666666666
    """
    words, others = (re.findall(r"\w+", text.lower()) for text in (reply, reference))
    before = [0] * (len(others) + 1)  # entry j: the longest with the first j others
    for word in words:
        longest = [0]
        for j, other in enumerate(others):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
        before = longest
    return 2 * before[-1] / max(len(words) + len(others), 1)


def is_right(reply, accepted):
    """Whether one of the accepted answers stands in the reply, as whole words.

    >>> is_right("It is the planet Mercury.", ["mercury"]), is_right("A mercurial one", ["mercury"])
    (True, False)
    """
    return any(re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", reply.lower())
               for answer in accepted)


def mean_and_error(losses, counts):
    """Mean loss per token, and its standard error (None for a single example).

    Examples were drawn at random, not tokens: the error is that of a ratio of sums.
    """
    mean, n = losses.sum() / counts.sum(), len(losses)
    if n == 1:
        return float(mean), None
    spread = ((losses - mean * counts) ** 2).sum() * n / (n - 1)
    return float(mean), float(spread ** 0.5 / counts.sum())


@torch.no_grad()
def loss_table(assistant: Assistant, conversations, config: EvaluateConfig):
    """{category: [mean, standard error, number of examples]}; TOTAL: of all examples."""
    pairs, categories, model = [], [], assistant.model
    limit = min(config.max_length, model.config.max_position_embeddings)
    for conversation in conversations:
        messages = with_system(conversation.messages, assistant.system)
        tokens, is_target = encode_chat(messages, assistant.tokenizer)
        if any(is_target) and len(tokens) <= limit:
            pairs.append((tokens, is_target))
            categories.append(conversation.category)
    if not pairs:
        raise UserError(f"no held-out example has {limit} tokens or fewer")
    if left_out := len(conversations) - len(pairs):
        say(f"{left_out} held-out examples left out: longer than {limit} tokens")
    counts, sums = np.array([sum(is_target) for _, is_target in pairs]), np.zeros(len(pairs))
    batches = held_out_batches(Examples.of(pairs), 640, model.device, "held-out loss")
    for indices, batch in batches:  # of at most 640 tokens
        losses = token_losses(model, batch, model.dtype).cpu().double()  # (S,)
        sums[indices] = [part.sum().item() for part in losses.split(counts[indices].tolist())]
    table = {}
    for name in sorted({TOTAL, *categories}):
        rows = [i for i, category in enumerate(categories) if name in (TOTAL, category)]
        table[name] = [*mean_and_error(sums[rows], counts[rows]), len(rows)]
    return table


def write_replies(assistant: Assistant, prompts, config: EvaluateConfig, title, temperature=0,
                  max_new_tokens=48):
    """Replies to prompts, in batches -> (their tokens, whether they ended), two lists."""
    written, generator = [], torch.Generator().manual_seed(config.seed)
    for start in tqdm(range(0, len(prompts), config.batch_size), title, leave=False):
        written += generate(
            assistant.model, prompts[start:start + config.batch_size], assistant.stop,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=config.top_p,
            repetition_penalty=config.repetition_penalty, generator=generator)
    return zip(*written, strict=True)


def reply_table(assistant: Assistant, conversations, config: EvaluateConfig):
    """{kind of replies: {measure: value}} of the replies to some held-out prompts."""
    begun = [item.messages for item in conversations if item.messages[0]["role"] != "assistant"]
    chosen = random.Random(0).sample(begun, min(config.max_prompts, len(begun)))
    room = assistant.model.config.max_position_embeddings - config.max_new_tokens
    pairs = []  # a prompt, and the reply in the data
    for messages in chosen:
        end = next(i for i, message in enumerate(messages) if is_learned(message))
        prompt = assistant.prompt(messages[:end])
        if len(prompt) <= room:
            pairs.append((prompt, messages[end]["content"].strip()))
    if left_out := len(chosen) - len(pairs):
        say(f"{left_out} prompts left out: no room for --max-new-tokens {config.max_new_tokens}")
    if not pairs:
        return {}
    pairs.sort(key=lambda pair: len(pair[0]))  # a batch has similar lengths
    prompts, references = zip(*pairs, strict=True)
    reference_tokens = list(map(assistant.tokenizer.encode, references))
    table = {"references": {"repeated 4-grams": share_repeated(reference_tokens)}}
    for kind, temperature in (("greedy", 0), ("sampled", config.temperature)):
        tokens, ended = write_replies(assistant, prompts, config, kind, temperature,
                                      config.max_new_tokens)
        scores = map(rouge_l, map(assistant.tokenizer.decode, tokens), references)
        table[kind] = {
            "prompts": len(prompts), "ended by themselves": sum(ended) / len(prompts),
            "length / reference": sum(map(len, tokens)) / sum(map(len, reference_tokens)),
            "repeated 4-grams": share_repeated(tokens), "ROUGE-L": sum(scores) / len(prompts)}
    return table


def facts_table(assistant: Assistant, config: EvaluateConfig):  # how many are right
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    prompts = [assistant.prompt([{"role": "user", "content": fact["question"]}]) for fact in facts]
    tokens, _ = write_replies(assistant, prompts, config, "facts")
    right = [is_right(assistant.tokenizer.decode(reply), fact["accepted"])
             for reply, fact in zip(tokens, facts, strict=True)]
    return {"right": sum(right), "of": len(right)}


def rows_of(results):
    """A column for each model; "" where a model has no example of a category."""
    columns = []
    for result in results:
        column = {"": result["model"], "data": result["data"],
                  "held-out examples": str(result["loss"][TOTAL][2])}
        for name, (mean, error, _) in result["loss"].items():
            title = f"held-out loss, {name}" if name else "held-out loss"
            column[title] = f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"
        for kind, values in result["replies"].items():
            column |= {f"{kind}, {name}": f"{value:.4g}" for name, value in values.items()}
        columns.append({**column, "facts": "{right} of {of}".format(**result["facts"])})
    titles = dict.fromkeys(title for column in columns for title in column)
    return [[title, *(column.get(title, "") for column in columns)] for title in titles]


def as_text(rows):
    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main():
    """The command: a table, or JSON, on stdout, and in the report of each finished run."""
    config = parse(EvaluateConfig, sys.argv[1:], __doc__.splitlines()[0])
    fast.enabled = not config.plain
    data = hub.find_data(config.data)
    bad = [] if config.skip_bad_records else None
    conversations = [item for path in data.files for item in read_conversations(path, bad)
                     if is_held_out(prompt_hash(item.messages), config.val_fraction)]
    if bad:
        say(f"{len(bad)} bad records are left out (the first: {bad[0][0]}, {bad[0][1]})")
    if not conversations:
        raise UserError(f"{config.data}: --val-fraction {config.val_fraction} holds out nothing")
    models = {name: hub.find_weights(name) for name in config.models}
    finished = [found.path for found in models.values() if is_finished(found.path, data, config)]
    device, dtype = pick(config.device, config.dtype)
    results = []
    for name, found in models.items():
        assistant = Assistant.load(name, found.path, dtype, device, "chat")
        results.append({"model": name, "data": public_name(data),
                        "loss": loss_table(assistant, conversations, config),
                        "replies": reply_table(assistant, conversations, config),
                        "facts": facts_table(assistant, config)})
    rows = rows_of(results)
    print(json.dumps(results, indent=2) if config.json else as_text(rows))
    rows[0] = ["", *map(public_name, models.values())]
    for folder in finished:  # the report shows it, too
        write_json(folder / "evaluation.json", {"table": rows})
        report.write(folder)


def is_finished(folder, data: hub.Found, config: EvaluateConfig):
    """Whether this folder is a finished run. Warns if it was trained on what is held out now."""
    about = report.read_if_there(folder / "run.json")
    with report.contents_of(folder / "run.json"):
        if not about:
            return False
        fraction = 0 if about["config"].get("val_data") else about["config"]["val_fraction"]
        shared = set(about["data"]["files"].values()) & set(data.hashes.values())
        if shared and fraction < config.val_fraction:
            say(f"{folder} held out only {fraction:g} of this data: it was trained on some of it")
        return about["finished"]


if __name__ == "__main__":
    run_program(main)
