"""Files on disk: written whole or not at all, read with errors that name them."""

import hashlib
import json
import os
from pathlib import Path

from parrot.console import UserError


def read_json(path):
    """A file that holds a JSON object; UserError where it does not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def replace_file(path, write):
    """Let `write(temporary path)` make a file, flush it to the disk, rename it to `path`.

    Whenever the power goes, `path` is the old file or the new one, never a part of one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # safetensors makes files that only their owner may read
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    """Write `content` as JSON, whole or not at all."""
    replace_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_text(path, text):
    """Make `text` the content of a file, whole or not at all. A file name's odd bytes become escapes, as JSON knows them."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def flush(path):
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and Path(path).is_dir():
        return  # Windows cannot open folders, and needs no flush of them
    descriptor = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path):
    """The sha256 of a file, as hexadecimal digits; UserError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()
