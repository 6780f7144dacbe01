"""Under FSDP a rank reads its shards alone: the values are the file's, and runs are bitwise those of whole models."""

import shutil

import pytest
import torch
from conftest import ROOT, script, small_flags, tiny_gpt2, tiny_llama, torchrun
from safetensors.torch import load_file, save_file
from same_run import assert_same

from reinforce.run import shards


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_each_rank_gets_the_slices_of_the_file(tmp_path, ranks):
    """Tied and untied weights, learned positions; also with the shards on the host."""
    for name, model in {"tied": tiny_llama(tie_word_embeddings=True), "untied": tiny_llama(), "gpt2": tiny_gpt2()}.items():
        model.save_pretrained(tmp_path / name)
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, ROOT / "tests/shards_probe.py", tmp_path,
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode == 0 and (tmp_path / "ok").exists(), out.stdout


def extended(folder, **tensors):
    """The folder, its file with other tensors as well."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("name", ["model.more.weight", "lm_head.weight"])
def test_a_file_with_other_names_than_the_model_s_is_loaded_whole(tmp_path, name):
    """A tied head that the file holds as well may differ from the embeddings; what transformers makes of it is its business."""
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert shards.build(str(tmp_path)) is not None
    assert shards.build(extended(tmp_path, **{name: torch.ones(50, 16)})) is None


def test_another_shape_and_a_name_of_the_hub_are_loaded_whole(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    assert shards.build(extended(tmp_path, **{"model.norm.weight": torch.ones(17)})) is None
    assert shards.build("somebody/model") is None


@pytest.mark.parametrize("index", [False, True])
def test_a_folder_with_other_safetensors_beside_the_model_s_is_loaded_whole(tmp_path, index):
    """A reader of all files would take some of its weights from the others, without a word."""
    tiny_llama().save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if index else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == index and shards.build(str(tmp_path)) is not None
    other = next(tmp_path.glob("*.safetensors"))
    shutil.copy(other, tmp_path / "backup-model.safetensors")
    assert shards.build(str(tmp_path)) is None
    (tmp_path / "backup-model.safetensors").rename(
        tmp_path / ("model.safetensors" if index else "model-00001-of-00001.safetensors")
    )
    assert shards.build(str(tmp_path)) is None


def test_parameters_have_memory_again_after_a_build(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    shards.build(str(tmp_path))
    assert not torch.nn.Linear(2, 2).weight.is_meta


@pytest.mark.slow
def test_a_run_of_shards_is_bitwise_the_run_of_whole_models(small, server_port, tmp_path):
    """The same weights beside a tensor that no model has are loaded whole; the policy's digest differs, so two runs."""
    shutil.copytree(small / "policy", tmp_path / "policy")
    extended(tmp_path / "policy", unused=torch.ones(1))
    flags = small_flags(small, server_port)
    for name, policy in (("shards", small / "policy"), ("whole", tmp_path / "policy")):
        words = [*flags, "--policy", policy, "--parallel", "fsdp", "--max-steps", 2, "--log-dir", tmp_path / name]
        out = torchrun(2, *words)
        assert out.returncode == 0 and ("not used (unused)" in out.stdout) == (name == "whole"), out.stdout
    assert_same(tmp_path / "shards", tmp_path / "whole")
