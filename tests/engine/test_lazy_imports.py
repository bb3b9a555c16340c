"""The engine's process does without torch's compiler, and without Triton where there is no GPU."""

import subprocess
import sys

START = """
import sys
from bezel.engine.lazy_imports import PUT_OFF, import_torch

import_torch()
import torch
from bezel.engine.config import EngineConfig
from bezel.engine.core import Engine
from bezel.engine.sampling_params import SamplingParams
"""
SERVE = """
engine = Engine(EngineConfig(model=sys.argv[1], device="cpu", max_model_len=64, dtype="float32"))
assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2))[0]) == 2
print(*sorted(
    name for name in ("torch._refs", "torch._dynamo", "sympy", "triton", "transformers")
    if sys.modules.get(name) is not None
))
"""
USE = """
assert PUT_OFF <= sys.modules.keys()
assert "export" not in vars(torch.export)
assert torch.export.export.__module__ == "torch.export"
assert torch._meta_registrations.register_meta is not None
assert sys.modules["torch.export"] is torch.export
print("used")
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", START + script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_what_an_engine_has_no_use_for_is_not_imported(small_checkpoint: object) -> None:
    assert run(SERVE, str(small_checkpoint)) == ""


def test_what_was_put_off_is_there_for_whoever_looks() -> None:
    assert run(USE) == "used"
