"""From the bytes of a connection to its requests, one after the other. No sockets, no clock."""

from collections.abc import Callable

from reinforce.serving.http import MAX_HEAD, Head, HttpError, parse_head


class Reader:
    """Takes bytes in, gives whole requests out.

    `head` is that of the request that is on its way or being answered; `begun` is true from its
    first byte on.
    """

    def __init__(self, admit: Callable[[Head], int]) -> None:
        """`admit(head)` gives the length of the body that is to come, or raises HttpError."""
        self._admit, self._buffer, self._length = admit, bytearray(), 0
        self._answering = 0  # bytes of the body that is being answered
        self._may_be_empty = True  # the first line: some clients end a body with an empty one
        self.head: Head | None = None

    @property
    def ahead(self) -> int:
        """Bytes that no request has taken yet."""
        return len(self._buffer)

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return len(self._buffer) + self._answering

    @property
    def begun(self) -> bool:
        """A request is on its way."""
        return self.head is not None or len(self._buffer) > 0

    @property
    def awaits_go(self) -> bool:
        """The client sends its body only after a word from us (Expect: 100-continue)."""
        head = self.head
        waits = head is not None and head.minor == 1 and "expect" in head.fields
        return waits and len(self._buffer) < self._length

    def feed(self, data: bytes) -> None:
        """More bytes."""
        self._buffer += data

    def take_head(self) -> bool:
        """Whether the head is there. Raises HttpError; what follows must not be read then."""
        if self.head is None:
            if self._may_be_empty and self._buffer.startswith(b"\r\n"):
                self._may_be_empty = False
                del self._buffer[:2]
            end = self._buffer.find(b"\r\n\r\n", 0, MAX_HEAD)
            if end < 0 and len(self._buffer) >= MAX_HEAD:
                raise HttpError(431, "head_too_large", f"at most {MAX_HEAD} bytes of headers")
            if end < 0:
                return False
            head = parse_head(bytes(self._buffer[:end]))
            del self._buffer[: end + 4]
            self._length = self._admit(head)
            self.head = head
        return True

    def take_body(self) -> bytes | None:
        """The body once it is there to its end."""
        if len(self._buffer) < self._length:
            return None
        body = bytes(self._buffer[: self._length])
        del self._buffer[: self._length]
        self._answering = self._length
        return body

    def answered(self) -> None:
        """The next request may begin."""
        self.head, self._length, self._answering, self._may_be_empty = None, 0, 0, True

    def close(self) -> None:
        """Forget what was not read."""
        self._buffer.clear()
        self.answered()
