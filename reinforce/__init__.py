"""REINFORCE for language models, one concept a file.

Read in this order, and stop after the eighth:

    train.py · baselines · kl · objective · loss · sampler · logprobs · run/actor.py

Notation, the same in every file:

    P  prompts of a step     K  responses per prompt     B  P * K rows: row b is of prompt b // K
    S  prompt length         T  response length          V  vocabulary size

    logp       (B, T)  log pi(token) of response tokens, pi = softmax(logits / temperature)
    ref_logp   (B, T)  the same under the frozen initial policy
    mask       (B, T)  True on response tokens, the end token included; from lengths, never from ids
    reward     (P, K)  r, what the reward model says
    objective  (P, K)  R = reward - beta * KL; baselines.py, made for any reward, calls it reward
    advantage  (P, K)  A = R - baseline(R)

What is (P, K) there is (B,) before rows are put into groups.

Four shelves; imports point one way, and tests/test_house.py holds them to it:

    reinforce/          the update, and what it is made of: imports torch, transformers and itself
    reinforce/data/     lines in, prompts out: may import the first
    reinforce/serving/  the reward endpoint: may import the first
    reinforce/run/      what makes a run safe: may import all of these

As a library, recipes/library.py is one step on a model of one's own:

    from reinforce import Sampling, Scorer, k1, per_response, reinforce_loss, rloo, sample
    from reinforce.objective import objective
"""

import importlib
from typing import Any

# Name -> module, imported when the name is first asked for: `import reinforce` loads no PyTorch
EXPORTS = {
    **dict.fromkeys(("Ema", "group_mean", "grpo", "remax", "rloo"), "baselines"),
    **dict.fromkeys(("k1", "per_response"), "kl"),
    **dict.fromkeys(("clipped_loss", "reinforce_loss"), "loss"),
    **dict.fromkeys(("Sampling", "row_seed", "sample", "sample_token"), "sampler"),
    **dict.fromkeys(("end_tokens", "load_policy", "load_tokenizer"), "policy"),
    "encode": "text",
    "Rollout": "rollout",
    "Scorer": "logprobs",
    "RewardClient": "rm_client",
}
__all__ = list(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'reinforce' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reinforce.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
