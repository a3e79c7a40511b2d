"""Files on disk: written whole or not at all, read with errors that name them."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from parrot.system.console import UserError, refuse


def read_json(path):
    """A file that holds a JSON object. Raises UserError."""
    try:
        content = json.loads(open_to_read(path).read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    refuse(path, {"does not hold a JSON object": not isinstance(content, dict)})
    return content


def sha256_of(path):
    """The digest of a file, in hex. Raises UserError."""
    digest = hashlib.sha256()
    with open_to_read(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_to_read(path):
    """A file, opened for bytes. Raises UserError."""
    refuse(path, {"is a pipe, not a file": Path(path).is_fifo()})  # would wait for a writer
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None


def write_json(path, content):
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_text(path, text):
    """A file in UTF-8; lone surrogates, as in names of files, are escaped."""
    replace_file(path, lambda file: file.write_text(text, "utf-8", "backslashreplace", "\n"))


def replace_file(path, write):
    """Let `write(a path nobody can guess)` make a file, flush it, rename it to `path`."""
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(".part", f".{path.name}.", path.parent) as folder:
        temporary = Path(folder, path.name)
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors lets only the owner read
        flush(temporary)
        os.replace(temporary, path)
    flush(path.parent)


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name != "nt" or Path(path).is_file():  # Windows cannot open folders, and need not
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
