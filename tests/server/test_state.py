"""Phases of the server, and what is in flight."""

from typing import Any

import pytest

from bezel.engine.errors import BezelError, EngineUnavailable
from bezel.engine.metrics import Metrics
from bezel.server.config import ServerConfig
from bezel.server.errors import ModelNotFound
from bezel.server.state import InFlight, ServerState

pytestmark = pytest.mark.anyio


class Waiting:
    def __init__(self) -> None:
        self.error: BezelError | None = None

    def fail(self, error: BezelError) -> None:
        self.error = error


async def test_in_flight_is_empty_after_the_last() -> None:
    in_flight = InFlight()
    await in_flight.wait_empty(0)
    with in_flight.member(Waiting()):
        with in_flight.member(Waiting()):
            pass
        with pytest.raises(TimeoutError):
            await in_flight.wait_empty(0)
    await in_flight.wait_empty(0)


async def test_failing_all_in_flight() -> None:
    in_flight, one, other, gone = InFlight(), Waiting(), Waiting(), Waiting()
    with in_flight.member(gone):
        pass
    error = EngineUnavailable("x")
    with in_flight.member(one), in_flight.member(other):
        assert in_flight.fail_all(error) == 2
    assert (one.error, other.error, gone.error) == (error, error, None)


def test_names_of_the_model(make_state: Any) -> None:
    assert make_state().require_model("tiny").names == ("tiny",)
    state = make_state(served_model_name=("a", "b"))
    assert state.require_model("b").names == ("a", "b")
    with pytest.raises(ModelNotFound):
        state.require_model("tiny")


def test_order_of_refusals(state: ServerState, engine: Any) -> None:
    engine.is_ready = False
    with pytest.raises(EngineUnavailable, match="restarted"):
        state.require_model("other")
    state.is_draining = True
    with pytest.raises(EngineUnavailable, match="shutting down"):
        state.require_model("other")


def test_who_is_leaving_still_serves(state: ServerState) -> None:
    state.is_leaving = True
    assert state.require_model("tiny")
    with pytest.raises(EngineUnavailable, match="shutting down"):
        state.require_ready()


def test_loading() -> None:
    state = ServerState(ServerConfig(), Metrics())
    for require in (state.require_ready, state.loaded_model):
        with pytest.raises(EngineUnavailable, match="loading"):
            require()


def test_series_of_the_model_carry_its_first_name(make_state: Any) -> None:
    text = make_state(served_model_name=("a", "b")).metrics.render()[0].decode()
    assert 'bezel_kv_pages_capacity{kind="local",model_name="a"} 10.0' in text
