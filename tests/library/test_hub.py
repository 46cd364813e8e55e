"""Push and pull through a repository: the hub's own client, against a small server that answers as the hub does."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from veneer import AdapterError, library

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories of plain files, each with one commit."""

    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if parts[4:5] == ["tree"]:
                return self._answer(
                    200, [{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()]
                )
            about = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            return self._answer(200, about)
        data = self.repositories["/".join(parts[:2])]["/".join(parts[4:])]
        return self._send(200, data, {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            assert asked.get("visibility") == "private" or asked.get("private") is True
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories[name] = {}
            return self._answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[4] == "preupload":
            asked = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": asked})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files = self.repositories["/".join(parts[2:4])]
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(
            200,
            {"commitUrl": f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{COMMIT}", "commitOid": COMMIT},
        )

    def _answer(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[dict[str, dict[str, bytes]]]:
    """The repositories of a hub that runs for one test; processes that are begun now use it."""
    handler = type("Handler", (Hub,), {"repositories": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_nobody")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield handler.repositories
        http.shutdown()


def run(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


BEGIN = """
from dataclasses import replace
from veneer import AdapterError, library

def refused(call, *arguments):
    try:
        call(*arguments)
    except AdapterError as error:
        return print(error)
    raise AssertionError("nothing was refused")
"""


def test_there_and_back_through_a_repository(server, peft, kohya):
    folder = peft(name="plain")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\n")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    server["x/peft"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    server["x/two"] = {
        "README.md": b"---\nlicense: other\nlicense_name: rail\n---\n",
        "one.safetensors": kohya("one").read_bytes(),
        "sub/adapter_config.json": (folder / "adapter_config.json").read_bytes(),
        "sub/adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
        "two.safetensors": kohya("two", 2).read_bytes(),
    }
    server["x/base"] = {"config.json": b"{}", "model.safetensors": b""}
    library.add(kohya("style"), "style", tags=["hat"], triggers=["a hat"])
    lines = run("""
library.push("style", "me/new", report=print)
refused(library.push, "style", "me/new")
library.push("style", "me/new", True)
entry = library.pull("me/new", "again")
had = library.get("style")
assert replace(entry, name="", added="", origin={}) == replace(had, name="", added="", origin={}), entry
print(entry.origin)
entry = library.pull("x/peft")
print(entry.name, entry.licence, entry.base, *entry.files)
refused(library.pull, "x/two")
print(library.pull("x/two/two.safetensors").licence, *library.find("two").parts[-1:])
print(library.pull("x/two/sub").name)
refused(library.pull, "x/base")
refused(library.pull, "x/nothing")
assert library.verify() == []
""")
    made, refused, origin, plain, two, one, sub, base, nothing = [
        line for line in lines if not line.startswith("fetching")
    ]
    assert made == "me/new is new, and private: its page on the hub opens it to others"
    assert refused == "me/new holds style.safetensors already; nothing was sent (--force replaces)"
    assert origin == f"{{'repository': 'me/new', 'revision': '{COMMIT}'}}"
    assert plain == "peft mit a/b README.md adapter_config.json adapter_model.safetensors"
    assert two == "x/two/: expected one adapter, found one.safetensors, two.safetensors; x/two/FILE names one of them"
    assert one == "rail adapter.safetensors"
    assert sub == "sub"
    assert base.startswith("x/base/ is a base model and no adapter")
    assert nothing.startswith("x/nothing cannot be pulled: ")
    assert set(server["me/new"]) == {"style.safetensors", "README.md", "veneer-library.json"}


def test_offline_is_one_clear_error(peft, monkeypatch):
    from huggingface_hub import constants

    library.add(peft(), "a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="pushing to me/new needs the network, and HF_HUB_OFFLINE is set; a folder"):
        library.push("a", "me/new")
    with pytest.raises(AdapterError, match="pulling me/new needs the network, and HF_HUB_OFFLINE is set; a folder"):
        library.pull("me/new")
