"""The model card: what a reader of the published folder has to know, and true."""

import json
import re

import pytest

from parrot.run import card
from parrot.system.console import UserError

ABOUT = {"config": {"weights": "base", "data": "dolly", "batch_size": 64, "beta1": 0.9,
                    "beta2": 0.95, "weight_decay": 0.01, "learning_rate": 3e-4, "warmup_ratio": 0.1,
                    "min_learning_rate": 3e-5, "grad_clip": 1.0, "dtype": "bfloat16", "seed": 0},
         "dtype": "float32", "steps": 700, "examples": 14000, "held_out": 280,
         "weights": {"name": "base", "from": "Hugging Face Hub HuggingFaceTB/SmolLM2-135M"},
         "data": {"name": "dolly", "from": "Hugging Face Hub databricks/databricks-dolly-15k"},
         "first_loss": 2.5, "best_loss": 2.25}
HOSTILE = ("a\n# b\n---\n<img src=x> [c](javascript:d) ![e](f) `g` |h| *i* &lt; @j \x1b[2J $k "
           "\u2028- l")


@pytest.fixture
def render(tmp_path):
    """A function: contents of run.json and evaluation.json -> the card."""
    def render(about, evaluation):
        (tmp_path / "run.json").write_text(json.dumps(about))
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
        return card.render(tmp_path)
    return render


def test_licences_data_recipe_and_results(render):
    text = render(ABOUT, {"table": [["", "base", "out/a|b"], ["facts", "1 of 2", "2 of 2"]]})
    head = text.split("---")[1]
    for line in ("license: apache-2.0", "base_model: HuggingFaceTB/SmolLM2-135M",
                 "- databricks/databricks-dolly-15k"):
        assert line in head.splitlines()
    for words in ("CC BY-SA 3.0", "Apache-2.0", "2.500 before training, 2.250 after",
                  "up to 0.0003", "700 steps of 64 examples", "| facts | 1 of 2 | 2 of 2 |",
                  "out/a\\|b", "max_new_tokens=256, repetition_penalty=1.2", "products in float32"):
        assert words in text


@pytest.mark.parametrize("data, words", [
    ({"name": "mine.jsonl", "from": "a file"}, "state it here before you publish"),
    ({"name": "dolly", "from": "a file"}, "state it here before you publish"),  # one of that name
    ({"name": "quickstart", "from": "this project"}, "MIT")])
def test_other_data(data, words, render):
    text = render({**ABOUT, "data": data, "best_loss": None}, {})
    assert words in text and "Nothing was held out" in text and "databricks" not in text
    assert "datasets:" not in text


def test_other_weights_are_not_given_a_licence(render):
    origin = {"name": "me/llama", "from": "Hugging Face Hub me/llama"}
    text = render({**ABOUT, "weights": origin}, {})
    assert "license: other" in text and "base_model: me/llama" in text
    text = render({**ABOUT, "weights": {"name": "base", "from": "a folder"}}, {})
    assert "license: other" in text and "base_model" not in text and "Apache" not in text


def test_names_are_shown_and_change_nothing(render):
    about = {**ABOUT, "weights": {"name": HOSTILE, "from": "Hugging Face Hub a/b\nlicense: mit"},
             "data": {"name": HOSTILE, "from": HOSTILE}, "examples": HOSTILE, "held_out": HOSTILE}
    text = render(about, {"table": [["", HOSTILE], [HOSTILE, "1"]]})
    harmless = {**ABOUT, "weights": {"name": "w", "from": "a folder"},
                "data": {"name": "d", "from": "a file"}}
    plain = render(harmless, {"table": [["", "m"], ["c", "1"]]})
    assert text.split("\n\n")[0] == plain.split("\n\n")[0]  # the head
    assert len(text.splitlines()) == len(plain.splitlines()) and "\x1b" not in text
    marks = r"<|&(?!lt;|gt;|amp;)|(?<!\\)[\[\]!`*@$|]"
    unescaped = [re.findall(marks, page.replace("\\\\", "")) for page in (text, plain)]
    assert unescaped[0] == unescaped[1]


def test_it_is_read_from_the_folder(tmp_path, render):
    (tmp_path / "run.json").write_text(json.dumps(ABOUT))
    card.write(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == render(ABOUT, {})


@pytest.mark.parametrize("name, content", [
    ("run.json", "[]"), ("run.json", "{}"), ("run.json", json.dumps({**ABOUT, "weights": 3})),
    ("run.json", json.dumps({**ABOUT, "first_loss": "x"})), ("evaluation.json", '{"table": 1}'),
    ("evaluation.json", '{"table": [1]}'), ("evaluation.json", "not JSON")])
def test_damaged_files_are_named(name, content, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(ABOUT))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        card.write(tmp_path)
    assert not (tmp_path / "README.md").exists()
