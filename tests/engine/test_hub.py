"""Downloads from a stand-in for the Hugging Face hub on this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "a" * 40
FILES = {
    "config.json": b'{"model_type": "gemma3_text", "hidden_size": 64}',
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "model.gguf": b"GGUF",
}
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "tiny/revision/v9": (404, "RevisionNotFound"),
}
# Settings are read when huggingface_hub is imported, hence a process of its own.
PROGRAM = """
import sys
from bezel.engine.checkpoint import resolve_checkpoint
from bezel.engine.errors import CheckpointError
for argument in sys.argv[1:]:
    try:
        checkpoint = resolve_checkpoint(*argument.split("@"))
        print(checkpoint.name, *sorted(file.name for file in checkpoint.path.iterdir()))
    except CheckpointError as error:
        print(error)
"""

PLAN = """
from bezel.engine.errors import CheckpointError
from bezel.engine.hub import download_config
for model in {models}:
    try:
        print(download_config(model).read_text())
    except CheckpointError as error:
        print(error)
"""


class FakeHub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for part, (status, code) in REFUSALS.items():
            if part in path:
                return self.answer(status, b"{}", {"X-Error-Code": code})
        if path == "/api/models/org/tiny/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        if path == f"/api/models/org/tiny/tree/{COMMIT}":
            sizes = {name: len(content) for name, content in FILES.items()}
            tree = [{"type": "file", "path": p, "size": n, "oid": p} for p, n in sizes.items()]
            return self.answer_json(tree)
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name in FILES:
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, FILES[name], headers)
        return self.answer(404, b"", {})

    do_HEAD = do_GET

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(*models: str, home: Path, endpoint: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *models],
        env={"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()


def test_hub_checkpoints(hub_url: str, tmp_path: Path) -> None:
    downloaded = "org/tiny chat_template.jinja config.json model.safetensors"
    models = ["org/tiny", "org/gated", "org/absent", "org/tiny@v9", "org--x/y"]
    assert resolve(*models, home=tmp_path, endpoint=hub_url) == [
        downloaded,
        "org/gated is gated: accept its terms on https://huggingface.co/org/gated, "
        "then set HF_TOKEN",
        "org/absent is neither a local path nor on the Hugging Face hub "
        "(a private one needs HF_TOKEN)",
        "org/tiny has no revision 'v9'",
        "'org--x/y' can't be a hub id: Cannot have -- or .. in repo_id: 'org--x/y'.",
    ]
    # Without the hub, what was downloaded is still there.
    assert resolve("org/tiny", "org/new", home=tmp_path, endpoint="http://127.0.0.1:9") == [
        downloaded,
        "org/new is neither a local path nor in the hub's cache, "
        "and the Hugging Face hub can't be reached",
    ]


def test_a_plan_downloads_the_config_alone(hub_url: str, tmp_path: Path) -> None:
    program = PLAN.format(models=["org/tiny", "org/gated", "org/absent"])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"HF_ENDPOINT": hub_url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    config, gated, absent = run.stdout.splitlines()
    assert config == FILES["config.json"].decode()
    assert gated.startswith("org/gated is gated: accept its terms")
    assert absent.startswith("org/absent is neither a local path nor on the Hugging Face hub")
    names = {file.name for file in tmp_path.rglob("snapshots/*/*")}
    assert names == {"config.json"}
