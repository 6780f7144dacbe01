"""The server, as its connections see it."""

from collections.abc import Coroutine
from typing import Any, Protocol

from reinforce.serving.http import Head, Reply, Request


class Host(Protocol):
    """Admits heads, routes requests, keeps count."""

    connections: set[Any]

    def admit(self, head: Head) -> int:
        """The length of the body that is to come. Raises HttpError."""

    def route(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        """The answer, or a way to it. Raises HttpError."""

    def hold(self, size: int) -> None:
        """A connection holds so many bytes more, or less. Raises HttpError."""

    def replied(self, status: int) -> bool:
        """A reply goes out; whether its connection may be kept."""
