"""The cache: made once, whole or not at all, and it mends itself."""

import os

import pytest

from parrot.files import cache
from parrot.files.examples import FILES, Examples

EXAMPLES = [([5, 6, 7], [False, True, True]), ([8, 9], [False, True])]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "littleparrot"


def make_examples(folder):
    Examples.of(EXAMPLES, [1, 2]).save(folder)


def test_a_folder_is_made_once(place):
    folder = cache.kept("a", lambda folder: (folder / "x").write_text("X"))
    assert folder == place / "a" and cache.kept("a", None) == folder
    assert (folder / "x").read_text() == "X"


def test_what_was_not_finished_leaves_nothing(place):
    with pytest.raises(ZeroDivisionError):
        cache.kept("a", lambda folder: 1 / 0)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", [*FILES, cache.SIZES])
@pytest.mark.parametrize("spoil", [lambda path: os.truncate(path, 1), os.remove])
def test_a_truncated_file_is_made_anew(name, spoil):
    folder = cache.kept("data/a", make_examples)
    spoil(folder / name)
    assert cache.kept("data/a", make_examples) == folder
    both = Examples().with_part(folder, "x:")
    assert [both[i][0].tolist() for i in range(2)] == [[5, 6, 7], [8, 9]] and both.source(1) == "x:2"
    assert [both[i][1].tolist() for i in range(2)] == [[False, True, True], [False, True]]


def test_the_hash_of_sources_changes_with_them(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = cache.source_hash(cache, tmp_path / "a.py")
    assert before == cache.source_hash(cache, tmp_path / "a.py") and len(before) == 16
    (tmp_path / "a.py").write_text("x = 2")
    assert before != cache.source_hash(cache, tmp_path / "a.py")
