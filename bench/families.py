"""A table of the model families that can be trained: each a tiny model, the guard and one step.

    python bench/families.py                 every family in FAMILIES, as a Markdown table
    python bench/families.py llama mamba     the named families

The models are random ones from the configurations of transformers. The columns are:

- the largest |log pi| differences of a token in float32: sampler against scorer, and a row in a
  batch against the row alone;
- whether logits are the head applied to the hidden states;
- whether the model was trained with gradient checkpointing;
- the verdict: "trains" means that the functions of train.py made one step of REINFORCE, and that
  the step changed the sampled policy.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reinforce import Scorer, guard, reinforce_loss, rloo, row_seed, sample
from reinforce.errors import ConfigError
from reinforce.head import give_float32_logits
from reinforce.policy import blocks, checkpoint_blocks, without_dropout
from reinforce.sampler import Sampling

VOCABULARY = 96
# the sizes of a tiny model, set where its configuration knows the name
SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim"), 32),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("d_ff", "dim_ff", "decoder_ffn_dim"), 48),
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "expert_intermediate_size": 24,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token"), 2),
    **dict.fromkeys(("moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 32,
}
# the sizes of a multimodal model's text part
TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
# the other settings that a family needs to be this small
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 64},
    "jamba": {
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "opt": {"dropout": 0.1, "layerdrop": 0.5, "do_layer_norm_before": True},
    "biogpt": {"layerdrop": 0.5},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "head_dim": None},
    "persimmon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.1},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 2.0},
    "bloom": {"n_layer": 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "mpt": {"max_seq_len": 64},
    "openai-gpt": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 32, "num_hidden_layers": 3},
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "zamba2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "bert:decoder": {"is_decoder": True},
    "roberta:decoder": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "stablelm": {},
    "ctrl": {"dff": 48},
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 32,
        "layer_types": ["full_attention", "full_attention"],
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
    },
    "gemma3": {
        "text_config": {name: SIZES[name] for name in TEXT_SIZES},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "deepseek_v2": {"topk_method": "greedy", "num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "minicpm3": {},
    "olmoe": {},
    "dbrx": {"max_seq_len": 64},
    "gemma3n_text": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {},
    "nemotron": {},
    "ernie4_5_moe": {"moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
}
FAMILIES = """
    llama mistral qwen2 qwen3 gpt2 gpt_neox gptj gpt_neo gpt_bigcode codegen opt bloom mpt falcon
    phi phi3 phimoe gemma gemma2 gemma3_text cohere cohere2 granite granitemoe olmo olmo2 olmoe
    stablelm starcoder2 persimmon biogpt xglm ctrl nemotron glm glm4 helium smollm3 exaone4
    apertus arcee seed_oss hunyuan_v1_dense ernie4_5 ernie4_5_moe mixtral qwen2_moe qwen3_moe
    deepseek_v2 deepseek_v3 gpt_oss dots1 glm4_moe llama4_text minimax lfm2 mamba mamba2
    falcon_mamba jamba bamba falcon_h1 qwen3_next recurrent_gemma rwkv openai-gpt bert
    bert:decoder roberta roberta:decoder electra gemma3
""".split()  # noqa: SIM905


def tiny(family: str) -> Any:
    """A small random model of a family in float32, as train.py would load it.

    NAME:VARIANT is the family NAME with other settings.
    """
    kind = family.partition(":")[0]
    config = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if hasattr(config, name)}
    settings = sizes | SPECIAL.get(family, {})
    settings = {name: value for name, value in settings.items() if value is not None}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return give_float32_logits(without_dropout(model))


def step(model: Any, plain: bool, prompts: list[list[int]], checkpointing: bool) -> float:
    """Make one step of REINFORCE and return the mean |change| of a sampled token's log pi."""
    if checkpointing:
        checkpoint_blocks(model)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    sampling = Sampling(max_new_tokens=8, end_ids=(2,), pad_id=0)
    seeds = [row_seed(0, 0, i, k) for i in range(len(prompts)) for k in range(4)]
    out = sample(model, prompts, seeds, sampling)
    rows = (out.prompt, out.prompt_mask, out.response, out.mask)
    reward = out.response.double().mean(1).view(-1, 4)  # (P, K)
    scorer = Scorer(model, plain)
    before = scorer(*rows)  # (B, T)
    reinforce_loss(before, rloo(reward).flatten().float(), out.mask, len(before)).backward()
    optimizer.step()
    with torch.no_grad():
        return float((scorer(*rows) - before)[out.mask].abs().mean())


def row(family: str) -> str:
    """A family's line of the table."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in (11, 6, 9, 4)]
    try:
        model = tiny(family)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:90]
        return f"| {family} | – | – | – | – | not built: {reason} |"
    checkpointing = bool(blocks(model))
    try:
        verdict = guard.inspect(model, prompts, [2], 0, checkpointing, family)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{family}: ")[:150]
        return f"| {family} | – | – | – | {checkpointing} | refused: {reason} |"
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad and name not in verdict.unused)
    moved = step(model, verdict.plain, prompts, checkpointing)
    end = f"trains, {len(verdict.unused)} parameters frozen" if verdict.unused else "trains"
    end = end if moved > 0 else "the step changed nothing"
    gaps = f"{verdict.sampling:.0e} | {verdict.padding:.0e}"
    return f"| {family} | {gaps} | {verdict.plain} | {checkpointing} | {end} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="family to try (default: all in FAMILIES)"
    )
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}; nats a token, float32\n")
    print("| family | sampler − scorer | neighbours | plain head | checkpointing | verdict |")
    print("|" + "---|" * 6)
    for family in parser.parse_args().families or FAMILIES:
        print(row(family), flush=True)


if __name__ == "__main__":
    main()
