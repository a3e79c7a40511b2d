"""Every gap of tests/exercises fails, every solution passes, and usual mistakes are found."""

import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "tests" / "exercises"
sys.path.insert(0, str(FOLDER))
import check  # noqa: E402

MARK = "  # your line here"
MISTAKES = {  # what the solution has: what people write
    "mask": ("(IM_END, True)", "(IM_END, False)"),
    "shift": ("tokens[rows + 1]", "tokens[rows]"),
    "sum": ("losses.sum()", "losses.mean()"),
    "rotation": ("second * cos + first * sin", "second * cos - first * sin"),
    "nucleus": (".cumsum(-1) - probabilities", ".cumsum(-1)"),
    "cache": ("self.visible)", "self.visible | True)"),  # sees what is not written yet
}


@pytest.mark.parametrize("name", check.PLACES)
def test_a_gap_fails_and_its_solution_passes(name):
    assert check.fault_of(name, FOLDER / f"{name}.py")
    assert check.fault_of(name, FOLDER / "solutions" / f"{name}.py") is None


@pytest.mark.parametrize("name", check.PLACES)
def test_a_solution_differs_from_its_exercise_in_the_gap_alone(name):
    exercise, solution = ((folder / f"{name}.py").read_text(encoding="utf-8").splitlines()
                          for folder in (FOLDER, FOLDER / "solutions"))
    gaps = [line for line in exercise if line.endswith(MARK)]
    assert gaps
    for ours, theirs in zip(exercise, solution, strict=True):
        assert (ours != theirs) == (ours in gaps)


@pytest.mark.parametrize("name", check.PLACES)
def test_the_usual_mistake_is_found(name, tmp_path):
    right, wrong = MISTAKES[name]
    text = (FOLDER / "solutions" / f"{name}.py").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "wrong.py").write_text(text.replace(right, wrong), encoding="utf-8")
    assert "should be" in check.fault_of(name, tmp_path / "wrong.py")


def test_the_lesson_itself_is_left_as_it_was():
    before = {name: owner.__dict__[attribute] for name, (owner, attribute) in check.PLACES.items()}
    for name in check.PLACES:
        check.fault_of(name, FOLDER / f"{name}.py")
    assert before == {name: owner.__dict__[attribute]
                      for name, (owner, attribute) in check.PLACES.items()}
