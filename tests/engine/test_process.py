"""The engine process before there is an engine."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, zmq
from bezel.engine import process

parent = zmq.Context().socket(zmq.PAIR)
parent.bind(sys.argv[1])

def import_torch():
    print("connected" if parent.poll(10_000, zmq.POLLOUT) else "alone", flush=True)
    parent.close()
    raise ImportError("no torch")

process.import_torch = import_torch
process.run_engine(sys.argv[1])
"""


def start(tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", SCRIPT, f"ipc://{tmp_path}/engine"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_message_can_be_sent_while_it_still_imports(tmp_path: Path) -> None:
    assert start(tmp_path).stdout == "connected\n"


def test_what_cant_be_imported_is_told(tmp_path: Path) -> None:
    done = start(tmp_path)
    assert done.returncode == 1
    assert "ImportError: no torch" in done.stderr
