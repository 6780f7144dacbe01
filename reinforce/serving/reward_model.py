"""A reward model: one scalar head on a Hugging Face backbone; loaded, and asked for its scores.

    P(chosen > rejected) = sigmoid(r(chosen) - r(rejected))

See "Rank Analysis of Incomplete Block Designs", Bradley and Terry (1952) and "Training language
models to follow instructions with human feedback", Ouyang et al. (2022, arXiv 2203.02155).
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from reinforce import attention
from reinforce.errors import ConfigError, first_line
from reinforce.policy import OUT_OF_MEMORY, announce, load_tokenizer, own_memory, without_dropout
from reinforce.serving.config import DAY
from reinforce.text import encode, render

FLAG = "--reward-model"


def load_reward_model(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    """Model and tokenizer. Raises ConfigError, also without a trained head of one label.

    transformers would fill a missing head with random numbers and warn: the run would learn noise.
    `options` go to its from_pretrained.
    """
    tokenizer = load_tokenizer(name, FLAG)
    announce(name, FLAG)
    attention.use_for_models()
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # what a damaged file or a wrong shape makes transformers raise
        raise ConfigError(
            f"{FLAG} {name}: not a sequence classifier in safetensors ({first_line(error)})"
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"{FLAG} {name}: no trained reward head in the checkpoint (missing {missing}); "
            "train one first"
        )
    if model.config.num_labels != 1:
        raise ConfigError(
            f"{FLAG} {name}: {model.config.num_labels} labels; a reward model has exactly one"
        )
    model = with_float32_head(without_dropout(model)).to(device).requires_grad_(False)
    return own_memory(model), tokenizer


def new_reward_model(name: str, tokenizer: Any, device: torch.device, flag: str) -> nn.Module:
    """Any backbone, a causal language model say, with a new scalar head; float32, dropout off.

    Raises ConfigError.
    """
    announce(name, flag)
    attention.use_for_models()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # what a damaged file or a wrong shape makes transformers raise
        raise ConfigError(
            f"{flag} {name}: no model with a classification head of its kind ({first_line(error)})"
        ) from error
    if hasattr(model, "score"):
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    return own_memory(with_float32_head(without_dropout(model)).to(device))


def with_float32_head(model: nn.Module) -> nn.Module:
    """The model itself; all that follows its backbone computes in float32, whatever autocast says.

    In bfloat16 two of three scores of different texts may be the same number.
    """
    backbone = cast(Any, model).base_model
    for head in model.children():
        if head is not backbone:
            cast(Any, head).forward = functools.partial(_in_float32, head.forward)
    return model


def _in_float32(forward: Callable[..., Tensor], states: Tensor, *rest: Any, **named: Any) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return forward(states.float(), *rest, **named)


def score(model: nn.Module, sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Reward of each token sequence, (n,) float32.

    The head reads a sequence's last token, found by its length.

    (transformers looks for the last token that is not the pad token, so with pad = end token it
    reads the one before the end.)
    """
    hf, device = cast(Any, model), next(model.parameters()).device
    length = torch.tensor([len(s) for s in sequences], device=device)  # (n,)
    width = int(length.max())
    ids = torch.tensor(
        [[*s, *[pad_id] * (width - len(s))] for s in sequences], device=device
    )  # (n, L)
    mask = (torch.arange(width, device=device) < length[:, None]).long()  # (n, L)
    if not hasattr(model, "score"):  # an encoder such as BERT pools in its own way
        return cast(Tensor, hf(input_ids=ids, attention_mask=mask).logits[:, 0].float())
    states = hf.base_model(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).last_hidden_state  # (n, L, H)
    return cast(
        Tensor, hf.score(states[torch.arange(len(ids), device=device), length - 1])[:, 0].float()
    )


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), mean over pairs; both (n,).

    >>> round(bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0])).item(), 4)
    0.6931
    """
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def query_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of prompt and response as one text.

    Pad tokens are stripped. There is no second begin token, and no end token is added.
    """
    pad = tokenizer.pad_token
    if pad and pad in text and pad not in (tokenizer.eos_token, tokenizer.unk_token):
        text = text.replace(pad, "").strip()
    return encode(tokenizer, text)


def messages_ids(
    tokenizer: Any, messages: list[dict[str, str]], finished: bool, date: str = DAY
) -> list[int]:
    """Token ids of a conversation whose last message is the response.

    It is rendered in the model's own chat template; `date` is that of `render`.
    """
    try:
        text = render(
            tokenizer, messages, "a conversation", date, continue_final_message=not finished
        )
    except ConfigError:
        if finished:
            raise
        text = render(
            tokenizer, messages, "a conversation", date
        )  # the template cuts or changes the last message: as if it had ended
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


def fingerprint(folder: str) -> str:
    """sha256 over the files that decide a reward: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def written(folder: str) -> list[tuple[str, int, int, int]]:
    """When and how the files of `fingerprint` were written; of a hub id nothing."""
    if not Path(folder).is_dir():
        return []
    stats = [(path.name, path.stat()) for path in _files(folder)]
    return [(name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats]


def _files(folder: str) -> list[Path]:
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
    return sorted(path for path in Path(folder).iterdir() if path.suffix in kinds)
