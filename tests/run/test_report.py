"""The report and the model card of a run: everything escaped, every figure that of metrics.jsonl."""

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


ABOUT = {"config": {"out": HOSTILE, "epochs": 2, "max_steps": None, "seed": 0, "resume": False,
                    "batch_size": 64, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01,
                    "learning_rate": 3e-4, "warmup_ratio": 0.1, "min_learning_rate": 3e-5,
                    "grad_clip": 1.0, "dtype": "bfloat16"},
         "dtype": "float32", "steps": 40, "examples": 300, "held_out": 7,
         "versions": {"torch": "9.9"}, "first_loss": 3.25, "best_loss": 2.125,
         "weights": {"name": HOSTILE, "from": "a folder", "files": {"model.safetensors": "abc123"}},
         "data": {"name": HOSTILE, "from": "a file", "files": {HOSTILE: "def456"}}, "machine": "Linux",
         "objective": HOSTILE, "device": "cpu", "processes": 1, "longest": 200,
         "notes": ["3 left out: longer than --max-length 8", "2 bad: " + HOSTILE]}
BEFORE, AFTER = [[HOSTILE, HOSTILE], ["b?", "c"]], [[HOSTILE, HOSTILE], ["b?", "d"]]
STEPS = [{"step": n, "train_loss": 3 - n / 20, "learning_rate": n * 1e-5, "grad_norm": 1.0,
          "tokens_per_second": 100.0 + n} for n in range(1, 41)]
METRICS = [{"step": 0, "val_loss": 3.25}, *STEPS, {"step": 40, "val_loss": 2.125}]


@pytest.fixture
def render(tmp_path):
    """A function: the contents of the files -> (report, card)."""
    def render(metrics=METRICS, **changes):
        about = {**ABOUT, "before": BEFORE, "after": AFTER, **changes}
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        (tmp_path / "metrics.jsonl").write_text(lines)
        (tmp_path / "run.json").write_text(json.dumps(about))
        report.write(tmp_path)
        return [(tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "README.md")]
    return render


@pytest.fixture
def page(render):
    return Page(render()[0])


def test_well_formed_and_nothing_from_elsewhere(page, render):
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "a"})
    for tag, attributes in page.tags:
        assert not {"src", "href", "onerror", "onload", "onclick"} & attributes.keys(), tag
    html, _ = render()
    assert not re.search(r"https?://|@import|url\(", html)


def test_what_it_shows_is_escaped(page, render):
    html, _ = render()
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    shown = "".join(page.words)
    assert shown.count("<script>alert(1)</script>") >= 5 and "\\x1b[2J" in shown


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
    labels = [word for word in page.words if re.fullmatch(r"[\d.e-]+", word)]
    assert labels[:4] == ["0", "40", "1", "3.25"]


def test_the_words_are_those_of_the_run(page):
    shown = " ".join(" ".join(page.words).split())
    for words in ("40 of 40 steps done, on 300 examples of up to 200 tokens; 7 more are held out",
                  "Held-out loss: 3.25 before training, 2.125 at its best",
                  "abc123", "def456", '"torch": "9.9"', "3 left out: longer", "2 bad: "):
        assert words in shown


def test_a_run_that_has_just_begun(render):
    page = Page(render([], before=[], after=[], first_loss=None)[0])
    shown = " ".join(page.words)
    assert "0 of 40 steps done" in shown and "Held-out loss: n/a before" in shown
    assert page.open == []
    page = Page(render(METRICS[:2], after=[])[0])
    assert "not yet known" in " ".join(page.words)


@pytest.mark.parametrize("after", [[], [["b?", "d"]], [["b?", "d"], ["other?", "e"]]])
def test_other_questions_after_than_before(after, render):
    """A resumed run may ask others: no answer stands beside another question."""
    words = Page(render(after=after)[0]).words
    assert words.count("not yet known") == 2 - len(after[:1]) and "e" not in words
    if after:
        assert words[words.index("b?"):][:3] == ["b?", "c", "d"]


def test_numbers_that_cannot_be_drawn(render):
    assert report.points([{"step": 1, "x": float("nan")}, {"step": 2, "x": 1.0}], "x") == [(2, 1.0)]
    for metrics in ([{"step": 1, "train_loss": 2.0}, {"step": 2, "train_loss": 2.0}], [{"step": 1, "grad_norm": 5e-324}]):
        assert render(metrics)[0].count("<polyline") == (2 if len(metrics) == 2 else 1)


def test_numbers_that_are_none_are_escaped(render):
    """Whatever stands in run.json in the place of a number."""
    hostile = dict.fromkeys(("steps", "examples", "held_out", "machine", "processes"), HOSTILE)
    html, _ = render([], **hostile)
    assert "<script" not in html and "<img" not in html and "\x1b" not in html


# ---- the model card

MARKS = ("a\n# b\n---\n<img src=x> [c](javascript:d) ![e](f) `g` |h| *i* &lt; @j \x1b[2J $k "
         "\u2028- l")
BASE = {"name": "base", "from": "Hugging Face Hub HuggingFaceTB/SmolLM2-135M"}


def test_the_card_has_recipe_and_results(render):
    _, card = render(weights=BASE)
    assert card.startswith("---\nlicense: other\n")
    for words in ("base (Hugging Face Hub HuggingFaceTB/SmolLM2-135M)", "products in float32",
                  "3.25 before training, 2.125 after", "up to 0.0003", "40 of 40 steps done",
                  "max_new_tokens=256)"):
        assert words in card
    _, card = render([], first_loss=None, best_loss=None)
    assert "n/a before training, n/a after" in card and "0 of 40 steps" in card


def test_names_in_the_card_change_no_markup(render):
    _, hostile = render(examples=MARKS, weights={"name": MARKS, "from": MARKS}, data={"name": MARKS, "from": MARKS})
    _, plain = render(examples=3, weights={"name": "w", "from": "a"}, data={"name": "d", "from": "a"})
    assert hostile.split("\n\n")[0] == plain.split("\n\n")[0]  # the head
    assert len(hostile.splitlines()) == len(plain.splitlines()) and "\x1b" not in hostile
    marks = r"<|&(?!lt;|gt;|amp;)|(?<!\\)[\[\]!`*@$|]"
    unescaped = [re.findall(marks, page.replace("\\\\", "")) for page in (hostile, plain)]
    assert unescaped[0] == unescaped[1]


# ---- damaged files

@pytest.fixture
def folder(render, tmp_path):
    """One with all its files."""
    render()
    return tmp_path


@pytest.mark.parametrize("name, content", [
    ("run.json", {"config": 1}), ("run.json", {**ABOUT, "weights": "w"}),
    ("run.json", {key: value for key, value in ABOUT.items() if key != "longest"}),
    ("run.json", {**ABOUT, "before": [1]}), ("run.json", {**ABOUT, "before": BEFORE, "after": [1]}),
    ("metrics.jsonl", [1]), ("metrics.jsonl", {"train_loss": 1.0}),
    ("metrics.jsonl", {"step": "x", "train_loss": 1.0}),
    ("metrics.jsonl", {"step": 50, "train_loss": [1]})])
def test_a_damaged_folder_is_named(name, content, folder):
    report.write(folder)
    before = (folder / "report.html").read_text(encoding="utf-8")
    (folder / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(UserError) as caught:
        report.write(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"9" * 5000, b"\0", b"\xe9"])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_what_is_no_json_is_named(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=str(folder)):
        report.write(folder)


def test_a_whole_run_writes_its_report(tiny_folder, records_file, tmp_path):
    out = tmp_path / "out"
    data = records_file(some_records(40))
    train.train(TrainConfig(weights=str(tiny_folder), data=str(data), out=str(out), epochs=1,
                            batch_size=8, val_fraction=0.2, eval_every=2, device="cpu",
                            learning_rate=1e-2))
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 5
    assert len(about["before"]) == len(about["after"]) == 4 and "What it says" in page.words
    for name in ("report.html", "run.json", "README.md"):  # made to be published
        text = (out / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text and str(tiny_folder.parent) not in text
