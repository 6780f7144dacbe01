"""A LoRA checkpoint as an ordinary folder: each layer's change is added to its weight.

    python recipes/merge.py --policy RUN/checkpoints/step-000100 --out FOLDER

    W + (alpha / r) B A        float32, from the adapter and the base model that it names

Any program that reads Hugging Face folders opens the result, and so does train.py. A checkpoint of
a run stays an adapter: a run goes on from it, and it is small.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce import adapter
from reinforce.errors import ConfigError
from reinforce.flags import flag, parse, refuse
from reinforce.policy import load_policy, load_tokenizer
from reinforce.run.exits import run
from reinforce.run.folder import new_folder


@dataclass(frozen=True)
class Config:
    """The flags of recipes/merge.py."""

    policy: str | None = flag(
        None, "what", "folder of the adapter: a checkpoint of train.py --lora-rank, or PEFT's"
    )
    out: str | None = flag(None, "what", "new folder for the whole model")

    def check(self) -> None:
        """Raise ConfigError if a flag is missing."""
        refuse(self, needed=("policy", "out"))


def main() -> None:
    """Load base and adapter, merge them and save the model with its tokenizer."""
    config = parse(Config, __doc__)
    assert config.policy is not None and config.out is not None
    if not adapter.is_adapter(config.policy):
        raise ConfigError(
            f"--policy {config.policy}: no folder with {adapter.CONFIG} of an adapter"
        )
    tokenizer = load_tokenizer(config.policy)
    new_folder(config.out, "--out")
    model = load_policy(config.policy, tokenizer, torch.device("cpu"))
    cast(Any, model).save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    print(
        f"wrote {config.out}: {adapter.base_of(config.policy)} with the adapters of {config.policy}"
    )


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    sys.exit(run(main, name="recipes/merge.py"))
