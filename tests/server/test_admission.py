"""Places and room: who is let in, who is told to come back, and when."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bezel.engine.config import EngineConfig
from bezel.engine.errors import ConfigError, Overloaded
from bezel.engine.messages import FinishReason
from bezel.server.admission import Admission
from bezel.server.app import create_app
from bezel.server.config import ServerConfig

CHAT = "/v1/chat/completions"


class Clock:
    """Time that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rejections() -> Counter[str]:
    return Counter()


@pytest.fixture
def admission(clock: Clock, rejections: Counter[str]) -> Callable[..., Admission]:
    def make(is_shared: bool = False, per_key: int | None = None, **engine: int) -> Admission:
        config = ServerConfig(
            engine=EngineConfig(**({"max_num_seqs": 2, "max_num_queued_reqs": 8} | engine)),
            max_num_reqs_per_key=per_key,
        )

        def count(limit: str) -> None:
            rejections[limit] += 1

        return Admission(config, is_shared, count, clock)

    return make


@pytest.fixture
def fill() -> Iterator[Callable[..., list[Any]]]:
    """Let in so many requests of one sequence; those who were, until the test ends."""
    stays = []

    def enter(admission: Admission, tenant: str, num: int, num_tokens: int = 1) -> list[Any]:
        tickets = []
        for _ in range(num):
            entering = admission.admitted(tenant, [[1] * num_tokens])
            try:
                entering.__enter__()
            except Overloaded:
                break
            tickets.append(entering)
        stays.append(tickets)
        return tickets

    yield enter
    stays.clear()


def refusal(admission: Admission, tenant: str = "", *prompts: list[int]) -> Overloaded:
    with (
        pytest.raises(Overloaded) as caught,
        admission.admitted(tenant, list(prompts) or [[1]]),
    ):
        pytest.fail("must not be let in")
    return caught.value


def test_places_are_for_those_that_run_and_those_that_wait(
    admission: Any, fill: Any, rejections: Any
) -> None:
    places = admission()
    tickets = fill(places, "", 20)
    assert len(tickets) == 10
    assert refusal(places).code == "slow_down"
    assert rejections == {"max_num_queued_reqs": 2}
    tickets[0].__exit__(None, None, None)
    assert len(fill(places, "", 20)) == 1


def test_a_request_is_let_in_as_a_whole_or_not_at_all(admission: Any, fill: Any) -> None:
    places = admission()
    fill(places, "", 8)
    refusal(places, "", [1], [2], [3])
    assert places.places.num_taken == 8
    with places.admitted("", [[1], [2]]) as ticket:
        assert places.places.num_taken == 10
        ticket.ended(0)
        ticket.ended(0)
        assert places.places.num_taken == 9
    assert places.places.num_taken == 8
    assert places.waiting_tokens.num_taken == 8


def test_tokens_wait_until_their_answer_begins(admission: Any, rejections: Any) -> None:
    room = admission(max_num_queued_tokens=100)
    with room.admitted("", [[1] * 60]) as ticket:
        with pytest.raises(Overloaded, match="tokens"), room.admitted("", [[1] * 41]):
            pytest.fail("must not be let in")
        with room.admitted("", [[1] * 40]):
            pass
        ticket.began(0)
        assert room.waiting_tokens.num_taken == 0
        with room.admitted("", [[1] * 100]):
            pass
    assert room.waiting_tokens.num_taken == room.places.num_taken == 0
    assert rejections == {"max_num_queued_tokens": 1}


def test_choices_have_their_prompt_in_common(admission: Any) -> None:
    room = admission(max_num_queued_tokens=100)
    prompt, other = [1] * 50, [1] * 50
    with room.admitted("", [prompt, prompt, other]) as ticket:
        assert room.waiting_tokens.num_taken == 100
        ticket.began(1)
        ticket.began(0)
        assert room.waiting_tokens.num_taken == 50


def test_nobody_else_waits_for_a_prompt_longer_than_the_room(admission: Any, fill: Any) -> None:
    room = admission(max_num_queued_tokens=10)
    with room.admitted("", [[1] * 1000]):
        refusal(room, "", [1])
    fill(room, "", 1)
    refusal(room, "", [1] * 1000)


def test_one_key_leaves_something_for_the_others(admission: Any, fill: Any) -> None:
    places = admission(is_shared=True, max_num_seqs=50, max_num_queued_reqs=50)
    assert len(fill(places, "greedy", 100)) == 80
    assert refusal(places, "greedy").code == "rate_limit_exceeded"
    # Of the 20 that are left: 4 × 4 and 4 remain.
    assert len(fill(places, "second", 100)) == 16
    assert len(fill(places, "third", 100)) == 3
    assert len(fill(places, "late", 1)) == 1
    # A lone user, or one of a server without keys, may have it all.
    assert len(fill(admission(max_num_seqs=50, max_num_queued_reqs=50), "", 200)) == 100


def test_tokens_are_shared_among_keys_too(admission: Any, fill: Any) -> None:
    room = admission(is_shared=True, max_num_queued_tokens=100)
    assert len(fill(room, "greedy", 100, num_tokens=20)) == 4
    assert refusal(room, "greedy", [1] * 20).code == "rate_limit_exceeded"
    assert len(fill(room, "other", 1, num_tokens=20)) == 1


def test_a_fixed_number_of_requests_a_key(admission: Any, fill: Any) -> None:
    places = admission(is_shared=True, per_key=3)
    assert len(fill(places, "a", 10)) == 3
    # One request of many choices could otherwise never be.
    with places.admitted("b", [[1]] * 4):
        refusal(places, "b")
    # Without keys there is nobody to count for.
    assert len(fill(admission(per_key=3), "", 20)) == 10
    with pytest.raises(ConfigError, match="max_num_reqs_per_key"):
        ServerConfig(max_num_reqs_per_key=0)


def test_when_to_come_back_follows_from_how_fast_others_leave(
    admission: Any, fill: Any, clock: Clock
) -> None:
    places = admission()
    tickets = fill(places, "", 10)
    assert refusal(places).retry_after_s == 10, "nobody knows yet"
    for ticket in tickets[:4]:
        ticket.__exit__(None, None, None)
        clock.now += 3.0
    fill(places, "", 4)
    # 4 in 12 s, and 8 wait beside the 2 that run.
    error = refusal(places)
    assert error.retry_after_s == 24
    assert error.message == "The server's queue is full. Try again in 24 s."
    clock.now += 30
    assert refusal(places).retry_after_s == 60, "it never says more"
    clock.now += 31
    assert refusal(places).retry_after_s == 10, "what was long ago says nothing"
    for ticket in tickets[4:]:
        ticket.__exit__(None, None, None)
    fill(places, "", 6)
    assert refusal(places).retry_after_s == 1, "nor less than a second"


def test_a_key_is_told_of_its_own_speed(admission: Any, fill: Any, clock: Clock) -> None:
    places = admission(is_shared=True, per_key=2)
    fast, slow = fill(places, "fast", 2), fill(places, "slow", 2)
    fast[0].__exit__(None, None, None)
    clock.now += 1
    slow[0].__exit__(None, None, None)
    clock.now += 1
    for _ in range(3):
        with places.admitted("fast", [[1]]):
            pass
    fill(places, "fast", 1)
    fill(places, "slow", 1)
    clock.now += 9
    assert refusal(places, "fast").retry_after_s == 6  # 2 ahead, 4 in 11 s
    assert refusal(places, "slow").retry_after_s == 20  # 2 ahead, 1 in 10 s


@pytest.mark.anyio
async def test_over_http(make_state: Any, client_for: Any, engine: Any, chat: Any) -> None:
    rest = asyncio.Event()
    engine.script = [[65], rest, FinishReason.LENGTH]
    engine_config = EngineConfig(max_num_seqs=1, max_num_queued_reqs=1)
    state = make_state(engine=engine_config)
    async with client_for(create_app(state)) as client:
        waiting = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(2)]
        while len(engine.requests) < 2:
            await asyncio.sleep(0)
        refused = await client.post(CHAT, json=chat())
        # Nothing but the generating routes is refused.
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
        # Its body isn't even looked at.
        assert (await client.post(CHAT, content=b"{")).status_code == 429
        rest.set()
        assert [(await task).status_code for task in waiting] == [200, 200]
        assert (await client.post(CHAT, json=chat())).status_code == 200
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "10"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "slow_down")
    assert state.admission.places.num_taken == 0


@pytest.mark.anyio
async def test_tokens_over_http(make_state: Any, client_for: Any, engine: Any, chat: Any) -> None:
    begin = asyncio.Event()
    engine.script = [begin, [65], FinishReason.LENGTH]
    state = make_state(engine=EngineConfig(max_num_queued_tokens=30))
    async with client_for(create_app(state)) as client:
        # Each prompt has 19 tokens.
        waiting = asyncio.create_task(client.post(CHAT, json=chat()))
        while not engine.requests:
            await asyncio.sleep(0)
        assert len(engine.requests[0][0]) == 19
        refused = await client.post(CHAT, json=chat())
        assert refused.status_code == 429
        assert "tokens" in refused.json()["error"]["message"]
        begin.set()
        assert (await waiting).status_code == 200
        assert (await client.post(CHAT, json=chat())).status_code == 200


@pytest.mark.anyio
async def test_keys_over_http(make_state: Any, client_for: Any, engine: Any, chat: Any) -> None:
    rest = asyncio.Event()
    engine.script = [[65], rest, FinishReason.LENGTH]
    app = create_app(make_state(api_key=("one", "two"), max_num_reqs_per_key=1))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with client_for(app) as client:
        waiting = asyncio.create_task(client.post(CHAT, json=chat(), headers=one))
        while not engine.requests:
            await asyncio.sleep(0)
        refused = await client.post(CHAT, json=chat(), headers=one)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        rest.set()
        assert (await client.post(CHAT, json=chat(), headers=two)).status_code == 200
        assert (await waiting).status_code == 200
