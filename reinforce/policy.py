"""A causal language model from a Hugging Face folder or hub id, made ready to be sampled and scored.

Dropout is off for good: the policy that is scored must be the policy that was sampled. A tokenizer without a pad token is no
obstacle, since masks come from lengths. Left out: LoRA, quantised weights, and code that ships with a checkpoint.
"""

import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from reinforce.errors import ConfigError
from reinforce.text import TEMPLATE


def announce(name: str, flag: str) -> None:
    """Say what is fetched before the wait for a network that may not be there."""
    if not Path(name).is_dir():
        print(f"{flag} {name}: no such folder here, asking the Hugging Face hub ...", file=sys.stderr, flush=True)


def load_tokenizer(name: str, flag: str = "--policy") -> Any:
    """Tokenizer of a folder or hub id, padded with its end token if it has no pad token. Raises ConfigError."""
    announce(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {name}: no tokenizer there ({first_line(error)})") from error
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        print(f"{flag} {name}: no pad token; padding with its end token {tokenizer.eos_token!r} (masks come from lengths)")
    return tokenizer


def with_template(tokenizer: Any, flag: str) -> Any:
    """The tokenizer, with HH-RLHF's plain dialogue as its chat template if it has none; it is saved with the tokenizer."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATE
        print(f'{flag}: the tokenizer has no chat template; giving it HH-RLHF\'s, "\\n\\nHuman: ...\\n\\nAssistant:"')
    return tokenizer


def first_line(error: BaseException) -> str:
    """First line of an error's text: the libraries below us write paragraphs."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def end_tokens(name: str, tokenizer: Any, flag: str = "--policy") -> tuple[int, ...]:
    """Every id that ends a response: the generation config's and the tokenizer's. Raises ConfigError if there is none."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    try:
        listed = GenerationConfig.from_pretrained(name).eos_token_id
        ids.update([listed] if isinstance(listed, int) else listed or [])
    except OSError:  # a checkpoint without generation_config.json
        pass
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError(f"{flag} {name}: no end token in its tokenizer or generation_config.json; set eos_token there")
    return tuple(sorted(ids))


def context_length(name: str, flag: str = "--policy") -> int | None:
    """Longest sequence the model takes, in tokens, from its config alone; None if it names none. Raises ConfigError."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {name}: no config.json that transformers can read ({first_line(error)})") from error
    return getattr(config, "max_position_embeddings", None)


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout of the model to 0, those that are kept as plain numbers included, and return it in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.eval()


def load_policy(
    name: str, tokenizer: Any, device: torch.device, frozen_dtype: torch.dtype | None = None, flag: str = "--policy"
) -> nn.Module:
    """The model in float32, dropout off. Raises ConfigError.

    `frozen_dtype` is for the reference, which is never updated: it stores the weights of linear layers as autocast would
    cast them, so it scores exactly as the policy does, in half the memory.
    """
    announce(name, flag)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {name}: not a causal language model in safetensors ({first_line(error)})") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"{flag} {name}: not a trained causal language model (missing {missing})")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(f"{flag} {name}: tokenizer has {len(tokenizer)} tokens, model {rows}; resize its embeddings")
    model = without_dropout(model).to(device)
    if frozen_dtype is not None:
        model.requires_grad_(False)
        tied = cast(Any, model).get_input_embeddings().weight
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight is not tied:
                module.to(frozen_dtype)
    return model
