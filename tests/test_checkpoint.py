"""Checkpoints: whole or absent, the best and the last kept."""

import json
import os

import pytest
from conftest import tiny_llama
from transformers import AutoModelForCausalLM

from recipes import toy
from reinforce.run import checkpoint


def save(run, step, reward, keep=1):
    return checkpoint.save(run, step, tiny_llama(), None, toy.make_tokenizer(), {"val_reward": reward}, keep)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_last_checkpoint_and_the_best_of_the_others_are_kept(tmp_path):
    for step, reward in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7)):
        save(tmp_path, step, reward)
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text()) == {"step": 4, "val_reward": 0.7}
    save(tmp_path, 5, 0.1, keep=0)
    assert names(tmp_path) == ["step-000005"]


def test_a_checkpoint_is_an_ordinary_folder_with_tied_weights_once(tmp_path):
    model = toy.LlamaForCausalLM(toy.make_config(toy.make_tokenizer()))
    folder = checkpoint.save(tmp_path, 7, model, None, toy.make_tokenizer(), {}, 1)
    from safetensors.torch import load_file

    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.equal(model.lm_head.weight)


def test_a_kill_before_the_rename_leaves_the_earlier_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 1, 0.5)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, 0.6)
    monkeypatch.undo()
    assert [n for n in names(tmp_path) if n.startswith("step-")] == ["step-000001"]
    save(tmp_path, 2, 0.6)
    assert names(tmp_path) == ["step-000001", "step-000002"], "the half-written one is swept"
