"""What is fetched or computed once, and kept: the wheel, imported models, tokenised data."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from parrot.system.console import UserError
from parrot.system.disk import flush, read_json, sha256_of, write_json

SIZES = "sizes.json"  # the size of every other file of a folder, to notice one that is truncated


def key_of(*parts) -> str:
    """A name for what follows from these parts: 16 digits of their hash."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def source_hash(*sources) -> str:
    """The same, for source files: modules or paths."""
    return key_of(*(sha256_of(getattr(source, "__file__", source)) for source in sources))


def kept(name: str, make) -> Path:
    """The folder `name` of the cache, made by `make(folder)` if it is not there and whole."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if place.startswith("~"):  # as in a container whose user has no name
        raise UserError("no place for the cache: set HOME, or XDG_CACHE_HOME, to a folder of yours")
    folder = Path(place, "littleparrot", name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if _is_complete(folder):
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, folder.name)
            made.mkdir()
            make(made)
            write_json(made / SIZES, {path.name: path.stat().st_size for path in made.iterdir()})
            for path in (*made.iterdir(), made):
                flush(path)
            if not _is_complete(folder):  # another process may have been faster
                shutil.rmtree(folder, ignore_errors=True)
                made.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the cache {folder}: {error} (see XDG_CACHE_HOME)") from None
    return folder


def _is_complete(folder):
    with suppress(UserError, OSError, ValueError):
        sizes = read_json(folder / SIZES)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
