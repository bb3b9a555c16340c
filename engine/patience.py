"""How long the engine may say nothing before it is taken to hang.

It speaks after every step. On a GPU a step takes a second at most. On a CPU the longest one
computes `max_num_batched_tokens` tokens, each of them 2 operations a parameter, and a slow machine
is given the time that it needs for them.
"""

from bezel.engine.config import EngineConfig
from bezel.engine.messages import EngineInfo

# More than compiling the kernels of a first step takes, or a large grammar.
DEFAULT_TIMEOUT_S = 300.0
# Of two cores, with attention to a long context on top.
SLOW_CPU_FLOPS = 50e9


def hang_timeout_s(config: EngineConfig, info: EngineInfo) -> float:
    """Seconds of silence with work pending; 0 means any length of time."""
    if config.engine_hang_timeout is not None:
        return config.engine_hang_timeout
    if info.device != "cpu":
        return DEFAULT_TIMEOUT_S
    operations = 2 * info.num_parameters * config.max_num_batched_tokens
    return DEFAULT_TIMEOUT_S + operations / SLOW_CPU_FLOPS
