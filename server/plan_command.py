"""`bezel plan MODEL`: what a model needs and what a machine makes of it, before a download."""

import argparse
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bezel.engine.config import EngineConfig
from bezel.engine.planning.device import PRESETS
from bezel.server.options import add_flags, options_of, parse_bytes

if TYPE_CHECKING:
    from bezel.engine.planning.plan import Plan

_ENGINE_FLAGS = (
    "dtype",
    "quantization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
)
_KV_DTYPES = ("auto", "bfloat16", "float32", "fp8")

_TOKENS = re.compile(r"(\d+)(K?)")


def add_parser(commands: Any) -> None:
    """Add `plan` to the subparsers `commands`."""
    parser = commands.add_parser(
        "plan",
        help="say what a model needs and how much a device serves with it",
        description="Compute from config.json alone what a model needs, how many sequences run at "
        "once on a device, and how fast it could be at best. Nothing is loaded.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="name of a published model (gemma-4-26B-A4B), directory, config.json, .gguf file, "
        "`default`, or Hugging Face id",
    )
    parser.add_argument(
        "--device",
        default="h100",
        choices=tuple(PRESETS),
        help="whose memory and speed are assumed [default: h100]",
    )
    parser.add_argument(
        "--device-memory",
        type=_argument(parse_bytes),
        metavar="BYTES",
        help="memory instead of the device's own, e.g. 80G",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=_KV_DTYPES,
        help="number format of KV pages; another than --dtype is a what-if [default: auto]",
    )
    parser.add_argument(
        "--workload",
        type=_argument(_parse_workload),
        metavar="P50/P95",
        help="tokens of prompt + output, at the median and at the 95th percentile, e.g. "
        "1500+300/8K+1K",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    add_flags(parser, "engine", [o for o in options_of(EngineConfig) if o.name in _ENGINE_FLAGS])


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 whether it fits or not.

    Raises:
        BezelError: no such model, or a value that can't be.
    """
    from bezel.engine.memory import DeviceMemory
    from bezel.engine.planning.capacity import Workload
    from bezel.engine.planning.machine import dtype_name
    from bezel.engine.planning.model import PlannedModel
    from bezel.engine.planning.plan import plan_for
    from bezel.engine.planning.source import format_choice, resolve_config

    given = {name: value for name, value in vars(arguments).items() if name in _ENGINE_FLAGS}
    config = EngineConfig(model=arguments.model, **given)
    device = PRESETS[arguments.device]
    memory_bytes = arguments.device_memory or device.memory_bytes
    workload = None
    if arguments.workload is not None:
        workload = Workload(p50=arguments.workload[0], p95=arguments.workload[1])
    name, shape = resolve_config(arguments.model)
    model = PlannedModel.of(
        name,
        shape,
        dtype_name(config.dtype, device.is_gpu),
        arguments.kv_cache_dtype,
        config.local_page_size(device.is_gpu),
        format_choice(config, device.is_gpu),
    )
    memory = DeviceMemory(device.is_gpu, memory_bytes, memory_bytes)
    print_plan(plan_for(model, config, memory, device, workload), arguments.json)
    return 0


def print_plan(plan: "Plan", as_json: bool = False) -> None:
    """On standard output."""
    from bezel.engine.planning.report import table

    print(json.dumps(plan.as_json(), indent=2) if as_json else table(plan))


def _parse_workload(text: str) -> tuple[int, int]:
    """`1500+300/8K+1K` → 1,800 and 9,216 tokens: a K is 1,024 of them."""
    sums = [
        [_parse_tokens(number, text) for number in point.split("+")] for point in text.split("/")
    ]
    if [len(numbers) for numbers in sums] != [2, 2]:
        raise ValueError(_not_a_workload(text))
    return sum(sums[0]), sum(sums[1])


def _parse_tokens(number: str, text: str) -> int:
    found = _TOKENS.fullmatch(number.strip())
    if found is None:
        raise ValueError(_not_a_workload(text))
    return int(found[1]) * (1024 if found[2] else 1)


def _not_a_workload(text: str) -> str:
    return f"{text!r} is not prompt + output at the median / at the 95th percentile: 1500+300/8K+1K"


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which keeps the text of this error only."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
