"""parrot/README.md: its links lead where they say, and its figures are those of the code."""

import doctest
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, tiny_model

from parrot.attention import Ribbon
from parrot.chat import encode_chat, token_rows
from parrot.config import QUICKSTART
from parrot.data import Batch, Examples, load_examples, steps_per_epoch
from parrot.files import model_folder, records
from parrot.files.hub import find_data
from parrot.model import Llama
from parrot.sampling import generate, nucleus
from parrot.training import learning_rate, token_losses

sys.path.insert(0, str(ROOT / "tests" / "lesson"))
import experiments  # noqa: E402
import figures  # noqa: E402
import links  # noqa: E402

TEXT = links.WALK.read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())
CHAT = [{"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am LittleParrot."}]


def test_the_worked_examples():
    results = doctest.testfile(str(links.WALK), module_relative=False)
    assert results.failed == 0 and results.attempted > 20


def test_links_lead_where_they_say():
    assert len(links.LINK.findall(TEXT)) == TEXT.count("#L") > 15
    assert links.LINK.sub(links.corrected, TEXT) == TEXT, "run python tests/lesson/links.py"
    for target in re.findall(r"\]\(([^)#:]+)", TEXT):
        assert (links.WALK.parent / target).exists(), target


@pytest.mark.parametrize("name", [name for name, (_, edit) in experiments.EXPERIMENTS.items()
                                  if edit])
def test_every_edit_of_an_experiment_applies_and_is_printed(name):
    path, old, new = experiments.EXPERIMENTS[name][1]
    assert (ROOT / path).read_text(encoding="utf-8").splitlines().count(old) == 1
    assert f"   -{old}\n   +{new}\n" in TEXT


def test_every_command_of_an_experiment_is_printed():
    for options in (experiments.RECIPE, experiments.FACTS):
        assert f"python train.py {options}" in TEXT
    for dice in experiments.DICE:
        assert f"`{dice}`" in TEXT


def test_messages_and_their_tokens(tokenizer):
    tokens, is_target = encode_chat(CHAT, tokenizer)
    assert f"{len(tokens)} tokens, {sum(is_target)} of them targets" in TEXT
    rows = [" ".join(row.split()) for row in token_rows(tokens, is_target, tokenizer)][-12:]
    assert " ".join(rows) in WORDS


def test_the_shift():
    batch = Batch.of(Examples.of([([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 10, 11], [0, 1, 1])]), [0, 1])
    pairs = zip(batch.rows.tolist(), batch.targets.tolist(), strict=True)
    assert "row -> its target " + " ".join(f"{row}->{target}" for row, target in pairs) in WORDS


def test_the_ribbon(both_ways):
    """With a one-hot value for each token, attention gives the weights: who sees whom."""
    q, k = torch.randn(5, 2, 8), torch.randn(5, 1, 8)
    seen = Ribbon([3, 2]).attend(0, q, k, torch.eye(8)[:5, None])[:, 0, :5] > 0
    rows = ["".join("x" if visible else "." for visible in row) for row in seen.tolist()]
    pictures = [re.sub(r"[^x.]", "", line) for line in TEXT.splitlines() if re.search(r"[x.] \|", line)]
    assert [picture for picture in pictures if len(picture) == 5] == rows


def test_shapes(q4_folder):
    config = SimpleNamespace(**model_folder.read_config(q4_folder))
    heads = f"(21, {config.num_attention_heads}, {config.head_dim}); (21, " \
            f"{config.num_key_value_heads}, {config.head_dim})"
    assert heads in TEXT and f"after each of {config.num_hidden_layers} blocks" in TEXT
    assert f"(21, {config.hidden_size})" in TEXT and f"(21, {config.intermediate_size})" in TEXT
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    assert f"{per_token:,} numbers per token instead of {group * per_token:,}" in WORDS
    assert f"(7, {config.vocab_size})" in TEXT and f"(7, {config.hidden_size})" in TEXT


@pytest.fixture(scope="module")
def model(q4_folder):
    return Llama.load(q4_folder)


@torch.no_grad()
def test_a_sum_divided_once(model, tokenizer):
    conversations = list(records.read_conversations(ROOT / "parrot" / "quickstart.jsonl"))[:4]
    four = Examples.of([encode_chat(each.messages, tokenizer) for each in conversations])
    losses = token_losses(model, Batch.of(four, range(4)), torch.float32)
    counts = [int(four[i][1].sum()) for i in range(4)]
    means = [part.mean().item() for part in losses.split(counts)]
    pairs = [part.mean().item() for part in losses.split([sum(counts[:2]), sum(counts[2:])])]
    assert ", ".join(map(str, counts)) in TEXT and f"all {len(losses)} targets" in TEXT
    figures_in_text = [float(x) for x in re.findall(r"\b\d\.\d{3}\b", TEXT.split("## 7.")[1])[:7]]
    expected = [*means, losses.mean().item(), sum(means) / 4, sum(pairs) / 2]
    assert figures_in_text == pytest.approx(expected, abs=2e-3)


def test_the_schedule(tokenizer):
    train, held_out, _ = load_examples(find_data(ROOT / "parrot" / "quickstart.jsonl"), tokenizer, 2048, 0.1)
    steps, peak = steps_per_epoch(train, QUICKSTART["batch_size"]), QUICKSTART["learning_rate"]
    assert (f"{len(train)} examples to train on, {len(held_out)} held out, {steps} steps" in TEXT)
    assert (ROOT / ".github" / "schedule.svg").read_text() == figures.schedule(steps)
    rates = [learning_rate(step, steps, peak, peak / 10, 0.1) for step in range(steps)]
    assert rates.index(max(rates)) == 2 and rates[-1] == pytest.approx(peak / 10)


def test_the_head_that_looks_for_the_verb():
    words, weights = figures.weights_of_head()
    assert f"{weights[words.index('book'), words.index('gave')]:.0%} comes from \"gave\"" in TEXT
    assert (ROOT / ".github" / "attention.svg").read_text() == figures.grid(words, weights)


def test_half_precision_loses_small_steps(model):
    assert torch.tensor(0.05).bfloat16() - 5e-5 == torch.tensor(0.05).bfloat16()
    for what, is_matrix in (("matrices", True), ("norms' scales", False)):
        lost = total = 0
        for weight in (p.detach().bfloat16() for p in model.parameters()):
            if (weight.dim() == 2) == is_matrix:
                lost += (weight - 5e-5 == weight).sum().item()
                total += weight.numel()
        assert re.search(f"{lost / total:.0%} of (this model's|its) {what}", TEXT)


def test_the_nucleus():
    probabilities, tokens = nucleus(torch.tensor([[0.3, 0.5, 0.2]]).log(), 1.0, 0.6)
    assert "| | " + " | ".join(f"token {token}" for token in tokens[0].tolist()) + " |" in TEXT
    assert "top-p 0.6 | " + " | ".join(f"{p:.4g}" for p in probabilities[0].tolist()) in TEXT


def test_the_cache(both_ways):
    """Count what the model reads: a prompt of 15 tokens, then all of the reply but the last."""
    tiny, read = tiny_model(), []
    tiny.register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    [(reply, _)] = generate(tiny, [[5] * 15], set(), max_new_tokens=24, temperature=0, top_p=1)
    assert len(reply) == 24 and sum(read) == 15 + 23 == 38
    assert "15 + 23 = 38" in TEXT and f"15 + 16 + ... + 38 = {sum(range(15, 39))}" in TEXT
