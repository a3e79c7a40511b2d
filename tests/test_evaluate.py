"""Each measure on cases worked out by hand, and the program as it is used."""

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import some_records, tiny_model
from transformers import AutoModelForCausalLM

from parrot import assistant, evaluate, fast
from parrot.assistant import Assistant
from parrot.chat import encode_chat
from parrot.config import EvaluateConfig, TrainConfig
from parrot.data import Batch, Examples, is_held_out, prompt_hash
from parrot.files.records import read_conversations
from parrot.system.console import run_program
from parrot.system.disk import sha256_of
from parrot.training import loss_sum, make_optimizer


@pytest.mark.parametrize("replies, expected", [
    ([[]], 0), ([[1, 2, 3]], 0), ([[1, 2, 3, 4]], 0), ([[7] * 10], 6 / 7),
    ([[1, 2, 3, 4, 5, 1, 2, 3, 4]], 1 / 6), ([[1, 2, 3, 4], [1, 2, 3, 4]], 0),
    ([[7] * 10, [1, 2], [1, 2, 3, 4, 5, 1, 2, 3, 4]], 7 / 13)])
def test_repetition(replies, expected):
    assert evaluate.share_repeated(replies) == expected


@pytest.mark.parametrize("reply, reference, expected", [
    ("", "a b", 0), ("a b", "", 0), ("a b c", "a b c", 1), ("A, b; C!", "a b c", 1),
    ("c b a", "a b c", 1 / 3), ("a x b y", "a b", 2 * 2 / 6),
    ("police killed the gunman", "the gunman police killed", 0.5)])
def test_rouge_l(reply, reference, expected):
    assert evaluate.rouge_l(reply, reference) == pytest.approx(expected)


@pytest.mark.parametrize("reply, accepted, right", [
    ("The capital is Paris.", ["Paris"], True), ("the PARIS of today", ["paris"], True),
    ("Parisian", ["Paris"], False), ("It is 1945.", ["1945"], True), ("19450", ["1945"], False),
    ("H2O", ["H2O", "H₂O"], True), ("", ["x"], False), ("the blue whale", ["blue whale"], True),
    ("twenty-four hours", ["24", "twenty-four"], True)])
def test_is_right(reply, accepted, right):
    assert evaluate.is_right(reply, accepted) == right


def test_the_mean_weighs_tokens_and_the_error_counts_examples():
    mean, error = evaluate.mean_and_error(np.array([2.0, 10.0]), np.array([1.0, 3.0]))
    assert mean == 3.0  # 12 nats on 4 tokens, not the mean 2.67 of the examples' means
    assert error == pytest.approx(math.sqrt(((2 - 3) ** 2 + (10 - 9) ** 2) * 2) / 4)
    assert evaluate.mean_and_error(np.array([2.0]), np.array([1.0])) == (2.0, None)


def test_the_error_is_that_of_repeated_draws():
    """Brute force: the spread of the mean over many data sets drawn alike."""
    chance = np.random.default_rng(0)

    def draw():
        counts = chance.integers(5, 200, 100).astype(float)
        return counts * chance.normal(2, 0.5, 100), counts
    means, errors = np.array([evaluate.mean_and_error(*draw()) for _ in range(2000)]).T
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.1)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Small settings, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return EvaluateConfig(models=[], max_prompts=4, max_new_tokens=8, device="cpu", dtype="float32",
                          batch_size=3)


def test_the_held_out_loss_is_that_of_transformers(tiny, tiny_folder, records_file):
    encoded = [encode_chat(item.messages, tiny.tokenizer) for item in read_conversations(records_file(some_records(12)))]
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    total, count = 0, 0
    for tokens, is_target in encoded:
        labels = torch.where(torch.tensor(is_target), torch.tensor(tokens), -100)[None]
        with torch.no_grad():
            loss = reference(input_ids=torch.tensor([tokens]), labels=labels).loss.item()
        total += loss * sum(is_target)
        count += sum(is_target)
    assert evaluate.held_out_loss(tiny.model, Examples.of(encoded))[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stops", [True, False])
def test_a_model_that_never_learned_to_stop_is_found_out(stops, config, tiny_tokenizer, tmp_path):
    """The same training but for one flag: whether <|im_end|> is a target."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ho"}]
    tokens, is_target = map(np.array, encode_chat(messages, tiny_tokenizer))
    is_target[tokens == tiny_tokenizer.control("<|im_end|>")] &= stops
    examples, model = Examples.of([(tokens, is_target)]), tiny_model()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=2e-2))
    for _ in range(60):
        batch = Batch.of(examples, [0])
        (loss_sum(model, batch, torch.float32) / len(batch.targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assistant.save(tmp_path / "model", model, tiny_tokenizer, torch.float32)
    trained = Assistant.load("", tmp_path / "model", torch.float32, "cpu")
    table = evaluate.reply_table(trained, Examples.of([encode_chat(messages, tiny_tokenizer)] * 3), config)
    assert table["greedy, ended by themselves"] == stops and table["prompts"] == 3
    if stops:
        assert table["greedy, length / reference"] == table["greedy, ROUGE-L"] == 1
        assert table["greedy, repeated 4-grams"] == 0


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return Assistant.load("tiny", tiny_folder, torch.float32, "cpu")


def encoded(tiny, *conversations):
    """Examples of (question, reply, what follows)."""
    roles = ("user", "assistant", "user", "assistant")
    return Examples.of([encode_chat([{"role": role, "content": text} for role, text in zip(roles, texts)], tiny.tokenizer)
                        for texts in conversations])


def test_prompts_that_do_not_fit_are_told(config, tiny, capsys):
    """The context holds 512 tokens."""
    examples = encoded(tiny, ("Q", "A"), ("1" * 600, "A"), ("Q", "A"))
    table = evaluate.reply_table(tiny, examples, config)
    assert table["prompts"] == 2
    assert "1 prompts left out: no room for --max-new-tokens 8" in capsys.readouterr().err
    config.max_new_tokens = 10**12
    assert evaluate.reply_table(tiny, examples, config) == {}
    assert "3 prompts left out" in capsys.readouterr().err
    config.max_prompts = 0
    assert evaluate.reply_table(tiny, examples, config) == {}


def test_prompt_and_reference_are_those_of_the_first_reply(config, tiny, monkeypatch):
    asked, compared = [], []
    monkeypatch.setattr(evaluate, "write_replies", lambda assistant, prompts, *_: asked.extend(prompts) or ([[5, 6]], [True]))
    monkeypatch.setattr(evaluate, "rouge_l", lambda reply, reference: compared.append(reference) or 1.0)
    evaluate.reply_table(tiny, encoded(tiny, ("What?", "A b c", "And?", "No")), config)
    assert asked == [tiny.prompt([{"role": "user", "content": "What?"}])] * 2 and compared == ["A b c"] * 2


def test_questions_have_answers():
    lines = evaluate.FACTS.read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    assert len(facts) >= 100 and len({fact["question"] for fact in facts}) == len(facts)
    for fact in facts:
        assert fact["accepted"]
        assert not evaluate.is_right(fact["question"], fact["accepted"])  # gives itself away


# ---- the program

@pytest.fixture
def run(config, records_file, monkeypatch, capsys):
    """A function that runs the program on some records; returns (status, stdout, stderr)."""
    data = records_file(some_records(40))
    options = ["--data", data, "--val-fraction", 0.3, "--max-prompts", 2, "--device", "cpu"]

    def run(*argv):
        words = ["evaluate", *argv, *options, *([] if "--max-new-tokens" in argv else
                                                ["--max-new-tokens", 4])]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        status = 0
        try:
            run_program(evaluate.main)
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())
    run.data = data
    return run


def held_out(records):
    """Those that run() holds out."""
    return [record for record in records if is_held_out(prompt_hash(
        [{"role": "user", "content": f"{record['instruction']} {record['context']}"}]), 0.3)]


def test_models_side_by_side(run, tiny_folder, tiny_tokenizer, tmp_path):
    other = tmp_path / "other"
    assistant.save(other, tiny_model(seed=5), tiny_tokenizer, torch.float32)
    status, table, _ = run(tiny_folder, other)
    assert status == 0 and table.splitlines()[0].split() == ["model", str(tiny_folder), str(other)]
    for words in ("held-out loss", "of 118", "sampled, repeated 4-grams"):
        assert words in table
    results = json.loads(run(tiny_folder, other, "--json")[1])
    assert [result["model"] for result in results] == [str(tiny_folder), str(other)]
    count = len(held_out(some_records(40)))
    assert results[0]["held-out examples"] == count
    assert [line.split() for line in table.splitlines()[1:3]] == [
        ["data", *[run.data.name] * 2], ["held-out", "examples", *[str(count)] * 2]]


def test_a_changed_model_is_evaluated_anew(run, tiny_folder, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    assistant.save(folder, tiny_model(seed=5), tiny_tokenizer, torch.float32)
    before = run(folder)[1]
    assistant.save(folder, tiny_model(seed=6), tiny_tokenizer, torch.float32)
    assert run(folder)[1] != before


def test_without_the_speed_ups(run, tiny_folder):
    """The same numbers to a few digits."""
    fast_results = json.loads(run(tiny_folder, "--json")[1])[0]
    results = json.loads(run(tiny_folder, "--json", "--plain")[1])[0]
    assert not fast.enabled
    assert results["held-out loss"][0] == pytest.approx(fast_results["held-out loss"][0], rel=1e-5)


def test_a_base_model_is_asked_in_the_chat_format(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    base, tiny = json.loads(run(base, tiny_folder, "--json")[1])
    assert base["held-out loss"][0] == pytest.approx(tiny["held-out loss"][0], rel=1e-3)


@pytest.mark.parametrize("fraction, val_data, warned", [  # run() holds out 0.3
    (0.3, None, ""), (0.02, None, "held out only 0.02 of this data"), (0.3, "test", "held out only 0 of this data")])
def test_a_run_that_was_trained_on_what_it_is_measured_on(
        fraction, val_data, warned, run, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "run.json").write_text(json.dumps(
        {"config": {"val_fraction": fraction, "val_data": val_data}, "data": {"files": {"x": sha256_of(run.data)}},
         "finished": False}))
    told = run(folder)[2]
    assert warned in told and ("held out only" in told) == bool(warned)


def test_bad_records_are_told(run, tiny_folder):
    run.data.write_text(run.data.read_text() + "not json\n")
    status, _, err = run(tiny_folder)
    assert status == 1 and "records.jsonl:41: not JSON" in err
    status, out, err = run(tiny_folder, "--skip-bad-records", "--json")
    assert "1 bad records are left out" in err and "records.jsonl:41: not JSON" in err
    assert status == 0 and json.loads(out)[0]["held-out examples"] == len(held_out(some_records(40)))


def test_a_measure_that_one_model_lacks():
    results = [{"model": "m", "loss": (2, 0.5), "greedy, prompts": 3}, {"model": "n", "loss": (1.0, None)}]
    assert evaluate.as_text(results).splitlines() == [
        "model            m              n", "loss             2.000 ± 0.500  1.000", "greedy, prompts  3"]


def test_errors_in_words(run, tmp_path, tiny_folder):
    status, out, err = run(tiny_folder, "--max-length", 8)
    assert status == 1 and out == "" and "holds out no example of up to 8 tokens" in err
    status, out, err = run(tmp_path / "nowhere")
    assert status == 1 and out == "" and "no such file or folder" in err
    assert run()[0] == 2


def test_other_files_of_a_model_folder_are_left_alone(run, tiny_folder, tmp_path):
    """Neither a pipe, which would wait for a writer, nor what is no part of a model is read."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    os.mkfifo(folder / "model-00001-of-00002.safetensors")
    os.mkfifo(folder / "notes")
    status, out, _ = run(folder, "--json")
    assert status == 0
    assert out.replace(str(folder), str(tiny_folder)) == run(tiny_folder, "--json")[1]


@pytest.mark.parametrize("content", [
    "[]", "{", '{"config": 1}', '{"data": []}', '{"config": {"val_fraction": "x"}}',
    '{"finished": true}', '{"config": {}, "finished": 1}'])
def test_a_run_json_of_something_else_is_named(content, run, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if '"x"' in content:
        content = content.replace("}}", '}, "data": {"files": {"x": "' + sha256_of(run.data) + '"}}}')
    (folder / "run.json").write_text(content)
    status, _, err = run(folder)
    assert status == 1 and "error: " in err and "Traceback" not in err
    assert str(folder / "run.json") in err


@pytest.mark.parametrize("max_length", [40, 2048])
def test_examples_that_are_too_long_are_told(max_length, run, tiny_folder, records_file):
    """For --max-length, or for the context of the model, which holds 512 tokens."""
    records = [{"prompt": f"Q{n}", "completion": "0123456789" * (60 if n % 2 else 1)} for n in range(40)]
    run.data.write_text("".join(json.dumps(record) + "\n" for record in records))
    status, out, err = run(tiny_folder, "--max-length", max_length, "--json")
    assert status == 0 and 0 < json.loads(out)[0]["held-out examples"] < 20
    assert f"20 examples left out: longer than {min(max_length, 512)} tokens" in err


def test_json_of_a_single_held_out_example_is_json(run, tiny_folder):
    run.data.write_text(json.dumps(held_out(some_records(40))[0]) + "\n")
    status, out, _ = run(tiny_folder, "--json")

    def refuse(constant):
        raise ValueError(constant)  # NaN is not JSON
    assert status == 0 and json.loads(out, parse_constant=refuse)[0]["held-out loss"][1] is None
