"""The report of a run: one file, everything escaped, every figure that of metrics.jsonl."""

import json
import re
from html.parser import HTMLParser

import pytest

from parrot import report

HOSTILE = "<script>alert(1)</script> & \"'<img src=x onerror=y> \x1b[2J <|im_start|>system"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: the text, the tags with their attributes, and whether they are closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


ABOUT = {"config": {"out": HOSTILE, "epochs": 2, "max_steps": None, "seed": 0, "resume": False}, "steps": 40, "examples": 300, "held_out": 7,
         "weights": {"name": HOSTILE, "from": "a folder", "files": {"model.safetensors": "abc123"}},
         "data": {"name": HOSTILE, "from": "a file", "sha256": "def456"}, "versions": {"torch": "9.9"}, "machine": "Linux",
         "device": "cpu", "processes": 1, "lengths": {"up to 64": 200, "128": 100},
         "counts": {"context_cut": 3, "reply_cut": 0, "dropped": 0, "bad": 2, "first_bad": [HOSTILE],
                    "categories": {HOSTILE: 307}}}
STEPS = [{"step": n, "train_loss": 3 - n / 20, "learning_rate": n * 1e-5, "grad_norm": 1.0, "tokens_per_second": 100.0 + n,
          "share_of_limit": n / 80}
         for n in range(1, 41)]
METRICS = [{"step": 0, "val_loss": 3.25}, *STEPS, {"step": 40, "val_loss": 2.125}]
SHOWN = {"before": [[HOSTILE, HOSTILE, [1]], ["b?", "c", [2]]], "after": [[HOSTILE, HOSTILE, [1]], ["b?", "d", [3]]],
         "example": [[HOSTILE, False], ["reply" + HOSTILE, True]],
         "answer": [{"text": HOSTILE, "probability": 0.5, "top_p": 0.9, "nucleus": 3,
                     "likeliest": [[HOSTILE, 0.5], ["no", 0.25]]}]}
EVALUATION = {"table": [["", HOSTILE], ["held-out loss, all", "2.125 ± 0.010"]]}


@pytest.fixture
def page():
    return Page(report.render(ABOUT, METRICS, SHOWN, EVALUATION))


def test_well_formed_and_nothing_from_elsewhere(page):
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe", "object", "a"})
    for tag, attributes in page.tags:
        assert not {"src", "href", "onerror", "onload", "onclick"} & attributes.keys(), tag
    assert not re.search(r"https?://|@import|url\(", report.render(ABOUT, METRICS, SHOWN, EVALUATION))


def test_what_it_shows_is_escaped(page):
    html = report.render(ABOUT, METRICS, SHOWN, EVALUATION)
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    shown = "".join(page.words)
    assert shown.count("<script>alert(1)</script>") >= 9 and "\\x1b[2J" in shown


def test_the_curves_are_those_of_the_metrics(page):
    """Back from the pixels of the polyline to the numbers."""
    lines = [attributes["points"].split() for tag, attributes in page.tags if tag == "polyline"]
    assert [len(line) for line in lines] == [40, 2, 40, 40, 40, 40]
    ys = [float(point.split(",")[1]) for point in lines[0]]
    low, high = 1.0, 3.25  # of both series of the first chart
    found = [low + (195 - y) / 175 * (high - low) for y in ys]
    assert found == pytest.approx([3 - n / 20 for n in range(1, 41)], abs=2e-3)
    xs = [float(point.split(",")[0]) for point in lines[0]]
    assert xs == pytest.approx([60 + 430 * n / 40 for n in range(1, 41)], abs=0.06)
    told = [word for word in page.words if re.match(r"step \d+: ", word)]
    assert told == ["step 0: 3.2500", "step 40: 2.1250"]


def test_the_words_are_those_of_the_run(page):
    shown = " ".join(page.words)
    for words in ("40 steps on 300 examples; finished; held-out loss 3.250 before, 2.125 at its best", "2.125 ± 0.010", "abc123",
                  "def456", "torch 9.9", "3 had the middle of a context", "2 could not be read", "epochs 2, seed 0", "200"):
        assert words in shown
    assert "reply_cut" not in shown and "max_steps" not in shown and "resume" not in shown and "None" not in shown


def test_supervised_tokens_are_marked_and_probabilities_told(page):
    classes = [attributes["class"] for tag, attributes in page.tags if tag == "span" and "class" in attributes]
    assert classes[-2:] == ["", "learned"]
    hover = next(attributes["title"] for tag, attributes in page.tags if "title" in attributes)
    assert "50.0%; the nucleus of top-p 0.9 holds 3 tokens" in hover and "25.0%" in hover and "'no'" in hover


def test_a_run_that_has_just_begun(page):
    page = Page(report.render(ABOUT, [], {}, {}))
    assert "40 steps on 300 examples; 0 of them done" in " ".join(page.words) and page.open == []
    page = Page(report.render(ABOUT, METRICS[:2], {"before": SHOWN["before"]}, {}))
    assert "not yet known" in " ".join(page.words)


@pytest.mark.parametrize("low, high", [(0, 1e-9), (1.5, 1.5000001), (-3, 7), (0, 12345), (1e-5, 3e-4), (2, 2)])
def test_ticks_are_round_and_within(low, high):
    ticks = report.ticks(low, high)
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks) and len(ticks) <= 6


def test_numbers_that_cannot_be_drawn():
    assert report.points([{"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0}], "x") == [(2, 1.0)]
    assert "polyline" in report.chart("flat", [("one", [(1, 2.0), (2, 2.0)])])


def test_a_whole_run_writes_its_report(tiny_folder, records_file, tmp_path):
    from conftest import some_records

    import train
    from parrot.config import TrainConfig
    out = tmp_path / "out"
    data = records_file(some_records(40))
    train.train(TrainConfig(weights=str(tiny_folder), data=str(data), out=str(out), epochs=1, batch_size=8,
                            val_fraction=0.2, eval_every=2, device="cpu", learning_rate=1e-2))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    shown = json.loads((out / "report.json").read_text(encoding="utf-8"))
    losses = [json.loads(line) for line in open(out / "metrics.jsonl")]
    told = [word for word in page.words if re.match(r"step \d+: ", word)]
    assert told == [f"step {line['step']}: {line['val_loss']:.4f}" for line in losses if "val_loss" in line]
    assert len(shown["before"]) == len(shown["after"]) == 7 and "How sure it was" in page.words
    assert sum(share for _, share in shown["answer"][0]["likeliest"]) <= 1
