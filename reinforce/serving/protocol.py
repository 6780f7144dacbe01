"""A request for rewards: from JSON to texts, or to the one error that it deserves.

    {"query": [text, ...]}  or  {"messages": [[{"role", "content"}, ...], ...]}
    with "prompts", "completions", "labels", "finished"

The wire format is OpenRLHF's `--remote_rm_url`; every optional column is as long as the texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reinforce.serving.http import HttpError
from reinforce.text import is_chat

MAX_TEXTS = 1024  # of one request; /info asks for fewer, so that a slow model answers in time


@dataclass(frozen=True)
class Text:
    """One text of a request."""

    query: str | None
    messages: list[dict[str, str]] | None
    prompt: str | None
    completion: str | None
    label: Any
    finished: bool


def parse_request(request: Any) -> list[Text]:
    """The texts of a request. Raises HttpError 400 (shape), 413 (too many), 422 (no text)."""
    if not isinstance(request, dict) or ("query" in request) == ("messages" in request):
        raise HttpError(400, "bad_request", 'an object with exactly one of "query" and "messages"')
    key = "query" if "query" in request else "messages"
    items = request[key]
    if not isinstance(items, list):
        raise HttpError(400, "bad_request", f'"{key}" must be a list')
    if len(items) > MAX_TEXTS:
        raise HttpError(413, "too_many", f"at most {MAX_TEXTS} texts a request")
    shaped = _is_text if key == "query" else is_chat
    for index, item in enumerate(items):
        if not shaped(item):
            raise HttpError(400, "bad_request", f'"{key}" holds something of another shape', index)
        for text in [item] if key == "query" else [m["content"] for m in item]:
            if not _encodable(text):
                raise HttpError(422, "bad_text", "a lone surrogate is not text", index)
    columns = {
        name: _column(request, name, len(items))
        for name in ("prompts", "completions", "labels", "finished")
    }
    return [
        Text(
            item if key == "query" else None,
            item if key == "messages" else None,
            prompt,
            completion,
            label,
            finished is not False,
        )
        for item, prompt, completion, label, finished in zip(items, *columns.values(), strict=True)
    ]


def _column(request: dict[str, Any], name: str, count: int) -> Sequence[Any]:
    values = request.get(name)
    if values is None:
        return [None] * count
    kind = {"prompts": str, "completions": str, "finished": bool}.get(name, object)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(v, kind) for v in values)
    ):
        raise HttpError(
            400, "bad_request", f'"{name}" must be a list of {count} values, as long as the texts'
        )
    for index, value in enumerate(values):
        if kind is str and not _encodable(value):
            raise HttpError(422, "bad_text", "a lone surrogate is not text", index)
    return values


def _is_text(item: Any) -> bool:
    return isinstance(item, str)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
