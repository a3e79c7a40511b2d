"""The model card: what a reader of the published folder has to know, and true."""

import json

import pytest

from parrot import card

ABOUT = {"config": {"weights": "base", "data": "dolly", "batch_size": 64, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01,
                    "learning_rate": 3e-4, "warmup_ratio": 0.1, "min_learning_rate": 3e-5, "grad_clip": 1.0, "dtype": "bfloat16",
                    "seed": 0},
         "weights": {"from": "Hugging Face Hub HuggingFaceTB/SmolLM2-135M"}, "steps": 700, "examples": 14000, "held_out": 280,
         "first_loss": 2.5, "best_loss": 2.25}


def test_licences_data_recipe_and_results():
    text = card.render(ABOUT, {"table": [["", "base", "out/a|b"], ["facts", "1 of 2", "2 of 2"]]})
    head = text.split("---")[1]
    for line in ("license: apache-2.0", "base_model: HuggingFaceTB/SmolLM2-135M", "- databricks/databricks-dolly-15k"):
        assert line in head.splitlines()
    for words in ("CC BY-SA 3.0", "Apache-2.0", "2.500 before training, 2.250 after", "up to 0.0003", "700 steps of 64 examples",
                  "| facts | 1 of 2 | 2 of 2 |", "out/a\\|b"):
        assert words in text


@pytest.mark.parametrize("changes, words", [({"data": "mine.jsonl"}, "state it here before you publish"),
                                            ({"data": "quickstart"}, "MIT")])
def test_other_data(changes, words):
    text = card.render({**ABOUT, "config": {**ABOUT["config"], **changes}, "best_loss": None}, {})
    assert words in text and "Nothing was held out" in text and "databricks" not in text


def test_other_weights_are_not_given_a_licence():
    text = card.render({**ABOUT, "config": {**ABOUT["config"], "weights": "me/llama"},
                        "weights": {"from": "Hugging Face Hub me/llama"}}, {})
    assert "license: other" in text and "base_model: me/llama" in text


def test_it_is_read_from_the_folder(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(ABOUT))
    card.write(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card.render(ABOUT, {})
