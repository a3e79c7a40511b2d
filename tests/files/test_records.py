"""Records in every shape, and faults by file and line, whatever the bytes."""

import json

import pytest
from conftest import some_records
from hypothesis import given
from hypothesis import strategies as st

from parrot.data import load_examples
from parrot.files.hub import QUICKSTART_DATA
from parrot.files.records import read_conversations, to_messages
from parrot.system.console import UserError

USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize("record, expected", [
    ({"instruction": "Q", "context": "", "response": "A", "category": "open_qa"}, [USER, REPLY]),
    ({"instruction": "Q", "context": "C", "response": "A"}, [{**USER, "context": "C"}, REPLY]),
    ({"instruction": "Q", "input": "C", "output": "A"}, [{**USER, "context": "C"}, REPLY]),
    ({"instruction": "Q", "output": "A"}, [USER, REPLY]),
    ({"prompt": "Q", "completion": "A"}, [USER, REPLY]),
    ({"messages": [{"role": "system", "content": "S"}, USER, REPLY, USER, REPLY], "id": 7},
     [{"role": "system", "content": "S"}, USER, REPLY, USER, REPLY])])
def test_four_shapes_are_told_apart_by_their_keys(record, expected):
    assert to_messages(record) == expected


BAD = [
    ("{", "not JSON"), ("[1]", "not a JSON object but a list"),
    ('"text"', "not a JSON object but a str"),
    ("{}", "its keys are none; expected instruction and response"),
    ('{"question": "Q", "answer": "A"}', "its keys are answer, question"),
    ('{"instruction": "Q", "response": ""}', "response is '', expected text"),
    ('{"instruction": " \\n", "response": "A"}', "instruction is ' \\n', expected text"),
    ('{"instruction": "Q", "response": 7}', "response is 7, expected text"),
    ('{"instruction": null, "response": "A"}', "instruction is None, expected text"),
    ('{"instruction": "Q", "context": ["C"], "response": "A"}', "context is ['C'], expected text"),
    ('{"prompt": "Q", "completion": "\\ud800"}', "half of a surrogate pair"),
    ('{"messages": "Q"}', "messages is not a list of objects"),
    ('{"messages": []}', "nothing to learn"),
    ('{"messages": [{"role": "user", "content": "Q"}]}', "nothing to learn"),
    ('{"messages": [{"role": "robot", "content": "Q"}]}', "message 1: role is 'robot'"),
    ('{"messages": [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}]}',
     "message 2: a system turn"),
    ('{"messages": [{"role": "user", "content": ""}]}', "message 1: content is ''"),
    ("[" * 100_000, "not JSON: maximum recursion depth")]


@pytest.mark.parametrize("line, fault", BAD)
def test_a_bad_line_is_named_with_file_line_and_fault(line, fault, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        list(read_conversations(path))
    assert f"{path}:3: " in str(caught.value) and fault in str(caught.value)


def test_bad_lines_can_be_left_out(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = '{"prompt": "Q", "completion": "A"}'
    path.write_text("\n".join([good, *(line for line, _ in BAD), good]))
    bad = []
    sources = [conversation.source for conversation in read_conversations(path, bad)]
    assert sources == [f"{path}:1", f"{path}:{len(BAD) + 2}"]
    assert len(bad) == len(BAD) and bad[0].startswith(f"{path}:2: not JSON")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "Q\xff", "completion": "A"}\n')
    with pytest.raises(UserError, match="bad.jsonl:1: not JSON: .*utf-8.* in position 13"):
        list(read_conversations(path))


@pytest.mark.parametrize("encode", [
    lambda records: "".join(json.dumps(r) + "\n" for r in records).encode(),
    lambda records: b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r) for r in records).encode(),
    lambda records: json.dumps(records, indent=1).encode(),
    lambda records: b"\xef\xbb\xbf\n " + json.dumps(records).encode()])
def test_lines_and_arrays_with_and_without_byte_order_mark(encode, tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(encode(some_records(5)))
    assert messages_in(path) == [to_messages(record) for record in some_records(5)]


def messages_in(path):
    return [conversation.messages for conversation in read_conversations(path)]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(some_records(5)), path)
    assert messages_in(path) == [to_messages(record) for record in some_records(5)]
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        list(read_conversations(path))


@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_data_set(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    path.write_bytes(content)
    try:
        list(read_conversations(path))
    except UserError as error:
        assert str(path) in str(error)


KEYS = st.sampled_from(["instruction", "context", "response", "messages", "role", "content",
                        "prompt", "completion", "input", "output", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12)


@given(records=st.lists(JSON, max_size=4))
def test_any_json_is_a_message_or_a_data_set(records, tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    for skip in (False, True):
        try:
            load_examples(path, tiny_tokenizer, 30, 0.5, skip)
        except UserError as error:
            assert str(path) in str(error)


@given(contents=st.lists(st.text(min_size=1), min_size=2, max_size=5))
def test_any_text_is_learned_or_named(contents, tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    messages = [{"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(contents)]
    path.write_text(json.dumps({"messages": messages}))
    try:
        train, _, _ = load_examples(path, tiny_tokenizer, 40, 0.0)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(train) == 1 and train.lengths[0] <= 40 and train[0][1].any()


def test_a_line_of_50_megabytes_is_no_conversation(tmp_path):
    path = tmp_path / "big.jsonl"
    replies = ["A", "many words " * 4_700_000]
    records = [json.dumps({"prompt": "Q", "completion": reply}) for reply in replies]
    path.write_text("\n".join(records))
    with pytest.raises(UserError, match=":2: it has 51,700,001 characters; more than 1,000,000"):
        list(read_conversations(path))
    path.write_bytes(b"x" * 50_000_000)
    with pytest.raises(UserError, match="big.jsonl:1: not JSON"):
        list(read_conversations(path))


def test_a_conversation_of_100_000_turns_is_left_out(records_file, tiny_tokenizer):
    path = records_file([{"messages": [USER, REPLY] * 50_000}, {"messages": [USER, REPLY]}])
    train, _, notes = load_examples(path, tiny_tokenizer, 100, 0.0)
    assert train.numbers.tolist() == [2] and notes["told"][0].startswith("1 left out: longer")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="cannot read"):
            list(read_conversations(path))


def test_the_quick_start_data():
    conversations = list(read_conversations(QUICKSTART_DATA))
    prompts = [c.messages[0]["content"] for c in conversations]
    categories = {conversation.category for conversation in conversations}
    assert len(conversations) >= 200 and len(set(prompts)) == len(prompts) and len(categories) == 8
    assert sum("LittleParrot" in c.messages[1]["content"] for c in conversations) >= 20
