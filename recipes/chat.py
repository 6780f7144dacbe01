"""Talk to a policy in the terminal.

    python recipes/chat.py --policy runs/latest/checkpoints/step-000100

A policy with a chat template gets the conversation so far. A policy without one continues your
text. Ctrl-D ends the conversation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce import device as devices
from reinforce.data.prompts import tokenize
from reinforce.errors import ConfigError
from reinforce.flags import flag, parse, refuse
from reinforce.policy import context_length, end_tokens, load_policy, load_tokenizer, refuse_ids
from reinforce.run.exits import run
from reinforce.sampler import Sampling, row_seed, sample
from reinforce.text import decoded, response_ids


@dataclass(frozen=True)
class Config:
    """The flags of recipes/chat.py."""

    policy: str | None = flag(None, "what", "policy to talk to: folder or hub id")
    max_new_tokens: int | None = flag(
        None, "sampling", "tokens of a reply at most (default: 256, or half of a short context)"
    )
    temperature: float = flag(0.7, "sampling", "temperature of the replies")
    top_p: float = flag(0.95, "sampling", "probability mass kept in sampling")
    greedy: bool = flag(False, "sampling", "take the likeliest token each time")
    seed: int = flag(0, "sampling", "seed of every draw")
    device: str = flag("auto", "hardware", "where to compute", choices=("auto", "cpu", "cuda"))

    def check(self) -> None:
        """Raise ConfigError on the first combination that cannot work."""
        refuse(self, needed=("policy",), positive=("max_new_tokens", "temperature", "top_p"))
        if self.top_p > 1:
            raise ConfigError(f"--top-p is {self.top_p}; it must be at most 1")


def main() -> None:
    """Read lines and print replies until the input ends."""
    config = parse(Config, __doc__)
    assert config.policy is not None
    tokenizer = load_tokenizer(config.policy)
    ends = end_tokens(config.policy, tokenizer)
    device = devices.pick(config.device)
    model = load_policy(config.policy, tokenizer, device)
    bf16 = devices.use_bf16("auto", device, sum(w.numel() for w in model.parameters()))
    context = context_length(config.policy) or sys.maxsize
    most = config.max_new_tokens or min(256, context // 2)
    sampling = Sampling(
        max_new_tokens=most,
        end_ids=ends,
        pad_id=tokenizer.pad_token_id,
        temperature=config.temperature,
        top_p=config.top_p,
        greedy=config.greedy,
    )
    room = context - most
    messages: list[dict[str, str]] = []
    for turn, line in enumerate(iter(lambda: read("you: "), None)):
        messages.append({"role": "user", "content": line})
        # forget the oldest turns when the context is full
        while True:
            record: dict[str, Any] = {"prompt": line}
            if tokenizer.chat_template:
                record = {"messages": messages}
            prompt = tokenize([record], tokenizer, sys.maxsize, "your text")[0][0]
            if len(prompt.ids) <= room or len(messages) < 3:
                break
            messages = messages[2:]
        if len(prompt.ids) > room:
            raise ConfigError(
                f"a text of {len(prompt.ids)} tokens and --max-new-tokens {most} "
                "exceed the policy's context; give a shorter text or fewer tokens"
            )
        refuse_ids(model, [prompt.ids], f"--policy {config.policy}")
        with devices.autocast(device, bf16):
            seed = row_seed(config.seed, turn, 0, 0)
            out = sample(model, [prompt.ids], [seed], sampling, device)
        ids = response_ids(out)[0]
        reply = decoded(tokenizer, prompt.ids, ids, skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": reply})
        print(f"policy: {reply}", flush=True)


def read(question: str) -> str | None:
    """The next line that is not empty, None at the end of the input."""
    try:
        while not (line := input(question).strip()):
            pass
    except (EOFError, KeyboardInterrupt):
        return None
    return line


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(main, name="recipes/chat.py"))
