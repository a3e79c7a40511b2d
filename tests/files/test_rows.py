"""Data files of every format, and the shards of a data set."""

import csv
import gzip
import io
import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow
import pytest
from conftest import some_records
from pyarrow import parquet

from parrot.files import hub
from parrot.files.records import read_conversations, to_messages
from parrot.files.rows import count_rows, read_rows
from parrot.system.console import UserError

RECORDS = some_records(5)
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def table(records):
    file = io.StringIO()
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


FILES = {
    "data.jsonl": LINES.encode(), "no_suffix": LINES.encode(), "data.JSONL": LINES.encode(),
    "windows.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    "utf16.jsonl": LINES.encode("utf-16"), "utf16_be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "data.jsonl.gz": gzip.compress(LINES.encode()), "really_gzip.jsonl": gzip.compress(LINES.encode()),
    "array.json": json.dumps(RECORDS).encode(), "pretty.json": json.dumps(RECORDS, indent=1).encode(),
    "marked.json": b"\xef\xbb\xbf\n " + json.dumps(RECORDS).encode(),
    "data.csv": table(RECORDS).encode(), "excel.CSV": b"\xef\xbb\xbf" + table(RECORDS).encode(),
    "utf16.csv": table(RECORDS).encode("utf-16"), "data.csv.gz": gzip.compress(table(RECORDS).encode())}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_format(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert messages_in(path) == [to_messages(record, set()) for record in RECORDS]
    assert count_rows(path) == 5
    assert [number for number, _ in read_rows(path, 3)] == [4, 5]


def messages_in(path):
    return [conversation.messages for conversation in read_conversations(path)]


def write_parquet(path, records, **settings):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **settings)
    return path


def test_parquet_of_several_row_groups(tmp_path):
    path = write_parquet(tmp_path / "data.PARQUET", some_records(50), row_group_size=7)
    for start in (0, 6, 7, 30, 50):
        assert [number for number, _ in read_rows(path, start)] == list(range(start + 1, 51))
        assert [row["instruction"] for _, row in read_rows(path, start)] == [
            record["instruction"] for record in some_records(50)[start:]]
    assert count_rows(path) == 50 and len(messages_in(path)) == 50


@pytest.mark.parametrize("column", [
    pyarrow.array([datetime(2020, 1, 1)] * 5, pyarrow.timestamp("ns")), pyarrow.array([10**18 + 1] * 5, pyarrow.timestamp("ns")),
    pyarrow.array([10**15] * 5, pyarrow.duration("ns")), pyarrow.array([[["x"]], [], None, [[]], [["y"]]]),
    pyarrow.array([b"\xff"] * 5), pyarrow.array(["a", "b", "a", "b", "a"]).dictionary_encode()])
def test_parquet_with_columns_that_are_not_needed(column, tmp_path):
    plain = pyarrow.Table.from_pylist(RECORDS)
    parquet.write_table(plain.append_column("extra", column), tmp_path / "data.parquet")
    assert messages_in(tmp_path / "data.parquet") == [to_messages(record, set()) for record in RECORDS]


def test_parquet_turns_that_hold_a_time(tmp_path):
    turns = [{"role": role, "content": text, "timestamp": datetime(2020, 1, 1)} for role, text in (("user", "Q"), ("assistant", "A"))]
    written = messages_in(write_parquet(tmp_path / "turns.parquet", [{"conversation": turns}]))
    assert [[message["content"] for message in messages] for messages in written] == [["Q", "A"]]


@pytest.mark.parametrize("text, fault", [("instruction,response,response\nQ,A,B\n", "'response' stands there twice"),
                                         ("instruction,response,,\nQ,A,,\n", None)])
def test_csv_columns_of_one_name(text, fault, tmp_path):
    (tmp_path / "data.csv").write_text(text)
    if fault:
        with pytest.raises(UserError, match=fault):
            messages_in(tmp_path / "data.csv")
    else:
        assert len(messages_in(tmp_path / "data.csv")) == 1


def test_parquet_of_turns_and_of_dictionaries(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert messages_in(write_parquet(tmp_path / "turns.parquet", [{"messages": turns}] * 3)) == [turns] * 3
    words = pyarrow.array(["Q", "Q"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"prompt": words, "completion": pyarrow.array(["A", "A"], pyarrow.large_string())}),
                        tmp_path / "words.parquet")
    assert messages_in(tmp_path / "words.parquet") == [turns] * 2


BROKEN = {
    "pretty.jsonl": (json.dumps(RECORDS[0], indent=1) + "\n" + json.dumps(RECORDS[1], indent=1), "one record per line"),
    "torn.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "ended before"), "liar.jsonl.gz": (b"\x1f\x8b no gzip", "compress|method"),
    "half.jsonl": (LINES.encode("utf-16")[:-3], "codec|utf-16"), "torn.json": (json.dumps(RECORDS)[:-9], "cannot read|delimiter"),
    "deep.json": ("[" * 100_000, "recursion"), "quote.csv": ('prompt,completion\n"Q,A\n', "unexpected end"),
    "cells.csv": ("prompt,completion\nQ,A,C\n", "record 1: not a JSON object"), "latin.csv": (b"prompt,completion\nQ,\xe9\n", "utf-8"),
    "fake.parquet": (b"PAR1 not really", "cannot read"), "empty.parquet": (b"", "cannot read"),
    "table.xlsx": (b"PK\x03\x04\x00\xff", "not JSON")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name, tmp_path):
    content, fault = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=fault) as caught:
        list(read_conversations(path))
    assert str(path) in str(caught.value) and "skip-bad" not in str(caught.value)


@pytest.mark.parametrize("value", [["red", "blue"], {"a": "red"}, [{"a": ["red"]}]])
def test_text_in_any_column_of_parquet_is_reported(value, tmp_path):
    path = write_parquet(tmp_path / "data.parquet", [{"question": "Q", "answer": "A", "choices": value}])
    [conversation] = read_conversations(path)
    assert conversation.unused == {"choices"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe in a folder")
@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet"])
def test_a_pipe_is_no_file(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        count_rows(tmp_path / name)


@pytest.mark.parametrize("split", ["test", "validation", "fr"])
def test_a_file_has_no_parts(split, tmp_path):
    (tmp_path / "data.jsonl").write_text(LINES)
    with pytest.raises(UserError, match=f"is a file, so it has no part '{split}'"):
        hub.find_data(f"{tmp_path / 'data.jsonl'}:{split}")


def test_parquet_that_breaks_in_the_middle(tmp_path):
    path = write_parquet(tmp_path / "data.parquet", some_records(200), compression="none", row_group_size=50)
    content = bytearray(path.read_bytes())
    content[200:1500] = b"\xff" * 1300
    path.write_bytes(content)
    with pytest.raises(UserError, match="data.parquet"):
        list(read_conversations(path))


# ---- the files of a data set

SETS = [  # files, split, the chosen ones, or the fault
    (["a.jsonl"], "train", ["a.jsonl"]),
    (["b.jsonl", "a.jsonl", "README.md", "dataset_infos.json"], "train", ["a.jsonl", "b.jsonl"]),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"], "train",
     ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
    (["data/train-00000-of-00002.parquet", "data/test-00000-of-00001.parquet"], "test", ["data/test-00000-of-00001.parquet"]),
    (["data/train-00000-of-00002.parquet"], "train", "has 1 of the 2 shards of data/train"),
    (["train.jsonl", "validation.jsonl"], "validation", ["validation.jsonl"]),
    (["part1.jsonl.gz", "part2.jsonl.gz", "test.jsonl.gz"], "train", ["part1.jsonl.gz", "part2.jsonl.gz"]),
    (["train.CSV", "eval.CSV"], "train", ["train.CSV"]), (["training.jsonl", "testing.jsonl"], "train", ["training.jsonl"]),
    (["data.jsonl", "evaluation.jsonl", "holdout.jsonl"], "train", ["data.jsonl"]),
    (["train.jsonl", "train.csv"], "train", "one part in several formats: name a file .train.csv, train.jsonl."),
    (["train.jsonl", "train.jsonl.gz"], "train", "one part in several formats"),
    (["train-1.parquet", "train-2.parquet", "train-2.JSONL"], "train", "one part in several formats"),
    (["constraints.jsonl"], "train", ["constraints.jsonl"]),
    (["en/train.jsonl", "fr/train.jsonl"], "train", "several parts: choose one, as --data a set:en/train or fr/train"),
    (["en/train.jsonl", "fr/train.jsonl"], "fr/train", ["fr/train.jsonl"]),
    (["train_sft-00000-of-00001.parquet", "train_prefs-00000-of-00001.parquet"], "train", "several parts"),
    (["train_sft-00000-of-00001.parquet", "train_prefs-00000-of-00001.parquet"], "train_sft", ["train_sft-00000-of-00001.parquet"]),
    (["train.jsonl"], "test", "no data file for 'test' .it has .'train'.;"), (["README.md"], "train", "no data file for 'train'"),
    (["test.jsonl"], "train", "no data file for 'train'")]


@pytest.mark.parametrize("names, split, chosen", SETS)
def test_the_files_of_a_split(names, split, chosen):
    if isinstance(chosen, list):
        assert hub.shards("a set", names, split) == chosen
    else:
        with pytest.raises(UserError, match=chosen):
            hub.shards("a set", names, split)


def test_a_folder_and_several_files(tmp_path):
    for split, shard in (("train", 0), ("train", 1), ("test", 0)):
        name = f"{split}-{shard:05d}-of-{'00002' if split == 'train' else '00001'}.parquet"
        write_parquet(tmp_path / name, some_records(3))
    train = [tmp_path / f"train-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    test = [tmp_path / "test-00000-of-00001.parquet"]
    assert hub.find_data(tmp_path).files == hub.find_data(train).files == train
    assert hub.find_data("test", of=str(tmp_path)).files == hub.find_data(f"{tmp_path}:test").files == test
    assert hub.find_data([*train, *test]).origin["name"] == " ".join(path.name for path in [*train, *test])
    assert isinstance(hub.find_data(Path(train[0])).hashes[train[0]], str)
