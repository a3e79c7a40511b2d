"""Each measure on cases worked out by hand, and the program as it is used."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import some_records, tiny_model
from transformers import AutoModelForCausalLM

from parrot import evaluate, weights
from parrot.chat import encode_chat
from parrot.config import EvaluateConfig, TrainConfig
from parrot.console import run_program
from parrot.data import Batch, Examples, is_held_out
from parrot.files import sha256_of
from parrot.optim import make_optimizer
from parrot.records import Conversation, read_conversations
from parrot.speaker import Speaker
from parrot.training import accumulate_gradients


@pytest.mark.parametrize("replies, expected", [
    ([[]], 0), ([[1, 2, 3]], 0), ([[1, 2, 3, 4]], 0), ([[7] * 10], 6 / 7), ([[1, 2, 3, 4, 5, 1, 2, 3, 4]], 1 / 6),
    ([[1, 2, 3, 4], [1, 2, 3, 4]], 0), ([[7] * 10, [1, 2], [1, 2, 3, 4, 5, 1, 2, 3, 4]], 7 / 13)])
def test_repetition(replies, expected):
    assert evaluate.share_repeated(replies) == expected


@pytest.mark.parametrize("reply, reference, expected", [
    ("", "a b", 0), ("a b", "", 0), ("a b c", "a b c", 1), ("A, b; C!", "a b c", 1), ("c b a", "a b c", 1 / 3),
    ("a x b y", "a b", 2 * 2 / 6), ("police killed the gunman", "the gunman police killed", 0.5)])
def test_rouge_l(reply, reference, expected):
    assert evaluate.rouge_l(reply, reference) == pytest.approx(expected)


@pytest.mark.parametrize("reply, accepted, right", [
    ("The capital is Paris.", ["Paris"], True), ("the PARIS of today", ["paris"], True), ("Parisian", ["Paris"], False),
    ("It is 1945.", ["1945"], True), ("19450", ["1945"], False), ("H2O", ["H2O", "H₂O"], True), ("", ["x"], False),
    ("the blue whale", ["blue whale"], True), ("twenty-four hours", ["24", "twenty-four"], True)])
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
    means, errors = zip(*(evaluate.mean_and_error(*draw()) for _ in range(2000)))
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.1)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Small settings, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return EvaluateConfig(models=[], max_prompts=4, max_new_tokens=8, device="cpu", dtype="float32", batch_size=3)


def test_the_loss_of_each_category_is_that_of_transformers(config, tiny_folder, records_file):
    records = some_records(12)
    for i, record in enumerate(records):
        record["category"] = "odd" if i % 2 else "even"
    conversations = list(read_conversations(records_file(records)))
    speaker = Speaker.of("tiny", *weights.load(tiny_folder))
    table = evaluate.loss_table(speaker, conversations, config)
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    sums, counts = {"odd": 0, "even": 0}, {"odd": 0, "even": 0}
    for conversation in conversations:
        tokens, supervised = encode_chat(conversation.messages, speaker.tokenizer)
        labels = torch.tensor([[t if s else -100 for t, s in zip(tokens, supervised)]])
        with torch.no_grad():
            loss = reference(input_ids=torch.tensor([tokens]), labels=labels).loss.item()
        sums[conversation.category] += loss * sum(supervised)
        counts[conversation.category] += sum(supervised)
    for name in sums:
        assert table[name][0] == pytest.approx(sums[name] / counts[name], rel=1e-5) and table[name][2] == 6
    assert table["all"][0] == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)


@pytest.mark.parametrize("stops", [True, False])
def test_a_model_that_never_learned_to_stop_is_found_out(stops, config, tiny_tokenizer, tmp_path):
    """The same training but for one flag: whether <|im_end|> is supervised."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ho"}]
    tokens, supervised = map(np.array, encode_chat(messages, tiny_tokenizer))
    supervised[tokens == tiny_tokenizer.control("<|im_end|>")] &= stops
    examples, model = Examples.of([(tokens, supervised)]), tiny_model()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=2e-2))
    for _ in range(60):
        batch = Batch.of(examples, [0])
        accumulate_gradients(model, [batch], len(batch.targets), torch.float32)
        optimizer.step(), optimizer.zero_grad()
    weights.save_model(tmp_path / "model", model, tiny_tokenizer, torch.float32)
    speaker = Speaker.load("", tmp_path / "model", torch.float32, "cpu")
    greedy = evaluate.reply_table(speaker, [Conversation(messages, "here")] * 3, config)["greedy"]
    assert greedy["ended"] == stops and greedy["prompts"] == 3
    if stops:
        assert greedy["length"] == 1 and greedy["rouge_l"] == 1 and greedy["repeated"] == 0


def test_the_references_show_how_much_people_repeat_themselves(config, tiny_folder):
    speaker = Speaker.load("", tiny_folder, torch.float32, "cpu")
    conversation = Conversation([{"role": "user", "content": "Count"}, {"role": "assistant", "content": "01230123"}], "here")
    assert len(speaker.tokenizer.encode("01230123")) == 8  # digits one by one: 1 of 5 4-grams stood before
    assert evaluate.reply_table(speaker, [conversation] * 2, config)["references"] == {"repeated": 0.2}


def test_questions_have_answers():
    questions = [json.loads(line) for line in evaluate.QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(questions) >= 100 and len({each["question"] for each in questions}) == len(questions)
    assert all(each["accepted"] for each in questions)
    assert not [each for each in questions if evaluate.is_right(each["question"], each["accepted"])]  # gives itself away
    assert [each["accepted"][0] for each in questions[:3]] == ["Marie Curie", "Mercury", "Ottawa"]


@pytest.fixture
def run(config, records_file, monkeypatch, capsys):
    """A function that runs the program on some records; returns (status, stdout, stderr)."""
    data = records_file(some_records(40))

    def run(*argv):
        monkeypatch.setattr("sys.argv", ["evaluate", *map(str, argv), "--data", str(data), "--val-fraction", "0.3",
                                         "--max-prompts", "2", "--max-new-tokens", "4", "--device", "cpu"])
        status = 0
        try:
            run_program(evaluate.main)
        except SystemExit as error:
            status = error.code
        return (status, *capsys.readouterr())
    run.data = data
    return run


def test_models_side_by_side_and_from_the_cache_the_second_time(run, tiny_folder, tiny_tokenizer, tmp_path, monkeypatch):
    other = tmp_path / "other"
    weights.save_model(other, tiny_model(seed=5), tiny_tokenizer, torch.float32)
    status, table, _ = run(tiny_folder, other)
    assert status == 0 and table.splitlines()[0].split() == [str(tiny_folder), str(other)]
    assert "held-out loss, open_qa" in table and "Who was the first woman" in table and "of 118" in table
    assert "references, repeated 4-grams" in table
    monkeypatch.setattr(weights, "load", None)  # a second call loads nothing
    assert run(tiny_folder, other)[1] == table
    results = json.loads(run(tiny_folder, other, "--json")[1])
    assert [each["model"] for each in results] == [str(tiny_folder), str(other)]
    held_out = [r for r in some_records(40) if is_held_out([{"role": "user", "content": r["instruction"],
                                                             "context": r["context"]}], 0.3)]
    assert results[0]["loss"]["all"][2] == len(held_out)
    assert [line.split() for line in table.splitlines()[1:3]] == [["data", *[run.data.name] * 2],
                                                                  ["held-out", "examples", *[str(len(held_out))] * 2]]
    monkeypatch.undo()


def test_a_changed_model_is_evaluated_anew(run, tiny_folder, tiny_tokenizer, tmp_path):
    folder = tmp_path / "model"
    weights.save_model(folder, tiny_model(seed=5), tiny_tokenizer, torch.float32)
    before = run(folder)[1]
    weights.save_model(folder, tiny_model(seed=6), tiny_tokenizer, torch.float32)
    assert run(folder)[1] != before


def test_a_base_model_is_judged_in_plain_text_too(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / "tokenizer_config.json").unlink()
    plain, chat = json.loads(run(base, "--json")[1])
    assert (plain["format"], chat["format"]) == ("plain", "chat") and plain["loss"] != chat["loss"]
    assert chat["loss"]["all"][0] == pytest.approx(json.loads(run(tiny_folder, "--json")[1])[0]["loss"]["all"][0], rel=1e-3)


def test_a_run_that_was_trained_on_what_it_is_measured_on(run, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for fraction, told in ((0.3, False), (0.02, True)):  # run() holds out 0.3
        (folder / "run.json").write_text(json.dumps({"config": {"val_fraction": fraction}, "data": {
            "sha256": sha256_of(tmp_path / "records.jsonl")}}))
        assert ("held out only 0.02 of this data" in run(folder)[2]) == told


def test_records_that_are_bad_or_of_odd_categories(run, config, tiny_folder, records_file, tmp_path):
    records = [{**each, "category": "all" if i % 5 else None} for i, each in enumerate(some_records(40))]
    path = records_file(records)
    run.data.write_text(path.read_text() + "not json\n")
    status, _, err = run(tiny_folder)
    assert status == 1 and "records.jsonl:41: not JSON" in err
    status, out, _ = run(tiny_folder, "--skip-bad-records", "--json")
    loss = json.loads(out)[0]["loss"]
    assert status == 0 and list(loss) == ["all"] and loss["all"][2] == len(
        [r for r in records if is_held_out([{"role": "user", "content": r["instruction"], "context": r["context"]}], 0.3)])


def test_a_category_that_one_model_has_no_example_of():
    assert evaluate.with_error(None, None) == "" and evaluate.with_error(1, None) == "1.000"


def test_errors_in_words(run, tmp_path, tiny_folder):
    status, out, err = run(tiny_folder, "--max-length", 8)
    assert status == 1 and out == "" and "no held-out example fits --max-length 8" in err
    status, out, err = run(tmp_path / "nowhere")
    assert status == 1 and out == "" and "no such file or folder" in err
    assert run()[0] == 2
