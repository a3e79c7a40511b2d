"""The model card: README.md of a run's folder, so that the folder can be published as it is."""

from pathlib import Path

from parrot.config import REPETITION_PENALTY
from parrot.files import read_json, replace_text
from parrot.hub import HUB_MODELS

LICENCES = {  # of the data sets that we know: (Hub id, licence)
    "dolly": ("databricks/databricks-dolly-15k", "CC BY-SA 3.0 (Databricks)"),
    "quickstart": (None, "MIT (the LittleParrot project)")}
BASES = {**HUB_MODELS, "instruct-q4": HUB_MODELS["instruct"]}


def write(folder):
    """Write README.md into the folder of a finished run. OSError where the disk refuses."""
    folder = Path(folder)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else {}
    card = render(read_json(folder / "run.json"), evaluation)
    replace_text(folder / "README.md", card)


def render(about, evaluation):
    """The card, from run.json and evaluation.json."""
    config = about["config"]
    weights, data = config["weights"], config["data"]
    dataset, licence = LICENCES.get(data, (None, "its own: state it here before you publish this model"))
    base = BASES.get(weights, weights if about["weights"]["from"].startswith("Hugging Face") else None)
    head = ["---", "license: apache-2.0" if weights in BASES else "license: other", "language: en",
            "pipeline_tag: text-generation", "library_name: transformers",
            *([f"base_model: {base}"] if base else []), *(["datasets:", f"- {dataset}"] if dataset else []), "---"]
    loss = "Nothing was held out."
    if about.get("best_loss") is not None:
        loss = (f"Loss on {about['held_out']} held-out examples, in nats a supervised token: {about['first_loss']:.3f} before "
                f"training, {about['best_loss']:.3f} after.")
    return "\n".join([
        *head, "", "# LittleParrot", "",
        f"A small assistant: {base or weights} fine-tuned with LittleParrot, a from-scratch trainer in plain PyTorch.", "",
        "## Use", "", "The chat template is in the folder. No system turn is expected.", "", "```python",
        "from transformers import pipeline", 'ask = pipeline("text-generation", "path/to/this/folder")',
        f'ask([{{"role": "user", "content": "Who are you?"}}], repetition_penalty={REPETITION_PENALTY})', "```", "",
        "## Training", "",
        f"- Data: {dataset or data}, {about['examples']} examples, {about['held_out']} more held out.",
        f"- Loss on the replies and their end-of-turn tokens only; {about['steps']} steps of {config['batch_size']} examples.",
        f"- AdamW, betas {config['beta1']} and {config['beta2']}, weight decay {config['weight_decay']} on matrices; "
        f"learning rate up to {config['learning_rate']:g}, warmup {config['warmup_ratio']:.0%}, "
        f"cosine to {config['min_learning_rate']:g}; "
        f"gradients clipped at {config['grad_clip']:g}; matrix products in {config['dtype']}, weights in float32; seed {config['seed']}.",
        "- `run.json` has all settings, versions and hashes, `metrics.jsonl` every step.", "",
        "## Evaluation", "", loss, "", *markdown_table(evaluation.get("table", [])),
        "## Limits", "",
        "With so few parameters it knows little and states wrong facts with confidence. English only. Not made safe for any "
        "use beyond learning how fine-tuning works.", "",
        "## Licences", "",
        f"Weights: {'Apache-2.0 (SmolLM2, Hugging Face)' if weights in BASES else 'those of the starting model'}. "
        f"Data: {licence}.", ""])


def markdown_table(rows):
    """Rows of cells, the first the head, as Markdown; [] of none."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""] if rows else []
