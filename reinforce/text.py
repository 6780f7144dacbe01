"""Text and tokens: a prompt, the text of its response, and the request to the reward server.

The reward model reads text that stands for exactly the sampled tokens: special tokens included, an
end token only where the response has one. Of a message it is the text without what the chat
template puts around it. Prompt and response are decoded together, since a tokenizer may drop the
space between them where it sees the response alone.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from reinforce.errors import ConfigError

if TYPE_CHECKING:  # the reward server reads texts without PyTorch
    from reinforce.rollout import Rollout

TEMPLATE = (  # HH-RLHF's own text, for tokenizers without a chat template
    "{{ bos_token }}{% for m in messages %}"
    "{{ '\\n\\nHuman: ' if m.role == 'user' "
    "else '\\n\\nAssistant: ' if m.role == 'assistant' else '\\n\\n' }}"
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Prompt:
    """One prompt, as text and as token ids."""

    index: int  # among the well-formed lines of its file, from 0; too long ones count
    text: str  # what the policy reads; messages in the chat template
    ids: tuple[int, ...]
    messages: list[dict[str, str]] | None = None  # None: the prompt came as text
    label: Any = None  # of the same line, for the reward


def is_chat(value: Any) -> bool:
    """Whether a value is a conversation: a list of {"role": str, "content": str}, not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in value
        )
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued.

    There is one begin token if the tokenizer uses one, and none is added to a text that starts
    with it. An end token that the tokenizer adds is taken away.
    """
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    if ids[-1:] != [end] or tokenizer.cls_token is not None:  # an encoder's text has its end
        return ids
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:-1] if ids[-len(plain) - 1 :] == [*plain, end] else ids


def render(
    tokenizer: Any,
    messages: list[dict[str, str]],
    where: str,
    date: str | None = None,
    **options: Any,
) -> str:
    """A conversation in the tokenizer's chat template.

    Some templates print the day, by `strftime_now`. With a `date`, YYYY-MM-DD, they print that day
    and not today, so that a prompt has the same tokens when a run goes on tomorrow. The tokenizer's
    own template stays as it is. `options` go to `apply_chat_template`. Raises ConfigError if the
    template refuses the conversation, and names `where` it is from.
    """
    if date is not None and "strftime_now" in str(tokenizer.chat_template):
        day = datetime.date.fromisoformat(date)
        options["chat_template"] = at_day(tokenizer.get_chat_template(), day)
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"{where}: the chat template refuses {messages!r:.200} ({error})"
        ) from error


def at_day(template: str, day: datetime.date) -> str:
    """A chat template whose `strftime_now` gives this day.

    A template takes no functions, so the day is a macro in the template's own language.

    >>> print(at_day("{{ strftime_now('%d %b') }}", datetime.date(2024, 7, 26))[-30:])
    {{ strftime_of_day('%d %b') }}
    """
    directives = [
        *(f"%-{letter}" for letter in "dmHIMSj"),
        *(f"%{letter}" for letter in "aAbBcdeDFGHIjmMpSTuUVwWxXyYZ"),
    ]
    filters = "".join(
        f" | replace({directive!r}, {day.strftime(directive)!r})" for directive in directives
    )
    macro = "{%- macro strftime_of_day(format) -%}{{ format" + filters + " }}{%- endmacro -%}"
    return macro + re.sub(r"\bstrftime_now(?=\s*\()", "strftime_of_day", template)


def decoded(
    tokenizer: Any, prompt: Sequence[int], response: Sequence[int], skip_special_tokens: bool
) -> str:
    """Text of a response, decoded together with its prompt."""
    options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    text: str = tokenizer.decode([*prompt, *response], **options)
    return text[len(tokenizer.decode(list(prompt), **options)) :]


def response_ids(rollout: "Rollout") -> list[list[int]]:
    """Token ids of each row's response, end token included."""
    return [
        row[:n] for row, n in zip(rollout.response.tolist(), rollout.length.tolist(), strict=True)
    ]


def gap_before_answer(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The white space that the chat template puts between its generation prompt and an answer.

    A model begins its response with it, and it is no part of the message: a reward model's own
    template will put it there.
    """
    answer = {"role": "assistant", "content": "answer"}
    try:
        before = render(tokenizer, messages, "a prompt", add_generation_prompt=True)
        whole = render(tokenizer, [*messages, answer], "a prompt")
    except ConfigError:
        return ""
    gap = whole.removeprefix(before).partition("answer")[0]
    return gap if whole.startswith(before) and gap.isspace() else ""


def reward_requests(
    tokenizer: Any, prompts: Sequence[Prompt], rollout: "Rollout", as_text: bool
) -> list[tuple[list[int], dict[str, list[Any]]]]:
    """The requests that cover a rollout of B rows, each as its rows and what it sends of them.

    Row b belongs to prompt b // (B / P). What is sent are arguments of `RewardClient.rewards`. A
    row whose prompt has messages is sent as messages unless `as_text`, any other row as one text:
    a file that mixes both makes two requests. Every request has the prompts, `finished`, and the
    responses without special tokens, for rewards that are plain functions of a text.
    """
    ids, finished = response_ids(rollout), rollout.finished.tolist()
    k = len(ids) // len(prompts)
    chat = [p.messages is not None and not as_text for p in prompts]
    requests = []
    for as_messages in sorted(set(chat)):
        numbers = [b for b in range(len(ids)) if chat[b // k] == as_messages]
        rows = [(prompts[b // k], ids[b]) for b in numbers]
        plain = [decoded(tokenizer, p.ids, r, skip_special_tokens=True) for p, r in rows]
        request: dict[str, list[Any]] = {
            "prompts": [p.text for p, _ in rows],
            "finished": [finished[b] for b in numbers],
            "completions": plain,
        }
        if any(p.label is not None for p, _ in rows):
            request["labels"] = [p.label for p, _ in rows]
        if as_messages:
            gap = gap_before_answer(tokenizer, rows[0][0].messages or [])
            answers = [{"role": "assistant", "content": text.removeprefix(gap)} for text in plain]
            request["messages"] = [
                [*(p.messages or []), answer] for (p, _), answer in zip(rows, answers, strict=True)
            ]
        else:
            request["query"] = [
                p.text + decoded(tokenizer, p.ids, r, skip_special_tokens=False) for p, r in rows
            ]
        requests.append((numbers, request))
    return requests
