"""The last tokens of a text, at a cost that the text cannot choose.

A tokenizer takes seconds for a million tokens, of which a model reads the last few thousand. So the
text is cut first, to as many characters as its last tokens may need; where they needed more, more
are taken.
"""

from collections.abc import Callable
from dataclasses import replace

from reinforce.serving.protocol import Text

CHARACTERS = 16  # a token, at first
OPENING = 32  # characters, more than a begin token has


def last_tokens(
    text: Text, longest: int, ids_of: Callable[[Text], list[int]], begin: frozenset[int]
) -> tuple[list[int], bool]:
    """Ids of the last `longest` tokens, and whether there were more. Raises ValueError for none.

    The beginning is cut since the response is at the end; a first token out of `begin` stays.
    """
    most = CHARACTERS * longest
    while True:
        part = last_characters(text, most)
        ids = ids_of(part)
        if len(ids) > longest:
            opening = ids if part is text else ids_of(first_characters(text, part))
            first = opening[:1] if opening and opening[0] in begin and longest > 1 else []
            return first + ids[len(first) - longest :], True
        if part is text:
            break
        most *= 4
    if not ids:
        raise ValueError("an empty text")
    return ids, False


def first_characters(text: Text, part: Text) -> Text:
    """What begins with the same token as the text, whose end is `part`.

    A conversation's first token is its template's, so that of its end is the same.
    """
    return part if text.query is None else replace(text, query=text.query[:OPENING])


def last_characters(text: Text, most: int) -> Text:
    """The text itself if it has at most so many characters, else one that has lost its beginning.

    >>> last_characters(Text("a long query", None, None, None, None, True), 5).query
    'query'
    """
    if text.messages is None:
        query = text.query or ""
        return text if len(query) <= most else replace(text, query=query[-most:])
    if sum(len(message["content"]) for message in text.messages) <= most:
        return text
    messages = []
    for message in reversed(text.messages):
        content = message["content"]
        messages.append({**message, "content": content[max(0, len(content) - most) :]})
        most = max(0, most - len(content))
    return replace(text, messages=messages[::-1])
