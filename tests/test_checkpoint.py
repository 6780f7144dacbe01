"""Checkpoints: whole or absent, the best and the last kept."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from recipes import toy
from reinforce.errors import ConfigError
from reinforce.run import checkpoint, resume


def save(run, step, rewards, keep=1):
    return checkpoint.save(run, step, tiny_llama(), None, toy.make_tokenizer(), {"val_reward": rewards.get(step)}, keep, rewards)


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_the_last_checkpoint_and_the_best_of_the_others_are_kept(tmp_path):
    rewards = {1: 0.5, 2: 0.9, 4: 0.7, 5: 0.1}
    for step in (1, 2, 3, 4):
        save(tmp_path, step, rewards)
    assert names(tmp_path) == ["step-000002", "step-000004"]
    assert json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text()) == {"step": 4, "val_reward": 0.7}
    save(tmp_path, 5, rewards, keep=0)
    assert names(tmp_path) == ["step-000005"]


def test_a_validation_that_was_made_up_later_counts_for_the_best_checkpoint(tmp_path):
    save(tmp_path, 1, {})
    save(tmp_path, 2, {2: 0.5})
    save(tmp_path, 3, {1: 0.9, 2: 0.5, 3: 0.1})
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_copy_that_a_user_made_beside_the_checkpoints_is_neither_removed_nor_read(tmp_path):
    first = save(tmp_path, 1, {})
    shutil.copytree(first, first.with_name("step-000001-best"))
    save(tmp_path, 2, {}, keep=0)
    assert names(tmp_path) == ["step-000001-best", "step-000002"]
    checkpoint.set_aside(tmp_path, 1)
    assert names(tmp_path) == ["damaged-step-000002", "step-000001-best"] and checkpoint.newest(tmp_path) is None


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_the_new_one_is_there(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1, {})
    monkeypatch.setattr(checkpoint, "_remove", mock.Mock(side_effect=OSError("busy")))
    save(tmp_path, 2, {}, keep=0)
    assert names(tmp_path) == ["step-000001", "step-000002"] and "could not be removed: busy" in capsys.readouterr().err


def test_a_checkpoint_is_an_ordinary_folder_with_tied_weights_once(tmp_path):
    model = toy.LlamaForCausalLM(toy.make_config(toy.make_tokenizer()))
    folder = checkpoint.save(tmp_path, 7, model, None, toy.make_tokenizer(), {}, 1, {})
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.equal(model.lm_head.weight)


def test_a_kill_before_the_rename_leaves_the_earlier_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 1, {1: 0.5})

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, {1: 0.5, 2: 0.6})
    monkeypatch.undo()
    assert [n for n in names(tmp_path) if n.startswith("step-")] == ["step-000001"]
    save(tmp_path, 2, {1: 0.5, 2: 0.6})
    assert names(tmp_path) == ["step-000001", "step-000002"], "the half-written one is swept"


def test_of_checkpoints_that_are_equally_good_the_newer_is_kept(tmp_path):
    """Without validation all are, and the oldest is nobody's choice."""
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {})
    assert names(tmp_path) == ["step-000003", "step-000004"]
    save(tmp_path, 5, {5: 0.5})
    save(tmp_path, 6, {5: 0.5, 6: 0.5})
    assert names(tmp_path) == ["step-000005", "step-000006"]


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_inference_engines_find_the_weights_and_nothing_else(tmp_path):
    """vLLM and SGLang read every *.safetensors beside config.json: each name there must be a parameter of the model."""
    model = tiny_llama()
    folder = checkpoint.save(tmp_path, 3, model, stepped(model), toy.make_tokenizer(), {}, 1, {})
    read = {}
    for path in folder.glob("*.safetensors"):
        read |= load_file(path)
    assert read.keys() <= model.state_dict().keys() and len(read) >= 20
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert "training/optimizer.safetensors" in files and checkpoint.flaw(folder) is None
    place = folder / "training/optimizer.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    assert checkpoint.flaw(folder) == "training/optimizer.safetensors is not what was written (sha256)"


def test_an_optimizer_in_the_old_place_is_still_read(tmp_path):
    model = tiny_llama()
    optimizer = stepped(model)
    folder = checkpoint.save(tmp_path, 3, model, optimizer, toy.make_tokenizer(), {}, 1, {})
    (folder / "training/optimizer.safetensors").rename(folder / "optimizer.safetensors")
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint.restore(folder, model, other)
    place = folder / "optimizer.safetensors"
    place.write_bytes(b"\xff" * place.stat().st_size)  # what is written over the file later is no part of the run
    for p in model.parameters():
        assert all(torch.equal(other.state[p][key], optimizer.state[p][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_files_have_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        model = tiny_llama()
        folder = checkpoint.save(tmp_path, 1, model, stepped(model), toy.make_tokenizer(), {}, 1, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o644}


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path):
    first = save(tmp_path, 1, {})
    shutil.copytree(first, first.with_name("step-000002"))
    assert checkpoint.flaw(first.with_name("step-000002")) == "state.json is of another step"
    assert checkpoint.newest(tmp_path) == first


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    save(tmp_path, 1, {})
    folder = save(tmp_path, 2, {})
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(p)))
                        if p == folder / "model.safetensors" else real(p, *a, **k))  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.newest(tmp_path)


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (save(tmp_path, 1, {}) / "model.safetensors").write_bytes(b"x")
    assert checkpoint.flaw(save(tmp_path, 1, {})) is None and names(tmp_path) == ["step-000001"]


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_under_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1, {})

    def killed(folder, **_):
        (folder / "model.safetensors").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sweep", lambda run: None)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, {}, keep=0)
    assert [folder.name for folder in checkpoint.checkpoints_of(tmp_path)] == ["step-000002"]


def test_the_state_of_an_older_versions_ema_is_read(tmp_path):
    folder = save(tmp_path, 1, {})
    (tmp_path / "identity.json").write_text("{}")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "ema": 0.25}))
    (folder / "manifest.json").unlink()
    checkpoint.seal(folder)
    assert resume.find_start(tmp_path, "auto").baseline == 0.25
