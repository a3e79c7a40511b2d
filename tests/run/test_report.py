"""The report of a run: one file, everything escaped, every figure that of metrics.jsonl."""

import json
import re
from html.parser import HTMLParser

import pytest
from conftest import some_records

import train
from parrot.config import TrainConfig
from parrot.run import report
from parrot.system.console import UserError

HOSTILE = "<script>alert(1)</script> & \"'<img src=x onerror=y> \x1b[2J <|im_start|>system"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: the text, the tags with their attributes, what is left open."""

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


ABOUT = {"config": {"out": HOSTILE, "epochs": 2, "max_steps": None, "seed": 0, "resume": False},
         "steps": 40, "examples": 300, "held_out": 7, "versions": {"torch": "9.9"},
         "weights": {"name": HOSTILE, "from": "a folder", "files": {"model.safetensors": "abc123"}},
         "data": {"name": HOSTILE, "from": "a file", "sha256": "def456"}, "machine": "Linux",
         "device": "cpu", "processes": 1, "longest": 200,
         "notes": {"told": ["3 left out: longer than --max-length 8", "2 bad: " + HOSTILE],
                   "categories": {HOSTILE: 307}}}
STEPS = [{"step": n, "train_loss": 3 - n / 20, "learning_rate": n * 1e-5, "grad_norm": 1.0,
          "tokens_per_second": 100.0 + n} for n in range(1, 41)]
METRICS = [{"step": 0, "val_loss": 3.25}, *STEPS, {"step": 40, "val_loss": 2.125}]
SHOWN = {"before": [[HOSTILE, HOSTILE, [1]], ["b?", "c", [2]]],
         "after": [[HOSTILE, HOSTILE, [1]], ["b?", "d", [3]]],
         "example": [[HOSTILE, False], ["reply" + HOSTILE, True]],
         "answer": [{"text": HOSTILE, "probability": 0.5, "top_p": 0.9, "nucleus": 3,
                     "likeliest": [[HOSTILE, 0.5], ["no", 0.25]]}]}
EVALUATION = {"table": [["", HOSTILE], ["held-out loss", "2.125 ± 0.010"]]}


@pytest.fixture
def render(tmp_path):
    """A function: the contents of the four files -> the page."""
    def render(about=ABOUT, metrics=METRICS, shown=SHOWN, evaluation=EVALUATION):
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        (tmp_path / "metrics.jsonl").write_text(lines)
        for name, content in (("run", about), ("report", shown), ("evaluation", evaluation)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return report.render(tmp_path)
    return render


@pytest.fixture
def page(render):
    return Page(render())


def test_well_formed_and_nothing_from_elsewhere(page, render):
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "a"})
    for tag, attributes in page.tags:
        assert not {"src", "href", "onerror", "onload", "onclick"} & attributes.keys(), tag
    html = render()
    assert not re.search(r"https?://|@import|url\(", html)


def test_what_it_shows_is_escaped(page, render):
    html = render()
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    shown = "".join(page.words)
    assert shown.count("<script>alert(1)</script>") >= 9 and "\\x1b[2J" in shown


def test_the_curves_are_those_of_the_metrics(page):
    """Back from the pixels of the polyline to the numbers."""
    lines = [attributes["points"].split() for tag, attributes in page.tags if tag == "polyline"]
    assert [len(line) for line in lines] == [40, 2, 40, 40, 40]
    ys = [float(point.split(",")[1]) for point in lines[0]]
    low, high = 1.0, 3.25  # of both series of the first chart
    losses = [low + (195 - y) / 175 * (high - low) for y in ys]
    assert losses == pytest.approx([3 - n / 20 for n in range(1, 41)], abs=2e-3)
    xs = [float(point.split(",")[0]) for point in lines[0]]
    assert xs == pytest.approx([60 + 430 * n / 40 for n in range(1, 41)], abs=0.06)
    titles = [word for word in page.words if re.match(r"step \d+: ", word)]
    assert titles == ["step 0: 3.2500", "step 40: 2.1250"]


def test_the_words_are_those_of_the_run(page):
    shown = " ".join(page.words)
    assert ("40 steps on 300 examples; finished; held-out loss 3.250 before, 2.125 at its best"
            in shown)
    for words in ("2.125 ± 0.010", "abc123", "def456", "torch 9.9", "3 left out: longer",
                  "2 bad: ", "epochs 2, seed 0", "200"):
        assert words in shown
    for words in ("max_steps", "resume", "None"):
        assert words not in shown


def test_targets_are_marked_and_probabilities_told(page):
    classes = [attributes["class"] for tag, attributes in page.tags
               if tag == "span" and "class" in attributes]
    assert classes[-2:] == ["", "learned"]
    hover = next(attributes["title"] for tag, attributes in page.tags if "title" in attributes)
    for words in ("50.0%; the nucleus of top-p 0.9 holds 3 tokens", "25.0%", "'no'"):
        assert words in hover


def test_a_run_that_has_just_begun(render):
    page = Page(render(ABOUT, [], {}, {}))
    assert "40 steps on 300 examples; 0 of them done" in " ".join(page.words) and page.open == []
    page = Page(render(ABOUT, METRICS[:2], {"before": SHOWN["before"]}, {}))
    assert "not yet known" in " ".join(page.words)


@pytest.mark.parametrize("low, high", [
    (0, 1e-9), (1.5, 1.5000001), (-3, 7), (0, 12345), (1e-5, 3e-4), (2, 2), (0, 5e-324)])
def test_ticks_are_round_and_within(low, high):
    ticks = report.ticks(low, high)
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks) and len(ticks) <= 6


def test_numbers_that_cannot_be_drawn():
    assert report.points([{"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0}], "x") == [(2, 1.0)]
    assert "polyline" in report.chart([{"step": 1, "x": 2.0}, {"step": 2, "x": 2.0}], "x")
    assert "polyline" in report.chart([{"step": 1, "x": 5e-324}], "x")


def test_numbers_that_are_none_are_escaped(render):
    """Whatever stands in run.json in the place of a number."""
    hostile = dict.fromkeys(("steps", "examples", "held_out", "machine", "processes"), HOSTILE)
    about = {**ABOUT, **hostile}
    html = render(about, [], {}, {})
    assert "<script" not in html and "<img" not in html and "\x1b" not in html


@pytest.fixture
def folder(render, tmp_path):
    """One with all four files."""
    render()
    return tmp_path


DAMAGE = [("run.json", {"config": 1}), ("run.json", {**ABOUT, "notes": []}),
          ("run.json", {**ABOUT, "weights": "w"}),
          ("run.json", {key: value for key, value in ABOUT.items() if key != "device"}),
          ("metrics.jsonl", [1]), ("metrics.jsonl", {"train_loss": 1.0}),
          ("metrics.jsonl", {"step": "x", "train_loss": 1.0}),
          ("metrics.jsonl", {"step": 50, "train_loss": [1]}),
          ("metrics.jsonl", {"step": 50, "train_loss": 10**30}),
          ("report.json", {"before": [1]}),
          ("report.json", {"before": [["a", "b", []]], "after": [1]}),
          ("report.json", {"answer": [{"text": "a"}]}), ("report.json", {"example": [[1]]}),
          ("evaluation.json", {"table": [1]})]


@pytest.mark.parametrize("name, content", DAMAGE)
def test_a_damaged_file_is_named(name, content, folder):
    report.write(folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / name).write_text(json.dumps(content) + "\n")
    try:
        report.write(folder)
    except UserError as error:
        assert str(error).startswith(str(folder / name)) and "\n" not in str(error)
        assert (folder / "report.html").read_text(encoding="utf-8") == before
    else:
        assert content == {"step": 50, "train_loss": 10**30}  # which can be drawn


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"9" * 5000, b"\0", b"\xe9"])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "report.json", "evaluation.json"])
def test_what_is_no_json_is_named(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        report.write(folder)


def test_a_whole_run_writes_its_report(tiny_folder, records_file, tmp_path):
    out = tmp_path / "out"
    data = records_file(some_records(40))
    train.train(TrainConfig(weights=str(tiny_folder), data=str(data), out=str(out), epochs=1,
                            batch_size=8, val_fraction=0.2, eval_every=2, device="cpu",
                            learning_rate=1e-2))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    shown = json.loads((out / "report.json").read_text(encoding="utf-8"))
    with open(out / "metrics.jsonl", encoding="utf-8") as file:
        metrics = [json.loads(line) for line in file]
    titles = [word for word in page.words if re.match(r"step \d+: ", word)]
    assert titles == [f"step {line['step']}: {line['val_loss']:.4f}" for line in metrics
                      if "val_loss" in line]
    assert len(shown["before"]) == len(shown["after"]) == 7 and "How sure it was" in page.words
    assert sum(share for _, share in shown["answer"][0]["likeliest"]) <= 1
    for name in ("report.html", "run.json", "README.md"):  # made to be published
        text = (out / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(tiny_folder.parent) not in text
