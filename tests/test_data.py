"""The split, the counts, the shuffle, the ribbons."""

import random
import shutil

import numpy as np
import pytest
from conftest import some_records
from hypothesis import given
from hypothesis import strategies as st

from parrot import data
from parrot.chat import encode_chat
from parrot.data import (
    Batch,
    examples_of_step,
    is_held_out,
    load_examples,
    micro_batches,
    steps_per_epoch,
)
from parrot.files import cache, examples
from parrot.files.records import to_messages
from parrot.files.tokenizer import Tokenizer
from parrot.system.console import UserError

USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize("content, fault", [("", "no example to train on"), ("\n\n", "no example to train on")])
def test_nothing_to_train_on(content, fault, tmp_path, tiny_tokenizer):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=fault):
        load_examples(path, tiny_tokenizer, 100, 0.1)


def test_every_record_is_too_long(records_file, tiny_tokenizer):
    path = records_file([{"messages": [{"role": "system", "content": "word " * 100}, USER, REPLY]}] * 3)
    with pytest.raises(UserError, match="no example to train on .3 left out: longer than --max-length 50"):
        load_examples(path, tiny_tokenizer, 50, 0.1)


def test_everything_is_held_out(records_file, tiny_tokenizer):
    record = next(r for r in some_records(50) if is_held_out(to_messages(r), 0.5))
    with pytest.raises(UserError, match="no example to train on; 2 held out by --val-fraction 0.5"):
        load_examples(records_file([record, record]), tiny_tokenizer, 100, 0.5)


# ---- the split

def prompts_of(examples, tokenizer):
    return {tokenizer.decode(examples[i][0]) for i in range(len(examples))}


def test_the_split_ignores_order_and_keeps_duplicates_together(records_file, tiny_tokenizer):
    records = some_records(100)
    twins = [{**r, "instruction": f"  {r['instruction'].upper()} ", "response": r["response"] + " "} for r in records]
    shuffled = records + twins
    random.Random(0).shuffle(shuffled)
    train, held, _ = load_examples(records_file(records), tiny_tokenizer, 1000, 0.3)
    assert 15 < len(held) < 45 and len(train) + len(held) == 100
    train2, held2, _ = load_examples(records_file(shuffled), tiny_tokenizer, 1000, 0.3)
    assert len(held2) == 2 * len(held) and len(train2) == 2 * len(train)
    assert prompts_of(held, tiny_tokenizer) <= prompts_of(held2, tiny_tokenizer)


def test_the_reply_does_not_decide_the_side():
    sides = {is_held_out([USER, {"role": "assistant", "content": str(n)}], 0.5) for n in range(50)}
    assert len(sides) == 1
    assert not is_held_out([USER, REPLY], 0.0)


# ---- examples, counted

def test_examples_are_the_tokens_of_the_template(records_file, tiny_tokenizer):
    records = some_records(10)
    train, _, _ = load_examples(records_file(records), tiny_tokenizer, 1000, 0.0)
    for index, record in enumerate(records):
        tokens, is_target = encode_chat(to_messages(record), tiny_tokenizer)
        assert train[index][0].tolist() == tokens and train[index][1].tolist() == is_target
    assert train.source(3).endswith("records.jsonl:4")


def test_what_was_left_out_is_told(records_file, tiny_tokenizer):
    path = records_file([
        {"instruction": "Q", "context": "word " * 500, "response": "A"}, {"prompt": "Q", "completion": "word " * 500},
        {"prompt": "Q", "completion": "A"}, {"x": 1}])
    train, _, notes = load_examples(path, tiny_tokenizer, 100, 0.0, skip_bad=True)
    assert len(train) == 1 and train.source(0).endswith(":3")
    assert notes["told"][0] == "2 left out: longer than --max-length 100"
    assert notes["told"][1].startswith("1 bad, left out: ") and ":4: its keys are x" in notes["told"][1]


# ---- the cache

def test_what_was_read_once_is_not_read_again(records_file, tiny_tokenizer, monkeypatch):
    path = records_file(some_records(20))
    first = load_examples(path, tiny_tokenizer, 100, 0.3)
    monkeypatch.setattr(data, "encode_pieces", None)
    other = path.rename(path.with_name("renamed.jsonl"))
    second = load_examples(other, tiny_tokenizer, 100, 0.3)
    assert first[2] == second[2] and "renamed.jsonl:" in second[0].source(3)
    for one, two in zip(first[:2], second[:2]):
        assert len(one) == len(two) and all((a == b).all() for i in range(len(one)) for a, b in zip(one[i], two[i]))


@pytest.mark.parametrize("changes", [{"max_length": 90}, {"val_fraction": 0.2}, {"skip_bad": True}])
def test_other_settings_and_other_data_are_read_anew(changes, records_file, tiny_tokenizer, monkeypatch):
    settings = {"max_length": 100, "val_fraction": 0.3}
    path = records_file(some_records(20))
    load_examples(path, tiny_tokenizer, **settings)
    monkeypatch.setattr(data, "encode_pieces", None)
    with pytest.raises(TypeError):  # None was called
        load_examples(path, tiny_tokenizer, **{**settings, **changes})
    with pytest.raises(TypeError):
        load_examples(records_file(some_records(21)), tiny_tokenizer, **settings)


def test_another_tokenizer_and_another_kind_of_file_are_read_anew(records_file, tiny_tokenizer, tmp_path, monkeypatch):
    path = records_file(some_records(20))
    load_examples(path, tiny_tokenizer, 100, 0.3)
    shutil.copy(tiny_tokenizer.folder / "tokenizer.json", tmp_path)
    with open(tmp_path / "tokenizer.json", "a") as file:
        file.write("\n")
    monkeypatch.setattr(data, "encode_pieces", None)
    with pytest.raises(TypeError):
        load_examples(path, Tokenizer(tmp_path), 100, 0.3)
    with pytest.raises(UserError, match="not a Parquet file"):
        load_examples(shutil.copy(path, tmp_path / "a.parquet"), tiny_tokenizer, 100, 0.3)


def test_the_cache_keeps_the_last_few(records_file, tiny_tokenizer):
    for count in range(10, 22):
        load_examples(records_file(some_records(count)), tiny_tokenizer, 100, 0.0)
    assert len(list((cache.cache_folder() / "data").iterdir())) == 8


TOKENS = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9)


@given(parts=st.lists(st.tuples(TOKENS, st.integers(0, 2**40), st.booleans())), large=st.booleans())
def test_the_store_gives_back_what_was_written(parts, large, tmp_path_factory):
    folder, size = tmp_path_factory.mktemp("store"), 2**17 if large else 2**16
    examples.write(folder, [(tokens, [t % 2 == 0 for t in tokens], number, held) for tokens, number, held in parts], size)
    for side, read in enumerate(examples.read(folder, size, "x:")):
        written = [(tokens, number) for tokens, number, held in parts if held == side]
        assert [read[i][0].tolist() for i in range(len(read))] == [tokens for tokens, _ in written]
        assert [read[i][1].tolist() for i in range(len(read))] == [[t % 2 == 0 for t in tokens] for tokens, _ in written]
        assert [read.source(i) for i in range(len(read))] == [f"x:{number}" for _, number in written]


# ---- order and ribbons

def test_every_epoch_sees_every_example_once_in_a_new_order(records_file, tiny_tokenizer):
    train, _, _ = load_examples(records_file(some_records(50)), tiny_tokenizer, 1000, 0.0)
    assert steps_per_epoch(train, 16) == 4
    assert [len(examples_of_step(step, train, 16, seed=0)) for step in range(8)] == [13, 13, 12, 12] * 2
    epochs = [np.concatenate([examples_of_step(4 * epoch + i, train, 16, seed=0) for i in range(4)]).tolist()
              for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert examples_of_step(5, train, 16, seed=0).tolist() == epochs[1][13:26]
    assert examples_of_step(5, train, 16, seed=1).tolist() != epochs[1][13:26]


def test_a_ribbon_written_out(records_file, tiny_tokenizer):
    train, _, _ = load_examples(records_file([{"prompt": "Q", "completion": "A"}, {"prompt": "QQ", "completion": "BC"}]),
                                tiny_tokenizer, 100, 0.0)
    batch = Batch.of(train, [1, 0])
    assert batch.ribbon.lengths == [train.lengths[1], train.lengths[0]]
    assert batch.tokens.tolist() == [*train[1][0], *train[0][0]]
    assert tiny_tokenizer.decode_with_control(batch.targets) == "BC<|im_end|>A<|im_end|>"
    assert (batch.tokens[batch.rows + 1] == batch.targets).all()
    assert tiny_tokenizer.decode([batch.tokens[batch.rows[0]]]) == "\n"  # after "assistant\n" comes the reply


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), most=st.integers(1, 8) | st.none(),
       budget=st.integers(1, 120) | st.none())
def test_micro_batches_keep_order_and_limits(lengths, most, budget):
    batches = micro_batches(range(len(lengths)), lengths, most, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= (most or len(lengths))
        assert len(batch) == 1 or not budget or sum(lengths[i] for i in batch) <= budget



def test_editing_what_makes_the_tokens_changes_the_key(records_file, tiny_tokenizer, monkeypatch):
    path = records_file(some_records(20))
    load_examples(path, tiny_tokenizer, 100, 0.3)
    monkeypatch.setattr(data, "CODE", "of an edited chat.py")
    monkeypatch.setattr(data, "encode_pieces", None)
    with pytest.raises(TypeError):  # None was called
        load_examples(path, tiny_tokenizer, 100, 0.3)
