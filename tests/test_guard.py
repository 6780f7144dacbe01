"""The guard: models whose log pi is not one number are refused at the start, and the randomness of train mode never comes back."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama, train_here
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    PhimoeConfig,
    PhimoeForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from recipes import toy
from reinforce import guard
from reinforce.errors import ConfigError
from reinforce.logprobs import Scorer
from reinforce.policy import blocks, checkpoint_blocks, context_length, load_policy, load_tokenizer, without_dropout
from reinforce.run import loading
from reinforce.sampler import Sampling, row_seed, sample
from reinforce.shared_prompt import SharedPrompts
from reinforce.text import Prompt

PROMPTS = [[1, 5, 6, 7, 8, 9, 10], [1, 11, 12], [1, 20, 21, 22], [1, 30]]
TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def judged(model, checkpointing=False):
    return guard.inspect(model, PROMPTS, [2], 0, checkpointing, "--policy it")


def test_a_sound_model_passes_with_gaps_of_rounding():
    found = judged(tiny_llama(), checkpointing=True)
    assert found.plain and found.sampling < 1e-5 and found.padding < 1e-5 and found.unused == () and found.seconds < 5


@pytest.mark.parametrize("model", [
    lambda: BertLMHeadModel(BertConfig(**TINY)),
    lambda: MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, intermediate_size=32, time_step_rank=2)),
], ids=["an encoder", "a recurrent model"])  # fmt: skip
def test_a_model_that_is_no_causal_language_model_with_a_cache_is_one_sentence(model):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"--policy it: .* cannot be sampled and scored") as refused:
        judged(without_dropout(model()))
    assert "\n" not in str(refused.value)


class Swayed(torch.nn.Module):
    """Attention that looks at the other rows of the batch, as a wrong mask might."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden + 0.5 * hidden.mean((0, 1), keepdim=True) * (hidden.shape[0] > 1), *args, **kwargs)


def test_a_model_whose_log_pi_depends_on_the_neighbours_is_refused_with_the_number():
    model = tiny_llama()
    model.model.layers[0] = Swayed(model.model.layers[0])
    with pytest.raises(
        ConfigError, match=r"LlamaForCausalLM cannot be trained here: (a neighbour|sampling).* by up to [0-9.e-]+ nats"
    ):
        judged(model)


def test_a_model_that_counts_its_positions_in_another_way_is_refused():
    """RoBERTa's begin after its pad token's id: others would run it with other positions than it was trained with here."""
    config = RobertaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                           is_decoder=True, initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="counting positions from 0 changes log pi of a token by up to"):
        judged(without_dropout(RobertaForCausalLM(config)))


def test_a_gap_that_other_prompts_do_not_show_is_a_tie_and_no_reason(monkeypatch):
    gaps, real = iter([{"a": 0.5, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 0.5, "c": 0.0}]), guard._gaps
    monkeypatch.setattr(guard, "_gaps", lambda *args: (real(*args)[0], next(gaps)))
    assert judged(tiny_llama()).sampling == 0.5


def test_an_end_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="end token 50 is outside the 50 rows"):
        guard.inspect(tiny_llama(), PROMPTS, [2, 50], 0, False, "--policy it")


@pytest.mark.parametrize("model", [
    lambda: PhimoeForCausalLM(PhimoeConfig(**TINY, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5, input_jitter_noise=0.5)),
    lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.5)),
    lambda: OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=4, num_attention_heads=2, word_embed_proj_dim=16,
                                     layerdrop=0.5, dropout=0.3, max_position_embeddings=64)),
], ids=["phimoe", "mixtral", "opt"])  # fmt: skip
def test_gradient_checkpointing_brings_no_randomness_of_train_mode_back(model):
    """Random routers and dropped layers live in train mode, in which alone transformers' own checkpointing works."""
    torch.manual_seed(0)
    model = without_dropout(model())
    seeds = [row_seed(0, 0, i, k) for i in range(2) for k in range(2)]
    out = sample(model, PROMPTS[:2], seeds, Sampling(8, (), 0))
    rows = (out.prompt, out.prompt_mask, out.response, out.mask)
    scorer = Scorer(model)
    plain = scorer(*rows)
    gradient = torch.autograd.grad(plain.sum(), model.get_output_embeddings().weight)[0]
    calls = []
    blocks(model)[0].register_forward_hook(lambda *_: calls.append(1))
    assert checkpoint_blocks(model) and not model.training
    again = scorer(*rows)
    assert torch.equal(again, plain) and (out.logp - again)[out.mask].abs().max() < 1e-4
    assert torch.equal(torch.autograd.grad(again.sum(), model.get_output_embeddings().weight)[0], gradient)


def test_a_run_with_gradient_checkpointing_samples_and_scores_the_same_policy(flags, tmp_path):
    out = train_here(*flags, "--gradient-checkpointing", "--max-steps", "2", "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(abs(line["logprob_gap"]) < 1e-4 and line["ratio_distance"] < 1e-6 and line["ratio_outside"] == 0 for line in lines)


@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-11), ("bf16", 1e-6)])
def test_in_each_precision_the_policy_that_is_scored_stays_near_the_one_that_was_sampled(precision, most, flags, tmp_path):
    """`ratio_distance`, the mean of rho - 1 - log rho over a response, cannot cancel."""
    out = train_here(*flags, "--precision", precision, "--max-steps", "2", "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 <= line["ratio_distance"] < most for line in lines), [line["ratio_distance"] for line in lines]


def saved(model, folder):
    model.save_pretrained(folder)
    toy.make_tokenizer().save_pretrained(folder)
    return folder


def test_parameters_that_no_gradient_reaches_are_frozen_and_named_and_an_experts_never(tmp_path, small, server_port):
    text = {**TINY, "vocab_size": len(toy.make_tokenizer()), "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    folder = saved(model, tmp_path / "p")
    out = train_here("--policy", folder, "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", server_port,
                     "--max-new-tokens", "6", "--max-steps", "1", "--num-rollout-samples", "2", "--lr", "1e-2", "--log-dir", tmp_path / "run")  # fmt: skip
    assert out.returncode == 0 and "parameters have no part in the logits" in out.stdout, out.stdout
    before, after = (
        load_file(path) for path in (folder / "model.safetensors", tmp_path / "run/checkpoints/step-000001/model.safetensors")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same and all("vision" in name or "multi_modal" in name for name in same)
    torch.manual_seed(0)
    mixture = without_dropout(MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=8)))
    assert judged(mixture).unused == ()


@pytest.mark.parametrize(("break_it", "reason"), [
    (lambda f: (f / "config.json").write_text("{"), "no config.json that transformers can read"),
    (lambda f: edit(f / "config.json", vocab_size=20), "not a causal language model|tokenizer has"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:3000]), "not a causal language model in safetensors"),
    (lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    (lambda f: edit(f / "config.json", hidden_size="many"), "no config.json|not a causal"),
    (lambda f: edit(f / "generation_config.json", eos_token_id=[2, 5000]), "end token 5000 is outside"),
    (lambda f: edit(f / "config.json", architectures=["LlamaForSequenceClassification"]), "swapped"),
    (lambda f: add_weight(f, "score.weight"), "a classifier's head"),
], ids=["a bad config", "a wrong vocabulary size", "truncated weights", "gptq", "a word for a number", "an end id", "a classifier", "its head"])  # fmt: skip
def test_a_broken_folder_is_one_sentence_and_exit_code_2(small, server_port, tmp_path, break_it, reason):
    import re

    folder = tmp_path / "p"
    shutil.copytree(small / "policy", folder)
    break_it(folder)
    out = train_here("--policy", folder, "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", server_port,
                     "--max-new-tokens", "6", "--log-dir", tmp_path / "run")  # fmt: skip
    last = out.stdout.strip().splitlines()[-1]
    assert out.returncode == 2 and last.startswith("train.py: --policy") and re.search(reason, last), out.stdout
    assert "Traceback" not in out.stdout and not (tmp_path / "run/identity.json").exists(), "no run has begun"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_weight(folder, name):
    save_file({**load_file(folder / "model.safetensors"), name: torch.zeros(1, 64)}, folder / "model.safetensors", {"format": "pt"})


def test_other_unused_weights_of_a_checkpoint_are_one_line(small, tmp_path, capsys):
    shutil.copytree(small / "policy", tmp_path / "p")
    add_weight(tmp_path / "p", "vision_tower.weight")
    load_policy(str(tmp_path / "p"), load_tokenizer(str(tmp_path / "p")), torch.device("cpu"))
    assert "1 weights of the checkpoint are not used (vision_tower.weight)" in capsys.readouterr().err


def phi3(folder, **extra):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **{**TINY, "hidden_size": 32, "num_attention_heads": 4}, num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    return model


def padding_gap(model, total):
    """Largest change of log pi by a neighbour that is `total` tokens long, of a row of 10."""
    rows = [list(range(3, 3 + total - 4)), [4, 5, 6, 7, 8, 9]]
    out = sample(model, rows, [1, 2], Sampling(4, (), 0))
    scorer = Scorer(model)
    args = (out.prompt, out.prompt_mask, out.response, out.mask)
    alone = out.take([1])
    with torch.no_grad():
        return (scorer(*args)[1] - scorer(alone.prompt, alone.prompt_mask, alone.response, alone.mask)[0]).abs().max().item()


def test_the_context_of_a_longrope_model_is_its_original_length_and_beyond_it_neighbours_change_log_pi(tmp_path):
    model = phi3(tmp_path)
    assert context_length(str(tmp_path)) == 16
    assert padding_gap(model, 16) < 1e-5 and padding_gap(model, 24) > 0.01, "what the context hides"


def test_sparse_attention_bounds_the_context_and_a_dynamic_rope_is_hidden_by_its_own(tmp_path):
    config = LlamaConfig(**{**TINY, "vocab_size": 60}, max_position_embeddings=32, initializer_range=0.3,
                         rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})  # fmt: skip
    torch.manual_seed(0)
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path)
    assert context_length(str(tmp_path)) == 32
    assert padding_gap(model, 32) < 1e-5 and padding_gap(model, 44) > 1e-4
    edit(tmp_path / "config.json", index_topk=20)
    assert context_length(str(tmp_path)) == 20


def test_an_encoders_head_computes_in_float32_too(tmp_path):
    from reinforce.serving.reward_model import load_reward_model, score

    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**{**TINY, "vocab_size": len(tokenizer)}, num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_reward_model(str(tmp_path), torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score(model, [[4, i, j] for i in range(5, 25) for j in range(5, 25)], 0)
    assert any(value != float(torch.tensor(value).bfloat16()) for value in scores.tolist())
    assert len(set(scores.tolist())) > 3 * len(set(scores.bfloat16().tolist()))


def test_a_prompt_is_shared_where_log_pi_and_every_gradient_stay_the_same():
    assert judged(tiny_llama()).whole is None
    opt = OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16)
    assert judged(without_dropout(OPTForCausalLM(opt))).whole is None, "learned positions"
    assert judged(tiny_llama(), checkpointing=True).whole is None


def test_a_prompt_is_not_shared_where_a_layer_forgets_or_stops_the_gradient(monkeypatch):
    mistral = MistralConfig(**TINY, num_key_value_heads=2, sliding_window=64)
    assert "not see all earlier" in judged(without_dropout(MistralForCausalLM(mistral))).whole, "though the texts here are shorter"
    by_column = tiny_llama()
    by_column.config.attn_temperature_tuning = True  # as Llama 4's, which reads a token's column
    assert "not see all earlier" in judged(by_column).whole
    attend = SharedPrompts.attend
    monkeypatch.setattr(SharedPrompts, "attend", lambda row, by, q, k, v: attend(row, by, q, k.detach(), v.detach()))
    assert judged(tiny_llama()).whole == "a gradient changes", "equal log pi, but keys and values learn nothing"


@pytest.mark.parametrize("window", [None, 64])
def test_whole_sequences_are_said_with_the_reason_and_only_where_they_run(window, capsys):
    model = without_dropout(MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=window)))
    inputs = SimpleNamespace(
        policy_flag="--policy", data=SimpleNamespace(prompts=[Prompt(i, "", tuple(ids)) for i, ids in enumerate(PROMPTS)]),
        tokenizer=toy.make_tokenizer(), config=SimpleNamespace(gradient_checkpointing=False), end_ids=[2], device=torch.device("cpu"),
    )  # fmt: skip
    loading.inspect(inputs, model, "it")
    told = (
        "--policy it: prompts are computed again for each response, and padding with them (a layer does not see all earlier tokens)"
    )
    assert (told in capsys.readouterr().out) == (window is not None)


def test_a_model_that_computes_nan_is_refused():
    model = tiny_llama()
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ConfigError, match="changes log pi of a token by up to inf nats"):
        judged(model)


def test_checkpointing_that_changes_log_pi_is_refused(monkeypatch):
    def broken(model):
        model.model.layers[0].mlp.down_proj.weight.data.mul_(3)
        return True

    monkeypatch.setattr(guard, "checkpoint_blocks", broken)
    with pytest.raises(ConfigError, match=r"with --gradient-checkpointing: log pi changes by .* leave the flag out"):
        judged(tiny_llama(), checkpointing=True)
