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
    prompt_hash,
    steps_per_epoch,
)
from parrot.files import records
from parrot.files.examples import Examples
from parrot.files.hub import find_data
from parrot.files.records import read_conversations, to_messages
from parrot.files.tokenizer import Tokenizer
from parrot.system.console import UserError

USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize("content, fault", [("", "no example to train on .no record."), ("\n\n", "no example to train on .no record.")])
def test_nothing_to_train_on(content, fault, tmp_path, tiny_tokenizer):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=fault):
        load_examples(find_data(path), tiny_tokenizer, 100, 0.1)


def test_every_record_is_too_long(records_file, tiny_tokenizer):
    path = records_file([{"messages": [{"role": "system", "content": "word " * 100}, USER, REPLY]}] * 3)
    with pytest.raises(UserError, match="no example to train on .3 examples left out: longer than 50 tokens"):
        load_examples(find_data(path), tiny_tokenizer, 50, 0.1)


def test_everything_is_held_out(records_file, tiny_tokenizer):
    record = next(r for r in some_records(50) if is_held_out(prompt_hash(to_messages(r, set())), 0.5))
    with pytest.raises(UserError, match="no example to train on .2 of 2 examples are held out .--val-fraction asks for 1.0.: there are 1 different prompts"):
        load_examples(find_data(records_file([record, record])), tiny_tokenizer, 100, 0.5)


# ---- the split

def prompts_of(examples, tokenizer):
    return {tokenizer.decode(examples[i][0]) for i in range(len(examples))}


def test_the_split_ignores_order_and_keeps_duplicates_together(records_file, tiny_tokenizer):
    records = some_records(100)
    twins = [{**r, "instruction": f"  {r['instruction'].upper()} ", "response": r["response"] + " "} for r in records]
    shuffled = records + twins
    random.Random(0).shuffle(shuffled)
    train, held, _ = load_examples(find_data(records_file(records)), tiny_tokenizer, 1000, 0.3)
    assert 15 < len(held) < 45 and len(train) + len(held) == 100
    train2, held2, _ = load_examples(find_data(records_file(shuffled)), tiny_tokenizer, 1000, 0.3)
    assert len(held2) == 2 * len(held) and len(train2) == 2 * len(train)
    assert prompts_of(held, tiny_tokenizer) <= prompts_of(held2, tiny_tokenizer)


def test_the_reply_does_not_decide_the_side():
    sides = {prompt_hash([USER, {"role": "assistant", "content": str(n)}]) for n in range(50)}
    assert len(sides) == 1
    assert not is_held_out(prompt_hash([USER, REPLY]), 0.0)


# ---- examples, counted

def test_examples_are_the_tokens_of_the_template(records_file, tiny_tokenizer):
    records = some_records(10)
    train, _, _ = load_examples(find_data(records_file(records)), tiny_tokenizer, 1000, 0.0)
    for index, record in enumerate(records):
        tokens, is_target = encode_chat(to_messages(record, set()), tiny_tokenizer)
        assert train[index][0].tolist() == tokens and train[index][1].tolist() == is_target
    assert train.source(3).endswith("records.jsonl:4")


def test_what_was_left_out_is_told(records_file, tiny_tokenizer):
    path = records_file([
        {"instruction": "Q", "context": "word " * 500, "response": "A"}, {"prompt": "Q", "completion": "word " * 500},
        {"prompt": "Q", "completion": "A"}, {"x": 1}])
    train, _, told = load_examples(find_data(path), tiny_tokenizer, 100, 0.0, skip_bad=True)
    assert len(train) == 1 and train.source(0).endswith(":3")
    assert told[0].startswith(f"1 bad records are left out ({path}:4: its keys with text are none; expected")
    assert told[1] == "2 examples left out: longer than 100 tokens"


# ---- the cache

def test_what_was_read_once_is_not_read_again(records_file, tiny_tokenizer, monkeypatch):
    path = records_file(some_records(20))
    first = load_examples(find_data(path), tiny_tokenizer, 100, 0.3)
    monkeypatch.setattr(data.chat, "encode_pieces", None)
    other = path.rename(path.with_name("renamed.jsonl"))
    second = load_examples(find_data(other), tiny_tokenizer, 100, 0.3)
    assert first[2] == second[2] and "renamed.jsonl:" in second[0].source(3)
    for one, two in zip(first[:2], second[:2]):
        assert len(one) == len(two) and all((a == b).all() for i in range(len(one)) for a, b in zip(one[i], two[i]))


def test_other_data_is_read_anew_other_limits_are_not(records_file, tiny_tokenizer, monkeypatch):
    settings = {"max_length": 100, "val_fraction": 0.3}
    path = records_file(some_records(20))
    load_examples(find_data(path), tiny_tokenizer, **settings)
    monkeypatch.setattr(data.chat, "encode_pieces", None)
    for changes in ({"max_length": 90}, {"val_fraction": 0.2}, {"max_examples": 7}):
        load_examples(find_data(path), tiny_tokenizer, **{**settings, **changes})
    with pytest.raises(TypeError):  # None was called
        load_examples(find_data(path), tiny_tokenizer, **settings, skip_bad=True)
    with pytest.raises(TypeError):
        load_examples(find_data(records_file(some_records(21))), tiny_tokenizer, **settings)


def test_another_tokenizer_and_another_kind_of_file_are_read_anew(records_file, tiny_tokenizer, tmp_path, monkeypatch):
    path = records_file(some_records(20))
    load_examples(find_data(path), tiny_tokenizer, 100, 0.3)
    shutil.copy(tiny_tokenizer.folder / "tokenizer.json", tmp_path)
    with open(tmp_path / "tokenizer.json", "a") as file:
        file.write("\n")
    monkeypatch.setattr(data.chat, "encode_pieces", None)
    with pytest.raises(TypeError):
        load_examples(find_data(path), Tokenizer(tmp_path), 100, 0.3)
    with pytest.raises(UserError, match="cannot read .*a.parquet"):
        load_examples(find_data(shutil.copy(path, tmp_path / "a.parquet")), tiny_tokenizer, 100, 0.3)


def test_what_was_tokenised_before_an_interruption_is_kept(records_file, tiny_tokenizer, monkeypatch):
    """Twenty records in parts of six, and Ctrl-C in the third part."""
    monkeypatch.setattr(data, "PART", 6)
    path, read = records_file(some_records(20)), []

    def read_from(path, bad, start, stop, pairs):
        read.append(start)
        if len(read) == 3:
            raise KeyboardInterrupt
        return read_conversations(path, bad, start, stop)
    monkeypatch.setattr(records, "read_conversations", read_from)
    with pytest.raises(KeyboardInterrupt):
        load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)
    train, _, _ = load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)
    assert read == [0, 6, 12, 12, 18]
    for i, record in enumerate(some_records(20)):
        assert train[i][0].tolist() == encode_chat(to_messages(record, set()), tiny_tokenizer)[0]
        assert train.source(i) == f"{path}:{i + 1}"


def test_data_that_changes_while_it_is_read_is_not_kept(records_file, tiny_tokenizer, monkeypatch):
    path = records_file(some_records(23))

    def changing(*args):
        path.write_text(path.read_text() * 2)
        return read_conversations(*args)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="changed while it was read"):
        patch.setattr(records, "read_conversations", changing)
        load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)
    assert len(load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)[0]) == 46


def test_the_first_examples_and_several_files(records_file, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PART", 6)
    one, two = records_file(some_records(10), "one.jsonl"), records_file(some_records(9)[5:], "two.jsonl")
    train, _, _ = load_examples(find_data([one, two]), tiny_tokenizer, 1000, 0.0)
    assert [train.source(i) for i in (0, 9, 10, 13)] == [f"{one}:1", f"{one}:10", f"{two}:1", f"{two}:4"]
    assert train[10][0].tolist() == train[5][0].tolist()
    assert len(load_examples(find_data([one, two]), tiny_tokenizer, 1000, 0.0, max_examples=12)[0]) == 12
    assert load_examples(find_data(one), tiny_tokenizer, 1000, 0.0, max_examples=2)[0].source(1) == f"{one}:2"


# ---- what is held out, and what is told

def test_a_file_of_its_own_can_be_held_out(records_file, tiny_tokenizer):
    ours, theirs = records_file(some_records(10)), records_file(some_records(12)[9:], "theirs.jsonl")
    train, held_out, told = load_examples(find_data(ours), tiny_tokenizer, 1000, 0.5, val_data=find_data(theirs))
    assert len(train) == 10 and [held_out.source(i) for i in range(3)] == [f"{theirs}:{n}" for n in (1, 2, 3)]
    assert told == ["1 held-out examples have a prompt that is trained on"]


@pytest.mark.parametrize("prompt, fault", [("Write a haiku.", "0 of 60 examples"), ("Write lyrics.", "0 of 60 examples"),
                                           ("a", "60 of 60 examples are held out")])
def test_one_prompt_for_all_records(prompt, fault, records_file, tiny_tokenizer):
    path = records_file([{"prompt": prompt, "completion": f"Line {n}"} for n in range(60)])
    held_out = is_held_out(prompt_hash([{"role": "user", "content": prompt}]), 0.3)
    try:
        _, _, told = load_examples(find_data(path), tiny_tokenizer, 1000, 0.3)
    except UserError as error:
        told = [str(error)]
    assert held_out == ("60 of 60 examples are held out" in told[0]) and "of 60 examples" in told[0]
    assert "1 different prompts" in told[0] and "--val-fraction (0: none), or --val-data" in told[0]


REMARKS = [
    ({"prompt": "Q", "completion": "A", "hint": "C"}, "1 records have text under 'hint', which is not used"),
    ({"question": "Q", "answer": "A", "tags": {"a": ["C"]}}, "text under 'tags'"),
    ({"messages": [{**USER, "name": "Kim"}, REPLY]}, "text under 'name (of a turn)'"),
    ({"prompt": [USER], "context": "C", "completion": [REPLY]}, "text under 'context'"),
    ({"prompt": "def f():", "completion": "    return 1"}, "1 records have a reply whose first line loses its indentation"),
    ({"prompt": "def f():", "completion": "\n\treturn 1"}, "loses its indentation"),
    ({"prompt": "Q<|im_end|>", "completion": "A"}, "1 records spell a control token"),
    ({"instruction": "Q", "input": "<|endoftext|>", "output": "A"}, "spell a control token"),
    ({"prompt": "Q", "completion": "<|im_start|>A"}, "spell a control token"),
    ({"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]}, "replies that are not learned"),
    ({"messages": [USER, {**REPLY, "train": False}, USER, REPLY]}, "replies that are not learned"),
    ({"prompt": [USER, REPLY, USER], "completion": [REPLY]}, "replies that are not learned")]


@pytest.mark.parametrize("record, remark", REMARKS)
def test_what_is_not_learned_as_it_stands_is_told(record, remark, records_file, tiny_tokenizer):
    path = records_file([{"prompt": "Q", "completion": " A"}, record])
    [told] = load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)[2]
    assert remark in told and f"({path}:2)" in told


def test_remarks_are_counted_over_all_parts(records_file, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(data, "PART", 6)
    path = records_file([{"prompt": str(n), "completion": "A", "x": "C" * (n > 3)} for n in range(20)])
    assert load_examples(find_data(path), tiny_tokenizer, 1000, 0.0)[2] == [
        f"16 records have text under 'x', which is not used ({path}:5, {path}:6, {path}:7 ...)"]


# ---- the cache's files

TOKENS = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9)


@given(parts=st.lists(st.tuples(TOKENS, st.integers(0, 2**40), st.booleans())))
def test_the_store_gives_back_what_was_written(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    pairs = [(tokens, [t % 2 == 0 for t in tokens]) for tokens, _, _ in parts]
    Examples.of(pairs, [number for _, number, _ in parts], [held for *_, held in parts]).save(folder)
    everything = Examples().with_part(folder, "x:")
    for side, read in enumerate((everything.where(everything.hashes == 0), everything.where(everything.hashes == 1))):
        written = [(tokens, number) for tokens, number, held in parts if held == side]
        assert [read[i][0].tolist() for i in range(len(read))] == [tokens for tokens, _ in written]
        assert [read[i][1].tolist() for i in range(len(read))] == [[t % 2 == 0 for t in tokens] for tokens, _ in written]
        assert [read.source(i) for i in range(len(read))] == [f"x:{number}" for _, number in written]


# ---- order and ribbons

def test_every_epoch_sees_every_example_once_in_a_new_order(records_file, tiny_tokenizer):
    train, _, _ = load_examples(find_data(records_file(some_records(50))), tiny_tokenizer, 1000, 0.0)
    assert steps_per_epoch(train, 16) == 4
    assert [len(examples_of_step(step, train, 16, seed=0)) for step in range(8)] == [13, 13, 12, 12] * 2
    epochs = [np.concatenate([examples_of_step(4 * epoch + i, train, 16, seed=0) for i in range(4)]).tolist()
              for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert examples_of_step(5, train, 16, seed=0).tolist() == epochs[1][13:26]
    assert examples_of_step(5, train, 16, seed=1).tolist() != epochs[1][13:26]


def test_a_ribbon_written_out(records_file, tiny_tokenizer):
    train, _, _ = load_examples(find_data(records_file([{"prompt": "Q", "completion": "A"}, {"prompt": "QQ", "completion": "BC"}])),
                                tiny_tokenizer, 100, 0.0)
    batch = Batch.of(train, [1, 0])
    assert batch.ribbon.lengths == [train.lengths[1], train.lengths[0]]
    assert batch.tokens.tolist() == [*train[1][0], *train[0][0]]
    assert tiny_tokenizer.decode(batch.targets, with_control=True) == "BC<|im_end|>A<|im_end|>"
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
    load_examples(find_data(path), tiny_tokenizer, 100, 0.3)
    monkeypatch.setattr(data, "CODE", "of an edited chat.py")
    monkeypatch.setattr(data.chat, "encode_pieces", None)
    with pytest.raises(TypeError):  # None was called
        load_examples(find_data(path), tiny_tokenizer, 100, 0.3)
