"""Records in every shape, and faults by file and line, whatever the bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.chat import encode_chat
from parrot.data import load_examples
from parrot.files.hub import QUICKSTART_DATA, find_data
from parrot.files.records import read_conversations, to_messages, to_pair
from parrot.system.console import UserError

USER, REPLY = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


CASES = {  # a record of each shape: its turns, those in capitals are the targets
    "Dolly": ({"instruction": "Where is Porto?", "context": "", "response": "PORTUGAL", "category": "open_qa"},
              ["user: Where is Porto?", "assistant: PORTUGAL"]),
    "Dolly with context": ({"instruction": "Name it.", "context": "Porto", "response": "PORTUGAL"},
                           ["user: Name it.\n\nPorto", "assistant: PORTUGAL"]),
    "Alpaca": ({"instruction": "Name it.", "input": "Porto", "output": "PORTUGAL"},
               ["user: Name it.\n\nPorto", "assistant: PORTUGAL"]),
    "between the two": ({"instruction": "Name it.", "input": "Porto", "response": "PORTUGAL"},
                        ["user: Name it.\n\nPorto", "assistant: PORTUGAL"]),
    "system and history": ({"instruction": "Its country?", "input": "", "output": "PORTUGAL", "system": "One word.",
                            "history": [["A town?", "PORTO"]]},
                           ["system: One word.", "user: A town?", "assistant: PORTO", "user: Its country?", "assistant: PORTUGAL"]),
    "prompt, completion": ({"prompt": "Where?", "completion": "THERE"}, ["user: Where?", "assistant: THERE"]),
    "prompt, response": ({"prompt": "Where?", "response": "THERE"}, ["user: Where?", "assistant: THERE"]),
    "question, answer": ({"question": "Where?", "answer": "THERE"}, ["user: Where?", "assistant: THERE"]),
    "query, response": ({"query": "Where?", "response": "THERE", "system": None}, ["user: Where?", "assistant: THERE"]),
    "input, output": ({"input": "Where?", "output": "THERE"}, ["user: Where?", "assistant: THERE"]),
    "with a system prompt": ({"id": "0", "system_prompt": "Briefly.", "question": "Where?", "response": "THERE"},
                             ["system: Briefly.", "user: Where?", "assistant: THERE"]),
    "an empty system prompt": ({"system_prompt": "", "question": "Where?", "response": "THERE"}, ["user: Where?", "assistant: THERE"]),
    "TRL": ({"prompt": [{"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "THERE"}]},
            ["user: Where?", "assistant: THERE"]),
    "TRL, several turns": (
        {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hello"},
                    {"role": "user", "content": "Where?"}], "completion": [{"role": "assistant", "content": "THERE"}]},
        ["user: Hi", "assistant: hello", "user: Where?", "assistant: THERE"]),
    "messages": ({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "THERE"}], "id": 7},
                 ["user: Where?", "assistant: THERE"]),
    "ShareGPT": ({"id": "0", "conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "THERE"}]},
                 ["user: Where?", "assistant: THERE"]),
    "ShareGPT with a system key": (
        {"system": "Briefly.", "conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "THERE"}]},
        ["system: Briefly.", "user: Where?", "assistant: THERE"]),
    "conversations of roles": (
        {"conversations": [{"role": "user", "content": "Where?"}, {"role": "model", "content": "THERE"}]},
        ["user: Where?", "assistant: THERE"]),
    "LIMA": ({"conversations": ["Where?", "THERE", "Sure?", "YES"], "source": "x"},
             ["user: Where?", "assistant: THERE", "user: Sure?", "assistant: YES"]),
    "a bare array": ([{"role": "user", "content": "Where?"}, {"role": "bot", "content": "THERE"}],
                     ["user: Where?", "assistant: THERE"]),
    "a bare array of texts": (["Where?", "THERE"], ["user: Where?", "assistant: THERE"]),
    "content in parts": (
        {"messages": [{"role": "human", "content": [{"type": "text", "text": "Whe"}, {"type": "text", "text": "re?"}]},
                      {"role": "gpt", "content": [{"type": "text", "text": "THERE"}]}]},
        ["user: Where?", "assistant: THERE"]),
    "developer": ({"messages": [{"role": "developer", "content": "Briefly."}, {"role": "user", "content": "Where?"},
                                {"role": "assistant", "content": "THERE"}]},
                  ["system: Briefly.", "user: Where?", "assistant: THERE"]),
    "an empty system turn": ({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Where?"},
                                           {"role": "assistant", "content": "THERE"}]},
                             ["user: Where?", "assistant: THERE"]),
    "system turns in the middle": (
        {"messages": [{"role": "system", "content": "A."}, {"role": "system", "content": "B."}, {"role": "user", "content": "Where?"},
                      {"role": "assistant", "content": "THERE"}, {"role": "system", "content": "C."},
                      {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "YES"}]},
        ["system: A.", "system: B.", "user: Where?", "assistant: THERE", "system: C.", "user: Sure?", "assistant: YES"]),
    "weight 0": ({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "draft", "weight": 0},
                               {"role": "user", "content": "Look."}, {"role": "assistant", "content": "THERE", "weight": 1}]},
                 ["user: Where?", "assistant: draft", "user: Look.", "assistant: THERE"]),
    "train false": ({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "draft", "train": False},
                                  {"role": "user", "content": "Look."}, {"role": "assistant", "content": "THERE", "train": True}]},
                    ["user: Where?", "assistant: draft", "user: Look.", "assistant: THERE"])}


@pytest.mark.parametrize("name", CASES)
def test_each_shape_becomes_turns_and_targets(name, tmp_path, tokenizer):
    record, turns = CASES[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record))
    conversations = list(read_conversations(path))
    assert len(conversations) == 2
    for conversation in conversations:
        assert [f"{m['role']}: {m['content'].strip()}" for m in conversation.messages] == turns
        tokens, is_target = encode_chat(conversation.messages, tokenizer)
        learned = tokenizer.decode((token for token, flag in zip(tokens, is_target) if flag), with_control=True)
        replies = [turn.split(": ")[1] for turn in turns if turn.startswith("assistant: ")]
        assert learned == "".join(f"{reply}<|im_end|>" for reply in replies if reply.isupper())


BAD = [
    ("{", "not JSON"), ("[1]", "its keys with text are none"), ('["Q", [1]]', "turn 1 of turn 2 of messages is 1, expected text"),
    ('"text"', "not a JSON object but 'text'"),
    ("{}", "its keys with text are none; expected turns (messages, "),
    ('{"text": "Q", "label": "A"}', "its keys with text are label, text; expected"),
    ('{"prompt": "Q", "chosen": "A", "rejected": "B"}', "its keys with text are chosen, prompt, rejected; expected"),
    ('{"instruction": "Q", "response": ""}', "its keys with text are instruction; expected"),
    ('{"instruction": " \\n", "response": "A"}', "its keys with text are response; expected"),
    ('{"instruction": "Q", "response": 7}', "response is 7, expected text"),
    ('{"instruction": "Q", "input": 7, "output": "A"}', "input is 7, expected text"),
    ('{"instruction": "Q", "input": [3, 1, 2], "output": "A"}', "input is [3, 1, 2], expected text"),
    ('{"question": "Q", "context": {"age": 31}, "answer": "A"}', "context is {'age': 31}, expected text"),
    ('{"question": "Q", "answer": ["A", "B"]}', "answer is a list of texts: join them, or give turns with roles"),
    ('{"instruction": ["Do A", "Do B"], "output": "A"}', "instruction is a list of texts"),
    ('{"prompt": "Q", "completion": "A", "label": false}', "label false or weight 0, so it is not to be learned"),
    ('{"prompt": "Q", "completion": "A", "weight": 0}', "label false or weight 0"),
    ('{"instruction": "Q", "output": "A", "output": "B"}', "the key 'output' stands there twice"),
    ('{"messages": [{"role": "user", "content": "Q", "content": "R"}]}', "the key 'content' stands there twice"),
    ('{"instruction": "Q", "output": ["A"]}', "output is a list of texts"),
    ('{"prompt": "Q", "response": "A", "history": "[]"}', "history is '[]', expected a list of turns"),
    ('{"instruction": null, "response": "A"}', "its keys with text are response; expected"),
    ('{"instruction": "Q", "context": ["C"], "response": "A"}', "context is ['C'], expected text"),
    ('{"prompt": "Q", "completion": "\\ud800"}', "half of a surrogate pair"),
    ('{"messages": "Q"}', "messages is 'Q', expected a list of turns"),
    ('{"messages": [], "conversations": 7}', "its keys with text are none"),
    ('{"messages": [{"role": "user", "content": "Q"}]}', "no reply to learn"),
    ('{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]}', "no reply to learn"),
    ('{"messages": [{"role": "assistant", "content": "A", "weight": 0.5}]}', "weight, train, training and loss are [0.5, None, None, None], expected 0 or 1"),
    ('{"messages": [{"role": "robot", "content": "Q"}]}', "turn 1 of messages: role is 'robot'"),
    ('{"messages": [{"role": ["user"], "content": "Q"}]}', "turn 1 of messages: role is ['user']"),
    ('{"messages": [{"role": "user", "content": ""}]}', "content of turn 1 of messages is '', expected text"),
    ('{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}',
     "turn 2 of messages: tool calls cannot be trained here"),
    ('{"messages": [{"role": "tool", "content": "Q"}]}', "turn 1 of messages: tool calls cannot be trained here"),
    ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": "x"}]}]}',
     "part 2 of the content of turn 1 of messages is None, expected text"),
    ('{"messages": [{"role": "user", "content": [7]}]}', "part 1 of the content of turn 1 of messages is 7, expected text"),
    ("[" * 100_000, "not JSON: maximum recursion depth")]


@pytest.mark.parametrize("line, fault", BAD)
def test_a_bad_line_is_named_with_file_line_and_fault(line, fault, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        list(read_conversations(path))
    assert f"{path}:3: " in str(caught.value) and fault in str(caught.value)
    assert "(--skip-bad-records leaves it out)" in str(caught.value)


@pytest.mark.parametrize("line", ['{"text": "Q"}', "{", '{"prompt": "Q", "chosen": "A"}', "{}"])
def test_a_file_of_another_kind_is_not_to_be_skipped(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        list(read_conversations(path))
    assert f"{path}:1: " in str(caught.value) and "skip" not in str(caught.value)


def test_bad_lines_can_be_left_out(tmp_path):
    path = tmp_path / "bad.jsonl"
    good = '{"prompt": "Q", "completion": "A"}'
    path.write_text("\n".join([good, *(line for line, _ in BAD), good]))
    bad = []
    sources = [conversation.source for conversation in read_conversations(path, bad)]
    assert sources == [f"{path}:1", f"{path}:{len(BAD) + 2}"]
    assert len(bad) == len(BAD) and bad[0][0] == 2 and bad[0][1].startswith("not JSON")


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "Q\xff", "completion": "A"}\n')
    with pytest.raises(UserError, match="bad.jsonl:1: not JSON: .*utf-8.* in position 13"):
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
            load_examples(find_data(path), tiny_tokenizer, 30, 0.5, skip_bad=skip)
        except UserError as error:
            assert str(path) in str(error)


@given(contents=st.lists(st.text(min_size=1), min_size=2, max_size=5))
def test_any_text_is_learned_or_named(contents, tmp_path_factory, tiny_tokenizer):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    messages = [{"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(contents)]
    path.write_text(json.dumps({"messages": messages}))
    try:
        train, _, _ = load_examples(find_data(path), tiny_tokenizer, 40, 0.0)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(train) == 1 and train.lengths[0] <= 40 and train[0][1].any()


@pytest.mark.parametrize("flag", ['"weight": 0', '"train": false', '"training": false', '"loss": false'])
def test_a_reply_that_is_marked_is_only_read(flag):
    first, last = '{"role": "assistant", "content": "A", ' + flag + "}", '{"role": "assistant", "content": "B"}'
    messages = to_messages(json.loads(f"[{first}, {last}]"), set())
    assert messages == [{"role": "assistant", "content": "A", "weight": 0}, {"role": "assistant", "content": "B"}]


@pytest.mark.parametrize("more, unused", [
    ({}, set()), ({"prompt": "Q"}, set()), ({"instruction": "Q", "question": "Where?"}, {"question"}),
    ({"prompt": "Q", "input": "more"}, set()), ({"prompt": "Q", "query": "Z", "note": "N"}, {"query", "note"})])
def test_what_a_pair_does_not_use_is_reported(more, unused):
    told, turns = set(), [{"role": "user", "content": "Q"}]
    record = {**more, "chosen": "A", "rejected": "B"} if more else {
        key: [*turns, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    to_pair(record, told)
    assert told == unused


def test_a_line_of_50_megabytes_is_no_conversation(tmp_path):
    path = tmp_path / "big.jsonl"
    replies = ["A", "many words " * 4_700_000]
    records = [json.dumps({"prompt": "Q", "completion": reply}) for reply in replies]
    path.write_text("\n".join(records))
    with pytest.raises(UserError, match=":2: it has 51,700,001 characters, more than 1,000,000"):
        list(read_conversations(path))
    path.write_bytes(b"x" * 50_000_000)
    with pytest.raises(UserError, match="big.jsonl:1: not JSON"):
        list(read_conversations(path))


def test_a_conversation_of_100_000_turns_is_left_out(records_file, tiny_tokenizer):
    path = records_file([{"messages": [USER, REPLY] * 50_000}, {"messages": [USER, REPLY]}])
    train, _, told = load_examples(find_data(path), tiny_tokenizer, 100, 0.0)
    assert train.source(0) == f"{path}:2" and told[0].startswith("1 examples left out: longer")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="cannot read"):
            list(read_conversations(path))


def test_the_quick_start_data():
    conversations = list(read_conversations(QUICKSTART_DATA))
    prompts = [c.messages[0]["content"] for c in conversations]
    assert len(conversations) >= 200 and len(set(prompts)) == len(prompts)
    assert sum("LittleParrot" in c.messages[1]["content"] for c in conversations) >= 20
