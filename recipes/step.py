"""One step of REINFORCE on one prompt, in numbers; docs/step.md explains each of them.

    python recipes/step.py                                   the toy
    python recipes/step.py --reward-fn FILE.py:NAME          the toy, with a reward of your own
    python recipes/step.py --policy FOLDER --train-data prompts.jsonl --reward-fn FILE.py:NAME

    R = r - beta * sum_t [log pi(y_t) - log pi_ref(y_t)]       A_i = R_i - mean of the other R
    one AdamW step on the loss  -(1/K) sum_i A_i log pi(y_i)

The prompt is the first of the file. Left out is what train.py has: several prompts, a server of
rewards, GPUs, and a run that goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import toy
from recipes.step_screen import effect, heading, number, numbers, pieces, responses
from reinforce.baselines import rloo
from reinforce.data.prompts import check_record, tokenize
from reinforce.data.records import read_records
from reinforce.errors import ConfigError
from reinforce.flags import flag, parse, refuse
from reinforce.kl import k1, per_response
from reinforce.logprobs import Scorer
from reinforce.loss import reinforce_loss
from reinforce.objective import objective
from reinforce.optim import adamw, clip
from reinforce.policy import context_length, end_tokens, load_policy, load_tokenizer
from reinforce.rollout import Rollout
from reinforce.run.config import LANGUAGE_MODEL
from reinforce.run.exits import run
from reinforce.sampler import CPU, Sampling, row_seed, sample
from reinforce.serving.config import ServeConfig
from reinforce.serving.function import FunctionError
from reinforce.serving.load import load_reward
from reinforce.serving.protocol import parse_request
from reinforce.serving.reward import Reward
from reinforce.text import Prompt, response_ids, reward_requests

K, BETA, BETAS, MAX_GRAD_NORM = 4, 0.05, (0.9, 0.95), 1.0  # train.py's defaults


@dataclass(frozen=True)
class Config:
    """The flags."""

    policy: str | None = flag(None, "what", "folder or hub id (default: the toy's)")
    train_data: str | None = flag(
        None, "what", "prompts, as of train.py; the first is taken (default: the toy's)"
    )
    reward_fn: str | None = flag(
        None,
        "what",
        "FILE.py:NAME, called as f(prompts=, completions=, labels=) (default: the toy's model)",
    )
    skip_bad_lines: bool = flag(False, "what", "leave out malformed prompt lines")

    steps: int = flag(
        2, "step", "steps on the prompt, the last of which is shown; 1: every KL is 0"
    )
    lr: float | None = flag(None, "step", "of AdamW (default: 1e-6; the toy's: 7e-4)")
    max_new_tokens: int = flag(24, "step", "response length at most, tokens")
    seed: int = flag(0, "step", "of every draw")

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, positive=("steps", "lr", "max_new_tokens"))
        if self.policy is not None and (self.train_data is None or self.reward_fn is None):
            raise ConfigError(
                "--policy needs --train-data and --reward-fn as well: the toy's prompts and reward "
                "model are in the toy's language"
            )


def main() -> None:
    """Take the steps, and show the last."""
    config = parse(Config, __doc__)
    reward, name, lr, prompt, tokenizer = load(config)
    policy, reference = (load_policy(name, tokenizer, CPU) for _ in range(2))
    log_pi, log_pi_ref = Scorer(policy), Scorer(reference)
    optimizer = adamw(policy, lr, BETAS, weight_decay=0.0)
    sampling = Sampling(config.max_new_tokens, end_tokens(name, tokenizer), tokenizer.pad_token_id)

    for n in range(config.steps):
        # 1. sample: K responses y ~ pi to the prompt
        seeds = [row_seed(config.seed, n, prompt.index, k) for k in range(K)]
        y = sample(policy, [prompt.ids], seeds, sampling)
        rows = (y.prompt, y.prompt_mask, y.response, y.mask)  # (K, S) twice, (K, T) twice

        # 2. and 3. reward r, KL to the initial policy, R = r - beta * KL
        r = rewards(reward, tokenizer, prompt, y)  # (K,)
        with torch.no_grad():
            ref_logp = log_pi_ref(*rows)  # (K, T)
        kl = per_response(k1(y.logp, ref_logp), y.mask).double()  # (K,)
        R = objective(r, kl, BETA, y.finished)  # noqa: N806  (K,)

        # 4. advantage: A = R - mean of the other R
        A = rloo(R[None])[0]  # noqa: N806  (K,), the K responses are one group

        # 5. update: gradient of -(1/K) sum_i A_i log pi(y_i), one step of AdamW down it
        loss = reinforce_loss(log_pi(*rows), A.float(), y.mask, divisor=K)
        loss.backward()
        grad_norm = clip(policy, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        after = log_pi(*rows)  # (K, T), of the same responses
    change = after - y.logp  # (K, T)
    table = {
        "log π": (y.logp.sum(1), "Σ log π(token), as sampled"),
        "log π_ref": (ref_logp.sum(1), "the same, initial policy"),
        "KL": (kl, "log π − log π_ref"),
        "r": (r, f"by {reward.model:.24}"),
        "R": (R, f"r − {BETA} · KL"),
        "b": ((R.sum() - R) / (K - 1), "mean of the other R"),
        "A": (A, f"R − b, in sum {number(A.sum())}"),
        "log π after": (after.sum(1), "after the step"),
        "change": (change.sum(1), "log π after − log π"),
    }
    texts = [pieces(tokenizer, prompt.ids, ids) for ids in response_ids(y)]
    gradient = f"{grad_norm:.3f} long, of 1/{K} Σ A · log π; {MAX_GRAD_NORM} at most is used"
    said = [heading(prompt.text, config.steps, K), responses(texts, change), numbers(table)]
    print("\n\n".join([*said, f"gradient   {gradient}\n{effect(A, change, texts)}"]))


def load(config: Config) -> tuple[Reward, str, float, Prompt, Any]:
    """What the flags name, or else the toy's; models come later. Raises ConfigError."""
    policy, data, lr, reward_model = config.policy, config.train_data, config.lr, None
    if policy is None:
        folder = toy.prepare()
        policy, data = f"{folder}/policy", data or f"{folder}/train.jsonl"
        lr, reward_model = lr or toy.DEFAULTS["lr"], f"{folder}/reward_model"
    records, bad = read_records(str(data), "--train-data", check_record, config.skip_bad_lines)
    if bad:
        print(f"--train-data: left out {bad} malformed lines (--skip-bad-lines)")
    room = context_length(policy)
    tokenizer = load_tokenizer(policy)
    (prompt,), _ = tokenize(records[:1], tokenizer, sys.maxsize, "--train-data")
    if room is not None and len(prompt.ids) + config.max_new_tokens > room:
        raise ConfigError(
            f"--train-data: the {len(prompt.ids)} tokens of the first prompt and --max-new-tokens "
            f"{config.max_new_tokens} exceed the {room} positions of --policy; shorten one of them"
        )
    reward_model = None if config.reward_fn else reward_model
    reward = load_reward(ServeConfig(reward_model, config.reward_fn, device="cpu"))
    return reward, policy, lr or LANGUAGE_MODEL["lr"], prompt, tokenizer


def rewards(reward: Reward, tokenizer: Any, prompt: Prompt, y: Rollout) -> Tensor:
    """r of each response, (K,) float64, as serve_rm.py computes it. Raises ConfigError."""
    ((_, request),) = reward_requests(tokenizer, [prompt], y, as_text=False)
    try:
        scores = reward.score([reward.encode(text)[0] for text in parse_request(request)])
    except FunctionError as error:
        raise ConfigError(f"--reward-fn: {error}") from error
    r = (torch.tensor(scores, dtype=torch.float64) - reward.mean) / reward.std  # (K,)
    if not r.isfinite().all():
        raise ConfigError(f"--reward-fn: {reward.model} gives {scores}; rewards must be finite")
    return r


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(main, name="recipes/step.py"))
