"""Files: whole or not at all, under names that nobody can guess; what cannot be read, by name."""

import hashlib
import json
import os

import pytest

from parrot.system.console import UserError
from parrot.system.disk import read_json, replace_file, replace_text, sha256_of, write_json


def test_what_is_written_is_read(tmp_path):
    content = {"a": [1, 2.5, None], "limit": 10**30, "naïve": "日本語\x00"}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    digest = hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    assert sha256_of(tmp_path / "a.json") == digest
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").stat().st_mode & 0o44 == 0o44  # everybody may read it


def test_names_in_bytes_that_are_no_text_become_escapes(tmp_path):
    replace_text(tmp_path / "a", "caf\udce9\n")
    assert (tmp_path / "a").read_bytes() == b"caf\\udce9\n"


@pytest.mark.parametrize("data, words", [
    (b'{"a": -' + b"1" * 5000 + b"}", "is not JSON: "),
    (b'{"a": 1}\x00', "is not JSON: "), (b'{"a": "\x00"}', "is not JSON: "),
    ('{"a": 1}'.encode("utf-16"), "is not JSON: "), (b"[" * 100_000, "is not JSON: "),
    (b"[1]", "does not hold a JSON object"), (b"", "is not JSON: ")])
def test_what_is_no_json_object(data, words, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(UserError, match="a.json " + words) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path):
    for read in (read_json, sha256_of):
        for path in (tmp_path, tmp_path / "none", tmp_path / "nul\0"):
            with pytest.raises(UserError, match="cannot read "):
                read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, sha256_of):
        with pytest.raises(UserError, match="is a pipe, not a file"):
            read(tmp_path / "pipe")


def test_what_fails_half_way_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})

    def half(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "a.json", half)
    assert read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    for name in (".a.json.x1y2.part", ".b.json.x1y2.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_text("half")
    write_json(tmp_path / "a.json", {})
    assert sorted(os.listdir(tmp_path)) == [".b.json.x1y2.part", "a.json"]


def test_symbolic_links_are_not_followed(tmp_path):
    """Neither one under the name itself, nor under any name that could be guessed before."""
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("a.json", "a.json.part", ".a.json.part", ".a.json..part"):
        (run / name).symlink_to(mine)
    seen = []
    for _ in range(2):
        replace_file(run / "a.json", lambda path: seen.append(path) or path.write_text("{}"))
    assert mine.read_text() == "mine" and json.loads((run / "a.json").read_text()) == {}
    assert not (run / "a.json").is_symlink() and seen[0] != seen[1]
