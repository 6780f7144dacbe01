"""The ways in which a run ends early on purpose, each with one sentence.

Any other exception is a bug, and ends with exit code 1 and its traceback.
"""


class ConfigError(Exception):
    """Your configuration or input: one sentence that names the flag and the fix. Exit code 2."""


class RetryError(Exception):
    """Not your fault and maybe gone next time: run the same command again. Exit code 75."""


class StoppedError(BaseException):
    """A signal, before there was anything to save. Exit code 75.

    No Exception: it may come in the middle of a library's call, whose errors mean something else.
    """


class FailedError(Exception):
    """Another try would not help: a wrong answer of the reward server, say. Exit code 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, its type if it has none: libraries write paragraphs."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().removesuffix(":")
