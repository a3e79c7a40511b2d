"""Preferences: the loss against transformers, pairs in every shape, the run, self-play."""

import json
import os
from unittest import mock

import numpy as np
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from conftest import some_records, tiny_model
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from parrot import assistant, dpo
from parrot.chat import encode_chat
from parrot.data import load_examples
from parrot.dpo import (
    PairBatch,
    Pairs,
    PreferenceConfig,
    PreferenceTrainer,
    log_ratios,
    preference_loss,
)
from parrot.files import hub
from parrot.files.examples import Examples
from parrot.files.hub import find_data
from parrot.files.records import read_conversations, to_pair
from parrot.model import Llama
from parrot.system.console import UserError
from train import train

USER, GOOD, BAD = ({"role": role, "content": content} for role, content in
                   (("user", "Q"), ("assistant", "good"), ("assistant", "bad")))


def some_pairs(count):
    return [{"prompt": f"Count to {n}.", "chosen": " ".join(map(str, range(n))) or "0", "rejected": f"No, {n}!"}
            for n in range(1, count + 1)]


@pytest.fixture
def config(tiny_folder, records_file, tmp_path):
    data = records_file(some_pairs(40), "pairs.jsonl")

    def config(**changes):
        return PreferenceConfig(**{
            "weights": str(tiny_folder), "data": str(data), "out": str(tmp_path / "out"), "batch_size": 8,
            "learning_rate": 1e-3, "val_fraction": 0.2, "eval_every": 3, "save_every": 4, "dtype": "float32",
            "device": "cpu", "epochs": 2, **changes})
    return config


def run(config):
    train(config, PreferenceTrainer, preference_loss)


def metrics(folder):
    lines = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8")]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "seconds")} for line in lines]


# ---- the loss

def reference_log_p(model, tokens, is_target):
    """log p of the targets, by transformers and log_softmax."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    picked = logits.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
    return picked[torch.tensor(is_target[1:])].sum()


def test_loss_and_gradient_are_those_of_the_formula(both_ways, tiny_folder, tiny_tokenizer, tmp_path):
    assistant.save(tmp_path, tiny_model(seed=7), tiny_tokenizer, torch.float32)
    policy, reference = Llama.load(tiny_folder), Llama.load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    their_reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    pairs = [to_pair(record, set()) for record in some_pairs(5)]
    encoded = [encode_chat(messages, tiny_tokenizer) for pair in pairs for messages in pair]
    expected = torch.tensor(0.0)
    for chosen, rejected in zip(encoded[::2], encoded[1::2]):
        margin = reference_log_p(theirs, *chosen) - reference_log_p(theirs, *rejected)
        with torch.no_grad():
            before = reference_log_p(their_reference, *chosen) - reference_log_p(their_reference, *rejected)
        expected = expected - F.logsigmoid(0.1 * (margin - before))
    expected.backward()

    data = Pairs(Examples.of(encoded), beta=0.1)
    loss = 0.0
    for indices in ([0, 1, 2], [3, 4]):
        batch = PairBatch.of(data, indices)
        with torch.no_grad():
            batch.reference = log_ratios(reference, batch, torch.float32)
        part = preference_loss(policy, batch, torch.float32)
        part.backward()
        loss += part.item()
        assert batch.num_terms == len(indices)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    ours = dict(policy.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert (ours[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name


# ---- records

PAIRS = [
    ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, [USER]),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD], "score_chosen": 8.5}, [USER]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"question": "Q", "system": "S", "chosen": "good", "rejected": "bad"}, [{"role": "system", "content": "S"}, USER]),
    ({"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, [USER, {**BAD, "weight": 0}, USER])]


@pytest.mark.parametrize("record, prompt", PAIRS)
def test_pairs_in_every_shape(record, prompt):
    unused = set()
    assert to_pair(record, unused) == [[*prompt, GOOD], [*prompt, BAD]] and not unused


@pytest.mark.parametrize("record, fault", [
    ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "equal"), ({"prompt": "Q", "chosen": "A", "rejected": " "}, "no text under chosen and rejected"),
    ({"prompt": "Q", "chosen": "A"}, "no text under chosen and rejected"), ([USER, GOOD], "no text under"),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "R"}, BAD]}, "different prompts"),
    ({"chosen": [USER, GOOD, USER, {**GOOD, "weight": 0}], "rejected": [USER, BAD]}, "reply to learn from"),
    ({"prompt": "Q", "chosen": None, "rejected": "A"}, "no text under"), ({"chosen": "A", "rejected": "B"}, "expected turns .*, or prompt"),
    ({"chosen": [USER], "rejected": [USER, BAD]}, "no reply|does not end with a reply"),
    ({"prompt": "Q", "chosen": [], "rejected": "A"}, "no text under"), ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "does not end")])
def test_what_is_no_pair(record, fault):
    with pytest.raises(UserError, match=fault):
        to_pair(record, set())


def test_a_bad_pair_is_named_by_its_line(records_file):
    path = records_file([*some_pairs(1), {"prompt": "Q", "chosen": "A", "rejected": " A\n"}])
    with pytest.raises(UserError, match=":2: chosen and rejected are equal, or answer different prompts .--skip-bad-records"):
        list(read_conversations(path, pairs=True))


def test_pairs_of_turns_in_parquet(tmp_path):
    table = pyarrow.Table.from_pylist([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
    parquet.write_table(table, tmp_path / "pairs.parquet")
    assert [item.messages for item in read_conversations(tmp_path / "pairs.parquet", pairs=True)] == [[USER, GOOD], [USER, BAD]]


def test_a_remark_on_a_pair_is_counted_once(records_file, tiny_tokenizer):
    path = records_file([{**pair, "response": "C"} for pair in some_pairs(2)])
    examples, _, told = load_examples(find_data(path), tiny_tokenizer, 1000, 0.0, pairs=True)
    assert len(examples) == 4 and told == [f"2 records have text under 'response', which is not used ({path}:1, {path}:2)"]


# ---- the run

def test_a_run_prefers_what_was_chosen_and_tells_it(config, capsys):
    run(config(epochs=6))
    lines = [line for line in metrics(config().out) if "val_loss" in line]
    assert lines[0]["val_loss"] == pytest.approx(np.log(2), abs=1e-5) and lines[0]["val_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["val_loss"] < 0.6 and lines[-1]["val_accuracy"] > 0.9 and lines[-1]["val_margin"] > 0.1
    about = json.load(open(os.path.join(config().out, "run.json"), encoding="utf-8"))
    assert "Direct Preference" in about["objective"] and about["config"]["beta"] == 0.1
    assert "Direct Preference" in open(os.path.join(config().out, "README.md"), encoding="utf-8").read()
    page = open(os.path.join(config().out, "report.html"), encoding="utf-8").read()
    assert page.count("<polyline") == 2 + 1 + 1 + 1 + 1 + 1
    with pytest.raises(UserError, match="is finished|finished run"):
        run(config(resume=True))


def test_any_split_gives_the_same_run(config):
    run(config(max_steps=4))
    run(config(max_steps=4, out=config().out + "2", micro_batch_size=1))
    run(config(max_steps=4, out=config().out + "3", plain=True))
    for other in ("2", "3"):
        for ours, theirs in zip(metrics(config().out), metrics(config().out + other), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_a_stopped_run_resumes_to_the_same_bytes(config, monkeypatch):
    import signal

    from parrot.system.console import Interrupted
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return preference_loss(*args)
    with pytest.raises(Interrupted):
        train(config(), PreferenceTrainer, interrupted)
    with pytest.raises(UserError, match="--beta was 0.1, not 0.2"):
        run(config(resume=True, beta=0.2))
    run(config(resume=True))
    run(config(out=config().out + "-whole"))
    assert metrics(config().out) == metrics(config().out + "-whole")
    one, two = (open(os.path.join(out, "model.safetensors"), "rb").read() for out in (config().out, config().out + "-whole"))
    assert one == two


def test_self_play_samples_once(config, records_file, monkeypatch):
    data = records_file(some_records(70), "dolly.jsonl")
    sampled = []

    def counted(model, prompts, *args, **kwargs):
        sampled.append(len(prompts))
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return original(model, prompts, *args, **kwargs)
    original = dpo.sampling.generate
    monkeypatch.setattr(dpo, "sampling", mock.Mock(generate=counted))  # of self-play alone
    c = config(data=None, self_play=str(data), max_steps=2, max_length=512)
    with pytest.raises(KeyboardInterrupt):
        run(c)
    run(c)
    assert sampled == [64, 6, 6]  # what was written before the interruption was kept
    run(config(data=None, self_play=str(data), max_steps=2, max_length=512, out=c.out + "2"))
    assert sampled == [64, 6, 6]
    assert metrics(c.out) == metrics(c.out + "2")
    about = json.load(open(os.path.join(c.out, "run.json"), encoding="utf-8"))
    assert about["config"]["self_play"] == "dolly.jsonl"  # no folder of this machine
    assert hub.sha256_of(data) in about["data"]["files"].values()  # so that evaluate knows what was trained on


@pytest.mark.parametrize("temperature, differs", [(0.0, False), (1.0, True)])
def test_self_play_is_greedy_or_sampled(temperature, differs, config, records_file):
    data, rejected = str(records_file(some_records(12))), []
    for seed in (0, 1):
        found = dpo.self_play(config(data=None, self_play=data, temperature=temperature, seed=seed))
        rejected.append([json.loads(line)["rejected"] for path in found.files for line in path.open(encoding="utf-8")])
    assert rejected[0] and (rejected[0] != rejected[1]) == differs


def test_self_play_takes_one_question_and_one_reply(config, records_file, capsys):
    """Neither longer conversations, nor those that the model begins, nor prompts without room for a reply."""
    turn = {"user": {"role": "user", "content": "Q"}, "assistant": {"role": "assistant", "content": "A"},
            "system": {"role": "system", "content": "S"}}
    others = [{"messages": [turn[role] for role in roles]} for roles in (
        ["user", "assistant"] * 2, ["system", "user", "assistant"], ["assistant", "user", "assistant"])]
    gpt_first = {"messages": [turn["assistant"], {"role": "user", "content": "My secret"}]}
    long = {"instruction": "long " * 300, "response": "A"}
    data = records_file([*some_records(12), *others, gpt_first, long])
    found = dpo.self_play(config(data=None, self_play=str(data)))
    assert "self-play with 12 of 17 records" in capsys.readouterr().err
    prompts = [json.loads(line)["prompt"] for path in found.files for line in path.open(encoding="utf-8")]
    assert prompts and not {"Q", "My secret"} & set(prompts) and max(map(len, prompts)) < 1000


def test_pairs_or_self_play_but_not_both(capsys):
    from parrot.system.command_line import parse
    for argv in ([], ["--data", "a", "--self-play", "b"]):
        with pytest.raises(SystemExit):
            parse(PreferenceConfig, argv, "")
    assert "name either --data or --self-play" in capsys.readouterr().err


def test_self_play_tells_of_bad_records(config, records_file, capsys):
    records = records_file(some_records(4))
    records.write_text("not json\n" + records.read_text())
    dpo.self_play(config(data=None, self_play=str(records), skip_bad_records=True, max_length=512))
    assert "1 bad records are left out (the first: 1, not JSON" in capsys.readouterr().err
