"""One reward before any model loads: a reward that fails on this data ends the run in seconds.

It is that of the first prompt with its label and a short finished response, in the form of all
later requests. Its value is not kept, and no later number depends on it.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from reinforce.errors import ConfigError
from reinforce.rm_client import PROBE, RefusedError, RewardClient
from reinforce.rollout import Rollout
from reinforce.run.config import TrainConfig
from reinforce.text import Prompt, reward_requests


def said(prompt: Prompt, tokenizer: Any, end_ids: Sequence[int]) -> Rollout:
    """PROBE as a response to the prompt: B = 1 row, ended by an end token."""
    ids = [*tokenizer(PROBE, add_special_tokens=False)["input_ids"], *end_ids[:1]]
    response, read = torch.tensor([ids]), torch.tensor([prompt.ids])  # (1, T) and (1, S)
    everywhere = torch.ones_like(response, dtype=torch.bool)  # (1, T)
    finished = torch.tensor([bool(end_ids)])  # (1,)
    logp = torch.zeros(response.shape)  # (1, T), of no policy
    return Rollout(read, torch.ones_like(read).bool(), response, everywhere, logp, finished)


def ask(
    client: RewardClient,
    config: TrainConfig,
    prompt: Prompt,
    tokenizer: Any,
    end_ids: Sequence[int],
    flag: str,
) -> None:
    """Ask for the reward; `flag` is that of the prompt's file.

    Raises ConfigError where the server refuses it and the run leaves out no refused responses.
    """
    as_text = config.rm_format == "query"
    rollout = said(prompt, tokenizer, end_ids)
    ((_, request),) = reward_requests(tokenizer, [prompt], rollout, as_text)
    try:
        client.rewards(**request)
    except RefusedError as error:
        response = request["completions"][0]
        what = (
            f"{flag}, prompt {prompt.index + 1}: no reward for the response {response!r} ({error})"
        )
        if not config.skip_refused:
            raise ConfigError(what) from error
        print(f"{what}; --skip-refused may leave it out", file=sys.stderr, flush=True)
