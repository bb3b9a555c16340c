"""What the HTTP layer needs of an engine: the contract between `server` and `engine.client`.

The engine itself lives in another process; tests put a fake in its place.
"""

from collections.abc import AsyncGenerator
from typing import Protocol

from bezel.engine.messages import EngineInfo, FinishReason, SequenceOutput
from bezel.engine.sampling_params import SamplingParams


class EngineHandle(Protocol):
    """A loaded model that turns prompts into tokens."""

    @property
    def info(self) -> EngineInfo:
        """Limits and sizes of the loaded model; there once `start` has returned."""

    @property
    def is_ready(self) -> bool:
        """Whether the engine is loaded and alive."""

    @property
    def step_age_s(self) -> float:
        """Seconds since the engine was last heard of while work is pending; 0 when idle."""

    @property
    def num_restarts(self) -> int:
        """How often the engine process had to be started again."""

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: with a message for the user, if it can't be loaded.
        """

    def generate(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Yield the tokens of one sequence; the last output carries the finish reason.

        Closing or cancelling the generator aborts the sequence.

        Raises:
            EngineUnavailable: the engine isn't there, which it tells before it first suspends, or
                is lost meanwhile.
        """

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """End a sequence early; its generator is not iterated any further."""

    async def shutdown(self) -> None:
        """End the engine process; also before `start` has returned."""
