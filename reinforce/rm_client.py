"""Rewards over HTTP, validated: exactly one finite number per response, or an exception.

A reward is never invented. What another try can cure (a refused or cut connection, a time-out,
408, 429, 502, 503, 504) is tried again, with growing pauses, until a total deadline. Everything
else raises at once (refused.py may then leave the text out). Scoring is a pure function of the
text, so trying again is safe.
"""

import http.client
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from reinforce.errors import ConfigError, RetryError
from reinforce.rm_connection import (
    GLANCE,
    LATE,
    RETRIED,
    Connection,
    Reply,
    RewardError,
    TryAgainError,
    url_of,
)
from reinforce.rm_reply import (
    ServerInfo,
    index_of,
    message_of,
    parse_info,
    rewards_of,
    truncated_of,
)

# the server's word on a text: asking again would bring it again
REFUSED = (400, 413, 422, 500, 507)
PROBE = "hello"
MOST_PAUSE = 4.0  # seconds
MOST_ASKED = 20.0  # seconds of a Retry-After


class ForeignServiceError(RewardError):
    """Something else than a reward server listens there."""


class RefusedError(RewardError):
    """The server refuses a text.

    `index` is its number in the request, None if the server does not say which.
    """

    def __init__(self, message: str, index: int | None = None, too_large: bool = False) -> None:
        """`message` is for the user; `too_large`: fewer texts at a time may pass."""
        super().__init__(message)
        self.index, self.too_large = index, too_large

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.index)  # another rank's is raised here, too


def pause_before(tries: int, asked: float) -> float:
    """Seconds until the next try: what the server asks for and up to half more, else growing ones.

    The jitter spreads clients that were all refused at once. The cap lets a run go on within 5 s
    of a server's return.
    """
    if asked:
        return min(MOST_ASKED, asked) * random.uniform(1.0, 1.5)
    return min(MOST_PAUSE, 0.25 * 2.0 ** min(tries, 8)) * random.uniform(0.5, 1.0)


class RewardClient:
    """One keep-alive connection to a reward server."""

    def __init__(
        self,
        host: str,
        port: int,
        token: str | None = None,
        fingerprint: str | None = None,
        timeout: float = 60.0,
        deadline: float = 300.0,
    ) -> None:
        """`timeout` is for one try, `deadline` for all tries until one is answered, in seconds."""
        self.url = url_of(host, port)
        self._fingerprint, self._timeout, self._deadline = fingerprint, timeout, deadline
        self._connection = Connection(host, port, token, self._check_same_model)
        self._info: ServerInfo | None = None
        self._max_body = ServerInfo.max_body
        self._most = sys.maxsize  # texts of a request, half of one that was too late
        self._end: float | None = None  # of the tries since the last answer
        self._requests = 0
        self.truncated = 0  # texts that the server has cut so far

    @property
    def stopped(self) -> Callable[[], bool]:
        """Whether the run is to stop: then no request is tried again, and none waits long."""
        return self._connection.stopped

    @stopped.setter
    def stopped(self, stopped: Callable[[], bool]) -> None:
        self._connection.stopped = stopped

    @property
    def fingerprint(self) -> str | None:
        """Of the reward model that is pinned; None if the server shows none."""
        return self._fingerprint

    def connect(self, wait: float = 0.0) -> ServerInfo:
        """Find the server within `wait` seconds (0: one try) and pin its fingerprint.

        Raises ConfigError if nobody answers and wait is 0, or a foreign service does. Raises
        RetryError after a wait in vain.
        """
        end, said = time.monotonic() + wait, time.monotonic()
        while True:
            try:
                self._info = self._handshake()
                self._max_body = self._info.max_body
                self._connection.trust()
                return self._info
            except ForeignServiceError as error:
                raise ConfigError(
                    f"--rm-host/--rm-port: {self.url} is not a reward server ({error})"
                ) from error
            except TryAgainError as error:
                if wait <= 0:
                    raise ConfigError(
                        f"--rm-host/--rm-port: no reward server at {self.url} ({error}); "
                        "start one with serve_rm.py, or give it time with --rm-wait SECONDS"
                    ) from error
                if time.monotonic() > end:
                    raise RetryError(
                        f"no reward server at {self.url} within {wait:g} s ({error})"
                    ) from error
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    print(
                        f"waiting for the reward server at {self.url} ({error})",
                        file=sys.stderr,
                        flush=True,
                    )
                time.sleep(0.2)

    def rewards(
        self,
        query: Sequence[str] | None = None,
        messages: Sequence[list[dict[str, str]]] | None = None,
        prompts: Sequence[str] | None = None,
        labels: Sequence[Any] | None = None,
        finished: Sequence[bool] | None = None,
        completions: Sequence[str] | None = None,
    ) -> list[float]:
        """One reward per text, in order; requests are split to the server's limits.

        Exactly one of `query` (prompt and response as one text) and `messages` (the last one is
        the response). Raises RewardError or RetryError.
        """
        if (query is None) == (messages is None):
            raise ValueError("exactly one of query and messages")
        info = self._info or self.connect()
        columns = {
            "query": query,
            "messages": messages,
            "prompts": prompts,
            "labels": labels,
            "finished": finished,
            "completions": completions,
        }
        given = {name: list(column) for name, column in columns.items() if column is not None}
        count = len(next(iter(given.values())))
        if any(len(column) != count for column in given.values()):
            raise ValueError(
                f"columns of different lengths: { {n: len(c) for n, c in given.items()} }"
            )
        rewards: list[float] = []
        for start in range(0, count, info.max_texts):
            rewards += self._split(
                {name: column[start : start + info.max_texts] for name, column in given.items()},
                start,
            )
        return rewards

    def _split(self, columns: dict[str, list[Any]], start: int) -> list[float]:
        """Rewards of a part of a request, split into as many as the server's `max_body` asks for.

        The number of the part's first text is `start`.
        """
        count, most = len(next(iter(columns.values()))), self._max_body
        size = len(json.dumps(columns)) + 100  # and an id
        if size > most and count == 1:
            raise RefusedError(f"a request of {size} bytes, and {self.url} takes {most}", start)
        if size > most or count > self._most:
            return self._halves(columns, start)
        try:
            return self._score(columns)
        except RefusedError as error:
            if error.too_large and error.index is None and count > 1:
                return self._halves(columns, start)
            at = 0 if count == 1 else error.index
            raise RefusedError(str(error), None if at is None else start + at) from error

    def _halves(self, columns: dict[str, list[Any]], start: int) -> list[float]:
        middle = len(next(iter(columns.values()))) // 2
        first, second = (
            {name: column[part] for name, column in columns.items()}
            for part in (slice(middle), slice(middle, None))
        )
        return self._split(first, start) + self._split(second, start + middle)

    def _score(self, columns: dict[str, list[Any]]) -> list[float]:
        self._requests += 1
        expected = len(columns.get("query") or columns.get("messages") or [])
        request_id = f"{id(self):x}-{self._requests}"
        request = {**columns, "id": request_id}
        end, tries = self._end or time.monotonic() + self._deadline, 0
        while True:
            try:
                reply = self._call("POST", "/get_reward", request, end)
                self._end = None
                return self._validate(reply, request_id, expected)
            except TryAgainError as error:
                self._end = end
                pause = pause_before(tries, error.pause)
                tries += 1
                if self._info is not None and expected > self._info.max_texts:
                    said = f"{self.url} was restarted and takes fewer texts"
                    raise RefusedError(said, too_large=True) from error
                self._must_go_on(error)
                if error.late and expected > 1:  # of too many texts, or behind too many others
                    self._most = expected // 2
                    said = f"{self.url} does not answer {expected} texts in time"
                    raise RefusedError(said, too_large=True) from error
                if time.monotonic() + pause > end:
                    self._end = None
                    raise RetryError(
                        f"reward server {self.url} gave no usable answer "
                        f"within {self._deadline:g} s ({error})"
                    ) from error
                self._rest(pause)
                self._must_go_on(error)
            except RewardError:
                self._end = None  # a refusal is an answer
                raise

    def _must_go_on(self, error: Exception) -> None:
        """Raise RetryError if the run is to stop, since its finished steps are not saved yet."""
        if self.stopped():
            raise RetryError(
                f"stopped while reward server {self.url} gave no usable answer ({error})"
            ) from error

    def _rest(self, seconds: float) -> None:
        """Sleep, until the run is to stop at most."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stopped():
            time.sleep(min(left, GLANCE))

    def _handshake(self) -> ServerInfo:
        end = time.monotonic() + min(self._timeout, 10.0)
        self._connection.keep_alive = True
        try:
            try:
                reply = self._exchange("GET", "/info", None, end)
            except RewardError as error:  # in chunks, say
                raise ForeignServiceError(str(error)) from error
            status, kind = reply.status, reply.kind
            if status == 503:
                raise TryAgainError("503, not ready")
            if status == 401:
                raise ConfigError(
                    f"reward server {self.url} wants a token: set RM_TOKEN or RM_TOKEN_FILE"
                )
            if status == 200 and kind == "application/json":
                info = parse_info(reply.body)
                if info is not None:
                    return self._pin(info)
            return self._probe(status, kind, end)
        except http.client.HTTPException as error:
            raise ForeignServiceError(f"it does not speak HTTP: {error!r}") from error

    def _probe(self, status: int, kind: str, end: float) -> ServerInfo:
        """No /info: another project's reward server answers a probe text, anything else not."""
        foreign = f"/info answered {status} {ascii(kind[:60])[1:-1] or 'without a type'}"
        if self._fingerprint is not None:
            raise ConfigError(
                f"--rm-fingerprint: {self.url} has no /info, so it cannot be checked ({foreign})"
            )
        # nothing says which request a reply is of but the connection that it comes on
        self._connection.keep_alive = False
        try:
            reply = self._call("POST", "/get_reward", {"query": [PROBE], "prompts": [PROBE]}, end)
            self._validate(reply, None, 1)
        except RewardError as error:
            raise ForeignServiceError(f"{foreign}, and a probe text: {error}") from error
        print(
            f"reward server {self.url} has no /info: its model is not pinned",
            file=sys.stderr,
            flush=True,
        )
        return ServerInfo()

    def _pin(self, info: ServerInfo) -> ServerInfo:
        if self._fingerprint is not None and info.fingerprint != self._fingerprint:
            detail = f"{info.fingerprint!r:.80} instead of {self._fingerprint}"
            if self._info is None:
                raise ConfigError(
                    f"--rm-fingerprint: {self.url} serves another reward model ({detail})"
                )
            raise RewardError(f"reward server {self.url} now serves another model ({detail})")
        self._fingerprint = info.fingerprint
        return info

    def _check_same_model(self, limit: float) -> None:
        """Behind a new connection there may be a restarted server, with another model."""
        if self._info is None or self._info.fingerprint is None:
            return
        reply = self._exchange("GET", "/info", None, limit)
        if reply.status in RETRIED:
            raise TryAgainError(f"HTTP {reply.status}", reply.pause)
        info = (
            parse_info(reply.body)
            if reply.status == 200 and reply.kind == "application/json"
            else None
        )
        if info is None:
            raise RewardError(
                f"reward server {self.url} no longer shows which model it serves "
                f"(/info: HTTP {reply.status})"
            )
        self._info = self._pin(info)
        self._max_body = info.max_body

    def _call(self, method: str, path: str, payload: Any, end: float) -> Any:
        """One request and its JSON reply. Raises TryAgainError or RewardError."""
        try:
            reply = self._exchange(method, path, payload, end)
        except http.client.HTTPException as error:
            raise TryAgainError(f"not an HTTP reply ({type(error).__name__})") from error
        if reply.status in RETRIED:
            raise TryAgainError(f"HTTP {reply.status}", reply.pause, reply.status in LATE)
        if reply.status != 200:
            said = f"{self.url}{path} answered HTTP {reply.status}: {message_of(reply.body)}"
            if reply.status in REFUSED and path == "/get_reward":
                texts = payload.get("query") or payload.get("messages") or []
                raise RefusedError(said, index_of(reply.body, len(texts)), reply.status == 413)
            raise RewardError(said)
        if reply.kind != "application/json":
            raise RewardError(
                f"{self.url}{path} answered {reply.kind[:60]!r}, not application/json"
            )
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError) as error:
            raise TryAgainError("the reply is cut short or not JSON") from error

    def _exchange(self, method: str, path: str, payload: Any, end: float) -> Reply:
        """One exchange within the time of one try."""
        return self._connection.exchange(
            method, path, payload, min(end, time.monotonic() + self._timeout)
        )

    def _validate(self, reply: Any, request_id: str | None, expected: int) -> list[float]:
        """The rewards of a reply, if it is exactly what was asked for. Raises RewardError."""
        rewards = rewards_of(reply, self.url, expected, request_id, self._fingerprint)
        cut = truncated_of(reply)
        if cut and not self.truncated:
            warning = f"reward server {self.url} cuts texts that are longer than its --max-length"
            print(warning, file=sys.stderr, flush=True)
        self.truncated += cut
        return rewards
