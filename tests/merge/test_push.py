"""`--push` against a stand-in for the hub on loopback, that speaks the protocol of git-lfs files and of commits."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from checkpoint_files import World, files_in, make_world, python, refusal, succeed

CODE = "from deltafl.cli import main; main()"


class Hub(ThreadingHTTPServer):
    """What was asked for, and the files of the repository as commits made them. broken: of uploads, how many fail."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.broken = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, data: object, code: int = 200) -> None:
        raw = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        known = {"id": "owner/name", "sha": "0" * 40, "siblings": [], "private": False, "tags": []}
        self.answer(known)

    def do_POST(self) -> None:
        hub, raw = self.server, self.body()
        hub.asked.append(("POST", self.path))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(raw))
            self.answer({"url": f"{hub.address}/owner/name", "id": "owner/name"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            sent = json.loads(raw)["files"]
            modes = {True: "lfs", False: "regular"}
            self.answer({
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in sent
                ]
            })  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(raw)["objects"]
            known = lambda o: o["oid"] in hub.blobs  # noqa: E731
            upload = lambda o: {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}  # noqa: E731
            told = [o if known(o) else o | {"actions": upload(o)} for o in objects]
            self.answer({"transfer": "basic", "objects": told})
        elif "/commit/" in self.path:
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
            self.answer({"commitUrl": f"{hub.address}/owner/name/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        hub, raw = self.server, self.body()
        hub.asked.append(("PUT", self.path))
        if hub.broken:
            hub.broken -= 1
            self.answer({"error": "no"}, 400)
            return
        hub.blobs[self.path.rpartition("/")[2]] = raw
        self.answer({})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def pushed(endpoint: str, world: World, *arguments: object, token: str = "hf_test"):
    """The command in a process of its own, for which the hub is at an endpoint."""
    env = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(world.root / "home"),
        "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1",
    }
    return python(CODE, *arguments, env=env)


def test_the_folder_is_at_the_hub_as_it_is_here(world: World, hub: Hub) -> None:
    done = pushed(
        hub.address, world, *world.args, "--push", "owner/name", "--max-shard-size", "300KB"
    )
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.address}/owner/name" in done.stdout
    assert (hub.created[0]["name"], hub.created[0]["organization"]) == ("name", "owner")
    assert hub.files == files_in(world.out)
    assert len([name for name in hub.files if name.endswith(".safetensors")]) > 1
    told = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert told["tags"] == ["merge", "deltafl"]


def test_what_is_there_already_is_not_sent_again(world: World, hub: Hub) -> None:
    hub.broken = 1
    done = pushed(hub.address, world, *world.args, "--push", "owner/name")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: --push "owner/name": not uploaded (')
    assert line.endswith(f'"{world.out}" is whole: `hf upload owner/name {world.out}` goes on')
    assert (world.out / "model.safetensors").is_file()
    for _ in range(2):
        done = pushed(hub.address, world, *world.args, "--push", "owner/name", "--overwrite")
        assert done.returncode == 0, done.stderr
    assert [kind for kind, _ in hub.asked].count("PUT") == 1 + 1
    assert hub.files == files_in(world.out)


def test_a_hub_that_says_no_or_nothing_is_one_line(world: World, hub: Hub) -> None:
    for endpoint, token in ((hub.address, "hf_other"), ("http://127.0.0.1:9", "hf_test")):
        called = (*world.args, "--push", "owner/name", "--overwrite")
        done = pushed(endpoint, world, *called, token=token)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith('error: --push "owner/name": not')
    assert not hub.files


@pytest.mark.parametrize("more", [(), ("--max-shard-size", "300KB"), ("--as-adapter", 2)])
def test_a_dry_run_lists_what_would_go(world: World, more: tuple[object, ...]) -> None:
    for name in ("tokenizer.json", "preprocessor_config.json", "training.json", "notes.md"):
        (world.root / "base" / name).write_text("{}")
    said = succeed(*world.args, "--push", "owner/name", *more, "--dry-run").out
    assert not world.out.exists()
    listed = said.split("push to owner/name: ")[1].strip().split(", ")
    succeed(*world.args, *more, "--exclude", "norm*", "*.bias", "embed.*")
    assert listed == sorted(files_in(world.out))
    assert "push to" not in succeed(*world.args, *more, "--dry-run", "--overwrite").out


@pytest.mark.parametrize("name", ["name", "a/b/c", "a b/c", ""])
def test_a_repository_has_an_owner_and_a_name(world: World, name: str) -> None:
    assert refusal(world.root, *world.args, "--push", name).startswith("push: ")
