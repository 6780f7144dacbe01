"""One reward before any model loads: a reward that fails on this data ends the run in seconds.

The request holds the first prompt, its label and a short finished response, in the form of all
later requests. The reward is not kept, and no later number depends on it.
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


def probe(prompt: Prompt, tokenizer: Any, end_ids: Sequence[int]) -> Rollout:
    """PROBE as the response to a prompt: a rollout of B = 1 row, ended by an end token."""
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
    """Ask for the reward; `flag` names the file of the prompt.

    Raises ConfigError if the server refuses the response and --skip-refused is 0.
    """
    as_text = config.rm_format == "query"
    rollout = probe(prompt, tokenizer, end_ids)
    ((_, request),) = reward_requests(tokenizer, [prompt], rollout, as_text)
    try:
        client.rewards(**request)
    except RefusedError as error:
        response = request["completions"][0]
        number = prompt.index + 1
        refusal = f"{flag}, prompt {number}: no reward for the response {response!r} ({error})"
        if not config.skip_refused:
            raise ConfigError(refusal) from error
        print(f"{refusal}; --skip-refused may leave it out", file=sys.stderr, flush=True)
