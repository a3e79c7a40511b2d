"""The experiments of parrot/README.md, run: -m long. tests/test_walk.py holds their text to them."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "lesson"))
import experiments  # noqa: E402


def test_an_edit_that_no_longer_applies_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="train.py has 0 lines 'no such line', not one"):
        experiments.edited(("train.py", "no such line", ""), tmp_path)


def test_an_edit_changes_one_line_of_a_copy(tmp_path):
    name, old, new = experiments.EXPERIMENTS["zero_grad"][1]
    copy = experiments.edited((name, old, new), tmp_path)
    before, after = ((folder / name).read_text(encoding="utf-8") for folder in (ROOT, copy))
    assert after == before.replace(old, new) != before


@pytest.mark.long
@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_what_the_walk_promises_is_seen(name):
    assert experiments.as_promised(name), experiments.run(name)
