"""Damaged checkpoints by the thousand: `python tests/damaged_checkpoints.py FOLDER [COUNT] [SEED]`.

FOLDER has whole ones: `.gguf` files, and directories with safetensors. Each round damages the bytes
of one file and loads the checkpoint as far as the weights. It has to load, or to be refused with a
CheckpointError; whatever else is raised ends the run, and so does memory. What happened how often
goes to stdout as JSON.
"""

import json
import resource
import shutil
import struct
import sys
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch

from bezel.engine.checkpoint import iterate_tensors, resolve_checkpoint
from bezel.engine.errors import CheckpointError
from bezel.engine.model_config import ModelConfig
from bezel.engine.models.registry import build_model
from bezel.engine.weights import load_weights

MAX_GROWTH = 256 << 20  # bytes of memory, over what loading the whole ones took
NUMBERS = [0, 1, 2, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
WORDS = [b"null", b"-1", b"0", b"1e999", b"[]", b"{}", b'"x"', b"true", b"99999999999999", b"0.5"]


def damaged(content: bytes, random: Random) -> bytes:
    """The same with one to three things wrong."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        # Most of a file is weights, where nothing can go wrong; headers come first.
        end = len(data) if random.random() < 0.2 else min(len(data), 4096)
        at = random.randrange(max(1, end))
        kind = random.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            data[at : at + 8] = struct.pack("<Q", random.choice(NUMBERS))
        elif kind == 2:
            data[at : at + 4] = struct.pack("<I", random.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            source = random.randrange(max(1, end))
            length = random.randrange(64)
            data[at : at + random.choice((0, length))] = data[source : source + length]
        else:
            data[at : at + random.randrange(8)] = random.choice(WORDS)
    return bytes(data)


def damaged_json(content: bytes, random: Random) -> bytes:
    """A JSON object in which a value, at any depth, is another or isn't there."""
    value = json.loads(content)
    owner = value
    while True:
        key = random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        if not isinstance(owner[key], (dict, list)) or not owner[key] or random.random() < 0.3:
            break
        owner = owner[key]
    if random.random() < 0.2:
        del owner[key]
    else:
        owner[key] = json.loads(random.choice([w for w in WORDS if w != b"1e999"]))
    return json.dumps(value).encode()


def load(path: Path) -> None:
    """Everything between a path and a model with its weights.

    Raises:
        CheckpointError: as it should.
    """
    checkpoint = resolve_checkpoint(str(path))
    model = build_model(
        ModelConfig.from_hf(checkpoint.config), torch.bfloat16, torch.device("meta")
    )
    load_weights(model, iterate_tensors(checkpoint))
    model.after_loading()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Load `count` damaged checkpoints; how many loaded, and how many were refused."""
    random, outcomes = Random(seed), Counter[str]()
    wholes = sorted(path for path in folder.iterdir())
    for whole in wholes:
        load(whole)
    before = peak_bytes()
    for number in range(count):
        with TemporaryDirectory() as scratch:
            path = _damage(random.choice(wholes), Path(scratch), random)
            try:
                load(path)
                outcomes["loaded"] += 1
            except CheckpointError:
                outcomes["refused"] += 1
            except BaseException:
                shutil.copytree(scratch, folder.parent / f"damaged-{seed}-{number}")
                raise
    growth = peak_bytes() - before
    assert growth < MAX_GROWTH, f"memory grew by {growth} bytes"
    return dict(outcomes)


def _damage(whole: Path, scratch: Path, random: Random) -> Path:
    if whole.is_file():
        path = scratch / whole.name
        path.write_bytes(damaged(whole.read_bytes(), random))
        return path
    shutil.copytree(whole, path := scratch / whole.name)
    file = random.choice(
        [file for file in path.iterdir() if file.suffix in (".json", ".safetensors")]
    )
    damage = damaged_json if file.suffix == ".json" and random.random() < 0.7 else damaged
    file.write_bytes(damage(file.read_bytes(), random))
    return path


if __name__ == "__main__":
    folder, count, seed = (
        (*sys.argv[1:], "1000", "0")[:3] if len(sys.argv) > 1 else sys.exit(__doc__)
    )
    print(json.dumps(run(Path(folder), int(count), int(seed))))
