"""Standard output and error of a run that outlives its reader: a pipe or terminal that has closed.

Ctrl-C under `| tee log` ends tee as well, and what is written from then on must not end the run
before it has saved.
"""

import io
import os
from typing import Any


class _Unheard(io.FileIO):
    """A file whose lost writes are no errors."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def unheard(stream: Any) -> Any:
    """A text stream like this one, that raises neither where nobody reads nor for its encoding.

    What the encoding lacks is escaped. A stream that is no file, a test's say, stays itself.
    """
    if stream is None:  # closed before Python started
        return open(os.devnull, "w")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is no buffer between
    if not isinstance(raw, io.FileIO):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Unheard(raw.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,  # standard error
        write_through=stream.write_through,
    )
