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
from parrot.files.records import Conversation, read_conversations
from parrot.system.console import UserError, run_program
from parrot.system.disk import read_json, sha256_of
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


def test_the_loss_of_each_category_is_that_of_transformers(config, tiny_folder, records_file):
    records = some_records(12)
    for i, record in enumerate(records):
        record["category"] = "all" if i % 2 else "even"  # a name like any other
    conversations = list(read_conversations(records_file(records)))
    tiny = Assistant("tiny", *assistant.load_parts(tiny_folder))
    table = evaluate.loss_table(tiny, conversations, config)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    sums, counts = {"all": 0, "even": 0}, {"all": 0, "even": 0}
    for conversation in conversations:
        tokens, is_target = encode_chat(conversation.messages, tiny.tokenizer)
        labels = torch.where(torch.tensor(is_target), torch.tensor(tokens), -100)[None]
        with torch.no_grad():
            loss = reference(input_ids=torch.tensor([tokens]), labels=labels).loss.item()
        sums[conversation.category] += loss * sum(is_target)
        counts[conversation.category] += sum(is_target)
    for name in sums:
        assert table[name][0] == pytest.approx(sums[name] / counts[name], rel=1e-5)
        assert table[name][2] == 6
    assert table[""][0] == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)
    assert table[""][2] == 12


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
    conversations = [Conversation(messages, "here")] * 3
    greedy = evaluate.reply_table(trained, conversations, config)["greedy"]
    assert greedy["ended by themselves"] == stops and greedy["prompts"] == 3
    if stops:
        assert greedy["length / reference"] == greedy["ROUGE-L"] == 1
        assert greedy["repeated 4-grams"] == 0


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return Assistant.load("tiny", tiny_folder, torch.float32, "cpu")


def test_prompts_that_do_not_fit_are_told(config, tiny, capsys):
    """The context holds 512 tokens."""
    conversations = []
    for content in ("Q", "1" * 600, "Q", None):  # the last one begins with a reply
        question = [{"role": "user", "content": content}] if content else []
        messages = [*question, {"role": "assistant", "content": "A"}]
        conversations.append(Conversation(messages, "here"))
    table = evaluate.reply_table(tiny, conversations, config)
    assert table["greedy"]["prompts"] == table["sampled"]["prompts"] == 2
    assert "1 prompts left out: no room for --max-new-tokens 8" in capsys.readouterr().err
    config.max_new_tokens = 10**12
    assert evaluate.reply_table(tiny, conversations, config) == {}
    assert "3 prompts left out" in capsys.readouterr().err
    config.max_prompts = 0
    assert evaluate.reply_table(tiny, conversations, config) == {}


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
    assert status == 0 and table.splitlines()[0].split() == [str(tiny_folder), str(other)]
    for words in ("held-out loss, open_qa", "of 118", "sampled, repeated 4-grams"):
        assert words in table
    results = json.loads(run(tiny_folder, other, "--json")[1])
    assert [result["model"] for result in results] == [str(tiny_folder), str(other)]
    count = len(held_out(some_records(40)))
    assert results[0]["loss"][""][2] == count
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
    assert results["loss"][""][0] == pytest.approx(fast_results["loss"][""][0], rel=1e-5)


def test_a_base_model_is_asked_in_the_chat_format(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    base, tiny = json.loads(run(base, tiny_folder, "--json")[1])
    assert base["loss"][""][0] == pytest.approx(tiny["loss"][""][0], rel=1e-3)


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


def test_records_that_are_bad_or_of_odd_categories(run, tiny_folder, records_file):
    records = some_records(40)
    for i, record in enumerate(records):
        record["category"] = "all" if i % 5 else None
    path = records_file(records)
    run.data.write_text(path.read_text() + "not json\n")
    status, _, err = run(tiny_folder)
    assert status == 1 and "records.jsonl:41: not JSON" in err
    status, out, err = run(tiny_folder, "--skip-bad-records", "--json")
    assert "1 bad records are left out (the first: 41, not JSON" in err
    loss = json.loads(out)[0]["loss"]
    assert status == 0 and set(loss) == {"", "all"} and loss[""][2] == len(held_out(records))
    assert loss["all"][2] == len([r for r in held_out(records) if r["category"]])
    table = run(tiny_folder, "--skip-bad-records")[1]
    titles = [line.split("  ")[0] for line in table.splitlines()]
    assert "held-out loss" in titles and "held-out loss, all" in titles


def test_a_category_that_one_model_has_no_example_of():
    both = {"": [2, 0.5, 2], "here": [1, None, 1]}
    results = [{"model": "m", "data": "d", "loss": loss, "replies": {},
                "facts": {"right": 1, "of": 2}} for loss in (both, {"": both[""]})]
    rows = {title: cells for title, *cells in evaluate.rows_of(results)}
    assert rows["held-out loss"] == ["2.000 ± 0.500"] * 2
    assert rows["held-out loss, here"] == ["1.000", ""]


def test_errors_in_words(run, tmp_path, tiny_folder):
    status, out, err = run(tiny_folder, "--max-length", 8)
    assert status == 1 and out == "" and "no held-out example has 8 tokens or fewer" in err
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


@pytest.fixture
def finished(run, tiny_folder, tmp_path):
    """The folder of a run that train.py has finished, and the function that evaluates."""
    import train
    out = tmp_path / "somewhere" / "parrot<b>"
    train.train(TrainConfig(weights=str(tiny_folder), data=str(run.data), out=str(out), epochs=1,
                            val_fraction=0.3, device="cpu"))
    return out


def test_a_run_shows_its_evaluation_without_the_folders_of_this_machine(
        finished, run, tmp_path, tiny_folder):
    assert run(finished, tiny_folder)[0] == 0
    table = read_json(finished / "evaluation.json")["table"]
    assert table[0] == ["", finished.name, tiny_folder.name]
    for name in ("README.md", "report.html", "evaluation.json", "run.json"):
        text = (finished / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(tiny_folder.parent) not in text
        assert name.endswith("json") or "&lt;b" in text and "<b>" not in text


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


def test_examples_that_are_too_long_are_told(config, tiny, capsys):
    config.max_length = 20
    conversations = [Conversation([{"role": "assistant", "content": text}], "")
                     for text in ("0", "0123456789" * 3)]
    with pytest.raises(UserError, match="no held-out example has 20 tokens or fewer"):
        evaluate.loss_table(tiny, conversations[1:], config)
    assert evaluate.loss_table(tiny, conversations, config)[""][2] == 1
    assert "1 held-out examples left out: longer than" in capsys.readouterr().err


def test_examples_beyond_the_models_context_are_left_out(config, tiny, capsys):
    conversations = [Conversation([{"role": "assistant", "content": "0 " * count}], "") for count in (5, 5000)]
    assert config.max_length > tiny.model.config.max_position_embeddings
    assert evaluate.loss_table(tiny, conversations, config)[""][2] == 1
    assert f"longer than {tiny.model.config.max_position_embeddings} tokens" in capsys.readouterr().err
