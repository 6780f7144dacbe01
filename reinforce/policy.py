"""A causal language model, from a Hugging Face folder or hub id, ready to be sampled and scored.

Dropout is off for good: the policy that is scored must be the policy that was sampled. A tokenizer
without a pad token is no obstacle, since masks come from lengths. An adapter's folder is opened as
its base model with the adapter merged. Left out: quantised weights, and code that ships with a
checkpoint.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from reinforce import adapter, attention, lora
from reinforce.errors import ConfigError, first_line
from reinforce.head import give_float32_logits
from reinforce.hub import refuse_missing_path
from reinforce.text import TEMPLATE

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
HEADS = ("score", "classifier", "classification_head")  # Hugging Face's names of a classifier's


@functools.cache  # once is enough
def announce(name: str, flag: str) -> None:
    """Say what is fetched before the wait for a network that may not be there.

    Raises ConfigError on the path of a folder that is missing: the hub has no paths.
    """
    refuse_missing_path(name, flag)
    if not Path(name).is_dir():
        line = f"{flag} {name}: no such folder here, asking the Hugging Face hub ..."
        print(line, file=sys.stderr, flush=True)


def load_tokenizer(name: str, flag: str = "--policy") -> Any:
    """Tokenizer of a folder or hub id. Raises ConfigError.

    A tokenizer without a pad token pads with its end token.
    """
    announce(name, flag)
    has_none = adapter.is_adapter(name) and not Path(name, "tokenizer_config.json").exists()
    base = adapter.base_of(name, flag) if has_none else name  # PEFT saves no tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as error:  # a bad file makes the libraries below raise what they like
        raise ConfigError(f"{flag} {name}: no tokenizer there ({first_line(error)})") from error
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{flag} {name}: its tokenizer has neither pad nor end token; "
            "set one in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        print(
            f"{flag} {name}: no pad token; padding with its end token {tokenizer.eos_token!r} "
            "(masks come from lengths)"
        )
    return tokenizer


def with_template(tokenizer: Any, flag: str) -> Any:
    """The tokenizer, with HH-RLHF's plain dialogue as its chat template if it has none.

    The template is saved with the tokenizer.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATE
        print(
            f"{flag}: the tokenizer has no chat template; giving it HH-RLHF's, "
            r'"\n\nHuman: ...\n\nAssistant:"'
        )
    return tokenizer


def end_tokens(name: str, tokenizer: Any, flag: str = "--policy") -> tuple[int, ...]:
    """Every id that ends a response: the generation config's and the tokenizer's.

    Without a generation config it is the model config's, as transformers has it. Raises ConfigError
    if there is none.
    """
    from transformers import GenerationConfig

    base = adapter.base_of(name, flag)
    try:
        listed = GenerationConfig.from_pretrained(base).eos_token_id
    except Exception as error:  # a bad file makes transformers raise what it likes
        if not isinstance(error, OSError) or (Path(base) / "generation_config.json").exists():
            raise ConfigError(
                f"{flag} {name}: transformers refuses its generation_config.json "
                f"({first_line(error)})"
            ) from error
        listed = read_config(name, flag).get_text_config().eos_token_id
    found = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(isinstance(i, int) and i >= 0 for i in found):
        raise ConfigError(f"{flag} {name}: its eos_token_id is {listed!r}; it must be token ids")
    ids = set(found)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ConfigError(
            f"{flag} {name}: no end token in its tokenizer or generation_config.json; "
            "set eos_token there"
        )
    return tuple(sorted(ids))


def read_config(name: str, flag: str = "--policy") -> Any:
    """The configuration of a causal language model. Raises ConfigError on any other model's."""
    announce(name, flag)
    base = adapter.base_of(name, flag)
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        config.get_text_config()
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # a bad file makes transformers raise what it likes
        raise ConfigError(
            f"{flag} {name}: no config.json that transformers can read ({first_line(error)})"
        ) from error
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    if architecture.endswith("ForSequenceClassification"):
        raise ConfigError(
            f"{flag} {name}: a {architecture}, not a language model"
            + ("; were --policy and --reward-model swapped?" if flag == "--policy" else "")
        )
    if method := (getattr(config, "quantization_config", None) or {}):
        is_dict = isinstance(method, dict)
        kind = method.get("quant_method") if is_dict else getattr(method, "quant_method", None)
        raise ConfigError(
            f"{flag} {name}: its weights are quantised ({kind}); give a folder of full weights"
        )
    return config


def context_length(name: str, flag: str = "--policy") -> int | None:
    """Longest sequence for which log pi depends on the row alone, tokens; None if unknown.

    The model's configuration names it. Beyond its original length a longrope model takes other
    frequencies for the whole batch as soon as one row is that long, and sparse attention picks
    among more positions than it keeps. Raises ConfigError.
    """
    return context_of(read_config(name, flag))


def context_of(config: Any) -> int | None:
    """`context_length` of a model's configuration, a reward model's say."""
    config = config.get_text_config()
    lengths = [
        getattr(config, "max_position_embeddings", None),
        getattr(config, "max_seq_len", None),  # MPT's name
        getattr(config, "index_topk", None),
    ]
    if getattr(config, "attn_temperature_tuning", None):  # Llama 4 scales by columns from there on
        lengths.append(getattr(config, "floor_scale", None))
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type", rope.get("type")) == "longrope":
            lengths += [
                getattr(config, "original_max_position_embeddings", None),
                rope.get("original_max_position_embeddings"),
            ]
    known = [length for length in lengths if length is not None]
    return min(known) if known else None


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, inner ones first, as Hugging Face names or marks them."""
    names = {name for m in module.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    inner_first = list(reversed(list(module.modules())))
    named = [m for m in inner_first if type(m).__name__ in names]
    return named or [m for m in inner_first if isinstance(m, GradientCheckpointingLayer)]


def checkpoint_blocks(model: nn.Module) -> bool:
    """Keep no activations inside a block from now on. Whether there are blocks.

    The backward pass computes the activations again. The model stays in eval mode: transformers'
    own switch works in train mode alone, in which routers and layer drops are random.
    """
    found = blocks(model)
    for block in found:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return bool(found)


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in eval mode, every dropout set to 0, plain numbers of that name included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.eval()


def load_policy(
    name: str,
    tokenizer: Any,
    device: torch.device,
    frozen_dtype: torch.dtype | None = None,
    flag: str = "--policy",
) -> nn.Module:
    """The model in float32, dropout off. Raises ConfigError.

    `frozen_dtype` is for the reference, which is never updated. Its linear layers store their
    weights as autocast would cast them: the log-probs are exactly the policy's, in half the memory.
    """
    read_config(name, flag)
    attention.use_for_models()
    base = adapter.base_of(name, flag)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # a damaged file, a wrong shape or an unknown architecture: transformers raises any kind
        raise ConfigError(
            f"{flag} {name}: not a causal language model in safetensors ({first_line(error)})"
        ) from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(f"{flag} {name}: not a trained causal language model (missing {missing})")
    refuse_foreign_weights(sorted(info["unexpected_keys"]), f"{flag} {name}")
    refuse_missing_rows(model.get_input_embeddings().weight.shape[0], tokenizer, f"{flag} {name}")
    model = own_memory(give_float32_logits(without_dropout(model).to(device)))
    if base != name:
        adapter.merge_into(model, name, flag)
    if frozen_dtype is not None:
        store_frozen(model.requires_grad_(False), frozen_dtype)
    return model


def own_memory(model: nn.Module) -> nn.Module:
    """The model, with weights of its own.

    On a CPU they are pages of its files as they come from safetensors: who copies another model
    over a file would exchange them, in the middle of a run.
    """
    for weight in [*model.parameters(), *model.buffers()]:
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()
    return model


def refuse_missing_rows(rows: int, tokenizer: Any, where: str) -> None:
    """Raise ConfigError if the model's `rows` embeddings lack one for a token that it needs.

    Tokens that were added to the vocabulary may be without one, as Gemma 3's for an image: they are
    never drawn, and `refuse_ids` is for texts that hold them.
    """
    beyond = {i for i in tokenizer.get_vocab().values() if i >= rows}
    if beyond and beyond - (tokenizer.added_tokens_decoder.keys() - {tokenizer.pad_token_id}):
        raise ConfigError(
            f"{where}: the tokenizer has ids up to {max(beyond)}, the model {rows} tokens; "
            "resize the model's embeddings"
        )


def refuse_ids(model: Any, texts: Iterable[Sequence[int]], where: str) -> None:
    """Raise ConfigError if one of the texts, token ids, holds one without an embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((i for ids in texts for i in ids), default=0)
    if largest >= rows:
        raise ConfigError(
            f"{where}: a text holds the token {largest}, of the tokenizer alone: the model has "
            f"{rows}; leave it out, or resize the model's embeddings"
        )


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of frozen linear layers as autocast would cast them.

    Embeddings and head stay float32, and so do adapters, and biases that are added by themselves.
    """
    kept = (cast(Any, model).get_input_embeddings(), cast(Any, model).get_output_embeddings())
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            module.weight.data = module.weight.data.to(dtype)
            if type(module) is nn.Linear and module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)


def refuse_targets(name: str, targets: Sequence[str], flag: str = "--policy") -> None:
    """Raise ConfigError if a LoRA target matches no layer of the model; no weights are loaded."""
    config = read_config(name, flag)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"{flag} {name}: not a causal language model ({first_line(error)})"
        ) from error
    lora.layers(blocks(model), model, targets)


def refuse_foreign_weights(names: list[str], where: str) -> None:
    """Raise ConfigError on the weights of a classifier's head; print any others, unused here."""
    heads = [name for name in names if name.split(".")[0] in HEADS]
    if heads:
        raise ConfigError(
            f"{where}: it holds a classifier's head ({heads[0]}), not a policy; "
            "was it meant as --reward-model?"
        )
    if names:
        some = ", ".join(names[:3])
        line = f"{where}: {len(names)} weights of the checkpoint are not used ({some})"
        print(line, file=sys.stderr)
