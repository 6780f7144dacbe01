"""A policy's folder: its end tokens, tokenizer, embeddings and weights, and what is refused of them."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from recipes import toy
from reinforce.errors import ConfigError
from reinforce.policy import end_tokens, load_policy, load_tokenizer, refuse_ids
from reinforce.serving.reward_model import load_reward_model


def broken_policy(folder, small, change):
    """A copy of the small policy with one thing wrong."""
    import shutil

    shutil.copytree(small / "policy", folder)
    change(folder)
    return str(folder)


def test_a_model_without_an_end_token_is_refused(small, tmp_path):
    def drop_end(folder):
        for name in ("tokenizer_config.json", "generation_config.json"):
            text = json.loads((folder / name).read_text())
            text.pop("eos_token", None), text.pop("eos_token_id", None)
            (folder / name).write_text(json.dumps(text))

    policy = broken_policy(tmp_path / "p", small, drop_end)
    with pytest.raises(ConfigError, match="no end token"):
        end_tokens(policy, load_tokenizer(policy))


def test_end_tokens_are_those_of_the_generation_config_and_of_the_tokenizer(small, tmp_path):
    policy = broken_policy(tmp_path / "p", small, lambda f: GenerationConfig(eos_token_id=[7, 9]).save_pretrained(f))
    assert end_tokens(policy, load_tokenizer(policy)) == (2, 7, 9)


def test_end_tokens_without_a_generation_config_are_those_of_the_models_config(small, tmp_path):
    def list_two(folder):
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, 7]}))

    policy = broken_policy(tmp_path / "p", small, list_two)
    assert end_tokens(policy, load_tokenizer(policy)) == (2, 7)


@pytest.mark.parametrize("content", [
    '{"num_return_sequences": 3}', '{"eos_token_id": "2"}', '{"eos_token_id": [2, -1]}', '{"max_new_tokens": 0}', "{", "[]",
])  # fmt: skip
def test_a_generation_config_that_cannot_be_used_is_refused_in_one_sentence(small, tmp_path, content):
    policy = broken_policy(tmp_path / "p", small, lambda f: (f / "generation_config.json").write_text(content))
    with pytest.raises(ConfigError, match=r"generation_config\.json|eos_token_id") as refused:
        end_tokens(policy, load_tokenizer(policy))
    assert "\n" not in str(refused.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    tokenizer = toy.make_tokenizer()
    tiny_llama(vocabulary=20).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer has ids up to \d+, the model 20 tokens"):
        load_policy(str(tmp_path), tokenizer, "cpu")


def test_tokens_that_were_added_beyond_the_model_are_refused_only_in_a_text(tmp_path):
    """Gemma 3's text models have none for an image."""
    tokenizer = toy.make_tokenizer()
    rows = len(tokenizer)
    tiny_llama(vocabulary=rows).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = load_policy(str(tmp_path), tokenizer, "cpu")
    refuse_ids(model, [tokenizer("anna on the pizza")["input_ids"]], "--policy X")
    with pytest.raises(ConfigError, match=f"--policy X: a text holds the token {rows}"):
        refuse_ids(model, [tokenizer("anna on <image>")["input_ids"]], "--policy X")


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_token_and_says_so(small, tmp_path, capsys):
    def drop_pad(folder):
        text = json.loads((folder / "tokenizer_config.json").read_text())
        text.pop("pad_token")
        (folder / "tokenizer_config.json").write_text(json.dumps(text))

    tokenizer = load_tokenizer(broken_policy(tmp_path / "p", small, drop_pad))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "no pad token" in capsys.readouterr().out


def test_a_policy_that_lacks_a_weight_is_refused(small, tmp_path):
    folder = shutil.copytree(small / "policy", tmp_path / "p")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"\(missing model.layers.0.mlp.up_proj.weight\)"):
        load_policy(str(folder), load_tokenizer(str(folder)), torch.device("cpu"))


def test_a_tokenizer_with_neither_pad_nor_end_token_is_refused_though_the_generation_config_has_one(small, tmp_path):
    def drop(folder):
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                text = {k: v for k, v in json.loads((folder / name).read_text()).items() if k not in ("pad_token", "eos_token")}
                (folder / name).write_text(json.dumps(text))

    with pytest.raises(ConfigError, match="neither pad nor end token"):
        load_tokenizer(broken_policy(tmp_path / "p", small, drop))


def test_what_is_copied_over_the_files_of_a_loaded_model_changes_nothing(small, tmp_path):
    """On a CPU safetensors' weights are pages of the file: a run went on from the other model, and said nothing."""
    for name in ("policy", "reward_model"):
        folder = tmp_path / name
        shutil.copytree(small / name, folder)
        if name == "policy":
            model = load_policy(str(folder), load_tokenizer(str(folder)), torch.device("cpu"))
        else:
            model, _ = load_reward_model(str(folder), torch.device("cpu"))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        weights = folder / "model.safetensors"
        weights.write_bytes(b"\xff" * weights.stat().st_size)  # in place, as cp does
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        if name == "policy":
            assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay one"
