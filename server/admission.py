"""Who is let in: places to run or wait in, and room for the prompts that wait.

Both are shared among the tenants (API keys; without keys all are one). The last fifth of either is
kept from a tenant that has all the rest: what it may have is four times what is left over then, so
that two greedy ones get four ninths each and whoever else comes still finds room (the dynamic
threshold of Choudhury & Hahne 1998, "Dynamic queue length thresholds for shared-memory packet
switches").

A request is let in as a whole or not at all. Everything here belongs to the event loop's thread.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from starlette.types import ASGIApp, Receive, Scope, Send

from bezel.engine.errors import Overloaded
from bezel.engine.metric_families import Rejection
from bezel.server.auth import tenant as current_tenant
from bezel.server.config import ServerConfig
from bezel.server.errors import error_response

_SHARE_OF_THE_REST = 4
# What leaves within such a time says how fast things go.
_RECENT_S = 60.0
_MIN_RETRY_AFTER_S, _MAX_RETRY_AFTER_S = 1, 60
# Nothing has left lately, so nobody knows.
_UNKNOWN_RETRY_AFTER_S = 10


class Share:
    """So much of one thing, and who has how much of it."""

    def __init__(self, capacity: int, is_shared: bool) -> None:
        self.capacity = capacity
        self._is_shared = is_shared
        self._taken: Counter[str] = Counter()
        self.num_taken = 0

    def has_room(self, amount: int) -> bool:
        """Whether there is so much; where nothing is taken there always is."""
        return not self.num_taken or self.num_taken + amount <= self.capacity

    def is_fair(self, tenant: str, amount: int) -> bool:
        """Whether a tenant may have so much more while others may want some."""
        own = self._taken[tenant]
        if not self._is_shared or not own:
            return True
        left = self.capacity - self.num_taken - amount
        return own + amount <= _SHARE_OF_THE_REST * left

    def taken_by(self, tenant: str) -> int:
        return self._taken[tenant]

    def take(self, tenant: str, amount: int) -> None:
        """Take, or give back if `amount` is negative."""
        self._taken[tenant] += amount
        self.num_taken += amount
        if not self._taken[tenant]:
            del self._taken[tenant]


class Departures:
    """How fast places become free."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=1024)

    def add(self) -> None:
        self._times.append(self._clock())

    def retry_after_s(self, num_ahead: int) -> int:
        """Whole seconds until so many have left, if they go on leaving as of late."""
        now = self._clock()
        while self._times and self._times[0] < now - _RECENT_S:
            self._times.popleft()
        if not self._times:
            return _UNKNOWN_RETRY_AFTER_S
        seconds = max(1, num_ahead) * (now - self._times[0]) / len(self._times)
        return min(max(math.ceil(seconds), _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)


class Ticket:
    """The places of one request, given back as its sequences end."""

    def __init__(self, admission: "Admission", tenant: str, prompts: Sequence[list[int]]) -> None:
        self._admission = admission
        self._tenant = tenant
        self._prompts = prompts
        self._unfinished = set(range(len(prompts)))
        # Choices of one prompt have it in common, and it is computed once.
        self._waiting = {id(prompt): len(prompt) for prompt in prompts}

    @property
    def num_waiting_tokens(self) -> int:
        return sum(self._waiting.values())

    def began(self, index: int) -> None:
        """The sequence `index` has its first token; its prompt waits no longer."""
        num_tokens = self._waiting.pop(id(self._prompts[index]), 0)
        if num_tokens:
            self._admission.waiting_tokens.take(self._tenant, -num_tokens)

    def ended(self, index: int) -> None:
        """The sequence `index` has ended, however it did; nothing happens the second time."""
        if index not in self._unfinished:
            return
        self._unfinished.discard(index)
        self.began(index)
        self._admission.leave(self._tenant)

    def close(self) -> None:
        """End what hasn't."""
        for index in list(self._unfinished):
            self.ended(index)


class Admission:
    """Places and room, and who has them."""

    def __init__(
        self,
        config: ServerConfig,
        is_shared: bool,
        on_rejection: Callable[[Rejection], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        engine = config.engine
        self._on_rejection = on_rejection
        self._clock = clock
        self._max_running = engine.max_num_seqs
        self._max_per_key = config.max_num_reqs_per_key
        self.places = Share(engine.max_num_seqs + engine.max_num_queued_reqs, is_shared)
        self.waiting_tokens = Share(engine.max_num_queued_tokens, is_shared)
        self._departures = Departures(clock)
        self._departures_of: dict[str, Departures] = {}

    def check(self, tenant: str, num_sequences: int = 1, num_tokens: int = 1) -> None:
        """Refuse what there is no place for.

        Raises:
            Overloaded: with the time after which there probably will be one.
        """
        if not self.places.has_room(num_sequences):
            self._refuse(Rejection.MAX_NUM_QUEUED_REQS, "The server's queue is full.")
        if not self.waiting_tokens.has_room(num_tokens):
            self._refuse(
                Rejection.MAX_NUM_QUEUED_TOKENS, "The prompts that wait have too many tokens."
            )
        own = self.places.taken_by(tenant)
        limit = self._max_per_key if tenant else None
        if (limit and own and own + num_sequences > limit) or not self.places.is_fair(
            tenant, num_sequences
        ):
            self._refuse(
                Rejection.MAX_NUM_QUEUED_REQS, "This API key's share of the queue is full.", tenant
            )
        if not self.waiting_tokens.is_fair(tenant, num_tokens):
            self._refuse(
                Rejection.MAX_NUM_QUEUED_TOKENS,
                "This API key's prompts that wait have too many tokens.",
                tenant,
            )

    @contextmanager
    def admitted(self, tenant: str, prompts: Sequence[list[int]]) -> Iterator[Ticket]:
        """Let a request with these prompts (token ids), one for each sequence, in for the block.

        Raises:
            Overloaded: there is no place.
        """
        ticket = Ticket(self, tenant, prompts)
        self.check(tenant, len(prompts), ticket.num_waiting_tokens)
        self.places.take(tenant, len(prompts))
        self.waiting_tokens.take(tenant, ticket.num_waiting_tokens)
        try:
            yield ticket
        finally:
            ticket.close()

    def leave(self, tenant: str) -> None:
        """Free the place of one sequence."""
        self.places.take(tenant, -1)
        self._departures.add()
        self._departures_of.setdefault(tenant, Departures(self._clock)).add()

    def _refuse(self, limit: Rejection, message: str, tenant: str | None = None) -> NoReturn:
        """Refuse for a limit of all, or of one tenant."""
        self._on_rejection(limit)
        if tenant is None:
            num_queued = self.places.num_taken - self._max_running
            seconds = self._departures.retry_after_s(num_queued)
            code = "slow_down"
        else:
            departures = self._departures_of.setdefault(tenant, Departures(self._clock))
            seconds = departures.retry_after_s(self.places.taken_by(tenant))
            code = "rate_limit_exceeded"
        raise Overloaded(f"{message} Try again in {seconds} s.", seconds, code)


class AdmissionGate:
    """Refuses requests that there is no place for before their bodies are read, as plain ASGI.

    Reading and tokenizing them would take the time that running ones need. What it lets in may
    still be refused: only a prompt tells its length.
    """

    def __init__(self, app: ASGIApp, admission: Admission, paths: frozenset[str]) -> None:
        self._app = app
        self._admission = admission
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            try:
                self._admission.check(current_tenant.get())
            except Overloaded as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
