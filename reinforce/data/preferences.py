"""Preference pairs in: one prompt with a chosen and a rejected reply, as dialogues or as messages.

    {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "rejected": "\\n\\nHuman: Hi\\n\\n..."}
    {"chosen": [{"role", "content"}, ...], "rejected": [...]}
    {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}

Each side is the whole conversation, or the end of it where "prompt" is its beginning; a text that
is no dialogue is one turn. HH-RLHF's
dialogues are text: a turn begins at a blank line, the speaker's name and a colon; "Human:" anywhere
else is text, and so is a speaker's name before a second turn of the same speaker. Real data has
pairs that teach nothing; they are counted by reason, never crashed on.
See "Training a Helpful and Harmless Assistant with RLHF", Bai et al. (2022, arXiv 2204.05862).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reinforce.data.records import BadLineError, columns, must_be_unicode, read_records
from reinforce.errors import ConfigError
from reinforce.text import is_chat

DIALOGUE = "\n\nHuman:"  # how HH-RLHF's text begins
ROLES = {"Human": "user", "Assistant": "assistant"}
Messages = list[dict[str, str]]
GREETING = 20  # characters that a reply may begin with as its prompt does: "Hi", say


@dataclass(frozen=True)
class Preference:
    """Two replies to one conversation, the better one first."""

    prompt: Messages  # ends with the user
    chosen: str
    rejected: str


class UnusablePairError(BadLineError):
    """A well-formed pair that holds no preference between two replies to one prompt."""


def parse_dialogue(text: str) -> Messages:
    r"""HH-RLHF's text as messages. Raises BadLineError.

    >>> parse_dialogue("\n\nHuman: Is 'Human: no' me?\n\nAssistant: No.")
    [{'role': 'user', 'content': "Is 'Human: no' me?"}, {'role': 'assistant', 'content': 'No.'}]
    """
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts or parts[0] != "Human":
        raise BadLineError(r'not a dialogue: it must begin with "\n\nHuman:"')
    messages: Messages = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            messages[-1]["content"] += f"\n\n{speaker}:{said.rstrip()}"
        else:
            messages.append({"role": ROLES[speaker], "content": said.strip()})
    return messages


def conversation(value: Any) -> Messages:
    """A dialogue's messages, from either form, ending with the assistant. Raises BadLineError."""
    messages = parse_dialogue(value) if isinstance(value, str) else value
    if not is_chat(messages) or messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise BadLineError("a dialogue must be messages that end with the assistant's reply")
    if all(m["role"] == "system" for m in messages[:-1]):
        raise BadLineError("a dialogue must hold something that the assistant replies to")
    return list(messages)


def words_of(messages: Messages) -> list[tuple[str, str]]:
    """Who says what, without space around it and whatever else a message may hold."""
    return [(m["role"], m["content"].strip()) for m in messages]


def side(record: dict[str, Any], key: str) -> Messages:
    """The whole conversation of one side of a pair, "chosen" or "rejected".

    Raises BadLineError, or UnusablePairError if nothing can be learned from it.
    """
    prompt, reply = record.get("prompt"), record[key]
    must_be_unicode(key, reply)
    must_be_unicode("prompt", prompt)
    if prompt is None:
        return conversation(reply)
    if is_chat(prompt) and is_chat(reply):
        if words_of(reply[: len(prompt)]) == words_of(prompt):  # the prompt once more
            return conversation(reply)
        if reply[0]["role"] in ("system", prompt[-1]["role"]):
            raise BadLineError(f'"{key}" neither begins with "prompt" nor goes on where it ends')
        return conversation([*prompt, *reply])
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(reply, str | list):
        raise BadLineError(f'"prompt" and "{key}" must be texts, or lists of {{"role", "content"}}')
    if isinstance(reply, str) and not reply.startswith(DIALOGUE):
        if prompt.startswith(DIALOGUE):
            return conversation(prompt + reply)
        if len(prompt) > GREETING and reply.strip().startswith(prompt.strip()):
            raise UnusablePairError('a reply that begins with its whole "prompt"')
        reply = [{"role": "assistant", "content": reply.strip()}]
    if isinstance(reply, list) and is_chat(reply) and reply[0]["role"] == "assistant":
        return conversation([{"role": "user", "content": prompt.strip()}, *reply])
    whole = conversation(reply)  # and its beginning once more as the prompt
    asked = [m["content"].strip() for m in whole[:-1] if m["role"] == "user"]
    if not any(text in prompt or prompt.strip() in text for text in asked if text):
        raise BadLineError(f'"prompt" is not in "{key}", which has a prompt of its own')
    return whole


def flaw_of_reply(messages: Messages) -> str | None:
    """Why the last message is no reply to learn from; None if it is one."""
    reply = messages[-1]["content"]
    if re.search(r"\n\n(Human|Assistant):", reply):
        return "a reply in two turns, so it is unclear where the prompt ends"
    return None if reply.strip() else "an empty reply"


def parse_pair(record: Any) -> Preference:
    """One record as a preference. Raises BadLineError, or UnusablePairError if useless."""
    if not isinstance(record, dict):
        raise BadLineError('not an object with "chosen" and "rejected"')
    if "chosen" not in record or "rejected" not in record:
        raise BadLineError(f'a pair needs "chosen" and "rejected"; {columns(record)}')
    chosen, rejected = side(record, "chosen"), side(record, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise UnusablePairError("replies to different prompts")
    for messages in (chosen, rejected):
        if flaw := flaw_of_reply(messages):
            raise UnusablePairError(flaw)
    if chosen[-1] == rejected[-1]:
        raise UnusablePairError("twice the same reply")
    return Preference(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def read_pairs(
    source: str, flag: str, skip_bad_lines: bool = False
) -> tuple[list[Preference], dict[str, int]]:
    """The usable pairs of a source, and a count by reason of what is odd or was left out.

    Raises ConfigError on malformed lines, unless they are skipped.
    """
    odd: Counter[str] = Counter()

    def check(record: Any) -> Preference | None:
        try:
            pair = parse_pair(record)
        except UnusablePairError as error:
            odd[f"left out, {error}"] += 1
            return None
        said = [pair.chosen, pair.rejected, *(m["content"] for m in pair.prompt)]
        if any(re.search(r"\b(Human|Assistant):", text) for text in said):
            odd["kept, a speaker's name inside a turn"] += 1
        return pair

    found, bad = read_records(source, flag, check, skip_bad_lines, "pairs")
    if bad:
        odd["left out, malformed"] = bad
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        raise ConfigError(f"{flag} {source}: no usable pairs in it ({dict(odd)})")
    return pairs, dict(odd)


def opening(pair: Preference) -> str:
    """What opens a conversation: its first message after the system's."""
    first = next(m["content"] for m in pair.prompt if m["role"] != "system")
    return " ".join(first.lower().split())


def split_by_opening(
    pairs: Sequence[Preference], share: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """Pairs to train on, and pairs held out, about `share` of all.

    Conversations that open alike are on the same side. The side is a function of the opening and
    the seed alone, so it is the same in every file.
    """
    train: list[Preference] = []
    held_out: list[Preference] = []
    for pair in pairs:
        digest = hashlib.blake2b(f"{seed}/{opening(pair)}".encode(), digest_size=8).digest()
        (held_out if int.from_bytes(digest, "big") < share * 2**64 else train).append(pair)
    return train, held_out
