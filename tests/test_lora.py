"""LoRA: adapters alone are trained, the reference is the policy without them, and a checkpoint is a folder that PEFT opens."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lora_probe
import pytest
import torch
from conftest import ROOT, environment, metrics, recipe, script, small_flags, tiny_gpt2, tiny_llama, train_here
from safetensors.torch import load_file, save_file
from test_split import errors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    JetMoeConfig,
    JetMoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from recipes import chat, evaluate, merge, sft, train_rm
from reinforce import adapter, lora
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.logprobs import Scorer
from reinforce.policy import blocks, load_policy, load_tokenizer, store_frozen
from reinforce.run import checkpoint, loading
from reinforce.run.config import TrainConfig
from reinforce.run.loading import set_up

IDS = torch.tensor([[5, 7, 9, 11, 3], [4, 4, 8, 20, 6]])
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model, rank=2, alpha=3.0, drawn=True, targets=()):
    """The model with adapters, whose B is drawn as after some training."""
    lora.add(model, lora.layers(blocks(model), model, targets), rank, alpha, seed=0)
    draw = torch.Generator().manual_seed(1)
    for one in lora.adapters(model).values() if drawn else ():
        one.B.data.normal_(std=0.3, generator=draw)
    return model


# The layer


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_new_adapter_changes_no_bit_and_an_adapter_that_is_off_none_either(make):
    before = make()(IDS).logits
    assert adapted(make(), drawn=False)(IDS).logits.equal(before)
    model = adapted(make())
    assert (model(IDS).logits - before).abs().max() > 0.1
    with lora.off(model):
        assert model(IDS).logits.equal(before)
    assert (model(IDS).logits - before).abs().max() > 0.1


def test_an_adapted_layer_computes_w_x_plus_alpha_over_r_b_a_x():
    model = adapted(tiny_llama())
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 5, 32)
    expected = x @ (layer.weight + 3.0 / 2 * layer.lora.B @ layer.lora.A).T
    torch.testing.assert_close(layer(x), expected)
    assert layer.lora.A.shape == (2, 32) and layer.lora.B.shape == (16, 2)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_merged_model_is_an_ordinary_one_with_the_adapted_model_s_logits(make):
    model = adapted(make())
    expected, names = model(IDS).logits.detach(), set(make().state_dict())
    lora.merge(model)
    assert set(model.state_dict()) == names and not lora.adapters(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_of_a_and_b_are_those_of_the_merged_weight_by_the_chain_rule(make):
    """With G = dL/dW of the merged weight: dL/dB = s G A^T and dL/dA = s B^T G."""
    model, whole = adapted(make()), adapted(make())
    lora.merge(whole)
    for one in (model, whole):
        one(IDS).logits.log_softmax(-1)[:, :, 7].sum().backward()
    for name, one in lora.adapters(model).items():
        grad = whole.get_submodule(name).weight.grad
        grad = grad.T if one.transposed else grad  # (out, in)
        torch.testing.assert_close(one.B.grad, 1.5 * grad @ one.A.T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.A.grad, 1.5 * one.B.T @ grad, atol=1e-4, rtol=1e-4)
    assert all((p.grad is not None) == ("lora" in name) for name, p in model.named_parameters())


def test_all_linear_layers_of_the_blocks_are_adapted_by_default_and_neither_head_nor_embeddings():
    model = tiny_llama()
    every = lora.layers(blocks(model), model, ())
    assert len(every) == 14 and {lora.last_name(name) for name in every} == LLAMA_LAYERS
    some = lora.layers(blocks(model), model, ("q_proj", "0.mlp.up_proj"))
    assert some == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    for target in ("lm_head", "embed_tokens", "proj", "Q_proj"):
        with pytest.raises(
            ConfigError, match=f"--lora-targets {target}: no linear layer of the model's blocks has this name; it has"
        ):
            lora.layers(blocks(model), model, ("q_proj", target))


def test_a_router_that_is_a_linear_layer_gets_no_adapter():
    """Its forward gives a tuple, to which nothing can be added."""
    config = PhimoeConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    model = PhimoeForCausalLM(config).eval()
    names = lora.layers(blocks(model), model, ())
    assert names and not any("router" in name or "gate" in name for name in names)
    adapted(model)(input_ids=IDS)


def test_the_layer_of_a_router_that_is_a_module_gets_no_adapter():
    config = JetMoeConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2,
                          kv_channels=16, num_local_experts=4)  # fmt: skip
    model = JetMoeForCausalLM(config).eval()
    assert any("router" in name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    names = lora.layers(blocks(model), model, ())
    assert names and not any("router" in name for name in names)


def test_frozen_weights_are_stored_as_autocast_would_cast_them_and_give_the_same_bits():
    models = [adapted(tiny_llama()) for _ in range(2)]
    store_frozen(models[1], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = (model.model(IDS).last_hidden_state for model in models)
    assert one.equal(other)
    kinds = {p.dtype for name, p in models[1].named_parameters() if "lora" in name}
    assert kinds == {torch.float32} and models[1].model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


# The run


@pytest.fixture(scope="module")
def flags(small, server_port):
    more = ["--lora-rank", "3", "--lr", "0.05", "--max-epochs", "9", "--precision", "fp32", "--device", "cpu"]
    return [*map(str, small_flags(small, server_port)), *more]


@pytest.fixture(scope="module")
def six(flags, tmp_path_factory):
    """A run of six steps, with a checkpoint after the third."""
    run = tmp_path_factory.mktemp("lora") / "run"
    out = train_here(*flags, "--max-steps", "6", "--save-interval", "3", "--save-top-k", "9", "--log-dir", run)
    assert out.returncode == 0 and "LoRA: rank 3, alpha 6, 14 layers" in out.stdout, out.stdout
    return run


def actor_of(flags, *more):
    return set_up(parse(TrainConfig, "", [*flags, *more]))


def test_the_reference_is_the_policy_without_its_adapters_and_no_second_model(small, flags):
    """Its log pi has the bits of the initial policy's own, at the start and when the adapters have changed."""
    actor, data = actor_of(flags)
    out = actor.sample(data.prompts[:3], 0)
    tokenizer = load_tokenizer(str(small / "policy"))
    initial = Scorer(
        load_policy(str(small / "policy"), tokenizer, actor.device), plain=True, shares_prompt=actor.policy.shares_prompt
    )
    expected = actor.score(initial.to(actor.device), out)
    assert actor.reference_logp(out).equal(expected) and actor.score(actor.scorer, out).equal(expected), "KL 0 at the first step"
    for one in lora.adapters(actor.model).values():
        one.B.data.normal_(std=0.3)
    assert actor.reference_logp(out).equal(expected) and not actor.score(actor.scorer, out).equal(expected)
    reached = {id(p) for p in actor.reference.parameters()}
    assert reached == {id(p) for p in actor.model.parameters()}


@pytest.fixture(scope="module")
def worlds(small, tmp_path_factory):
    """What lora_probe.py finds on one process and on two."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "policy").symlink_to(small / "policy")
    lora_probe.main(folder)
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "tests/lora_probe.py", folder,
                 OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode == 0, out.stdout
    return {n: torch.load(folder / f"world-{n}.pt") for n in (1, 2)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("variant", lora_probe.VARIANTS)
def test_every_split_gives_the_gradient_of_one_process(worlds, world, variant):
    found, right = worlds[world][variant], worlds[1]["ddp"]
    gradient, moved = errors(found, right, right["start"])
    if "bf16" in variant:
        assert 1e-4 < gradient <= 5e-2
        return
    assert found["tokens"] == right["tokens"] and gradient <= 1e-5 and moved <= 1e-3
    assert right["gradient"].norm() > 0.1 and (right["end"] - right["start"]).norm() > 0.01
    assert (found["reference"] - right["reference"]).abs().max() <= 1e-4 < (right["reference"]).abs().max()


def assert_same_end(a, b):
    """Two runs with the same adapters, averages and logs, but for times."""
    x, y = (checkpoint.checkpoints_of(run)[-1] for run in (a, b))
    assert x.name == y.name == "step-000006"
    for name in (adapter.WEIGHTS, "training/optimizer.safetensors"):
        one, other = load_file(x / name), load_file(y / name)
        assert one.keys() == other.keys() and len(one) >= 28 and all(one[key].equal(other[key]) for key in one)
    for name in ("rollouts.jsonl", "validation.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    kept = [
        [{k: v for k, v in line.items() if "time_" not in k and k != "tokens_per_s"} for line in metrics(run)] for run in (a, b)
    ]
    assert kept[0] == kept[1]


def test_three_steps_a_sigkill_and_three_steps_are_six_steps_bitwise(flags, six, tmp_path):
    run = tmp_path / "run"
    words = [*flags, "--max-steps", "6", "--save-interval", "3", "--save-top-k", "9", "--log-dir", str(run)]
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS=torch.get_num_threads()),
        stdout=subprocess.DEVNULL,
    )
    while not (run / "checkpoints/step-000003").exists():
        assert process.poll() is None, "the run has ended by itself"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [folder.name for folder in checkpoint.checkpoints_of(run)] == ["step-000003"]
    out = train_here(*words)
    assert out.returncode == 0 and "going on after step 3 of 6" in out.stdout, out.stdout
    assert_same_end(run, six)


@pytest.mark.parametrize(("change", "reason"), [
    (["--lora-rank", "4"], "lora_rank was 3, is 4"),
    (["--lora-alpha", "3"], "lora_alpha was None, is 3.0"),
    (["--lora-targets", "q_proj"], "lora_targets was [], is ['q_proj']"),
])  # fmt: skip
def test_a_run_with_another_rank_alpha_or_target_is_another_run(flags, six, change, reason):
    out = train_here(*flags, *change, "--max-steps", "7", "--log-dir", six)
    assert out.returncode == 2 and f"holds another run: {reason}" in out.stdout


def test_to_give_the_default_alpha_is_no_other_run(flags, six):
    out = train_here(*flags, "--lora-alpha", "6", "--max-steps", "6", "--log-dir", six)
    assert out.returncode == 0 and "this run has all its 6 steps" in out.stdout


# The folder


@pytest.fixture
def trained(six, small):
    """Folder and logits of the run's end, from its adapter by hand: W + s B A in an ordinary model of transformers."""
    folder = checkpoint.checkpoints_of(six)[-1]
    model, stored = AutoModelForCausalLM.from_pretrained(small / "policy"), load_file(folder / adapter.WEIGHTS)
    with torch.no_grad():
        for name, module in model.named_modules():
            key = f"base_model.model.{name}.lora_"
            if f"{key}A.weight" in stored:
                module.weight += 2.0 * stored.pop(f"{key}B.weight") @ stored.pop(f"{key}A.weight")
        assert not stored
        return SimpleNamespace(folder=folder, logits=model(IDS).logits, initial=small / "policy")


def test_a_checkpoint_has_the_adapters_alone_and_its_manifest_finds_damage(trained, tmp_path):
    settings = json.loads((trained.folder / adapter.CONFIG).read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 6 and settings["target_modules"] == sorted(LLAMA_LAYERS)
    assert settings["base_model_name_or_path"] == str(trained.initial)
    assert not list(trained.folder.glob("model*")) and checkpoint.flaw(trained.folder) is None
    sizes = [(f / n).stat().st_size for f, n in ((trained.folder, adapter.WEIGHTS), (trained.initial, "model.safetensors"))]
    assert sizes[0] < sizes[1] / 5
    copy = shutil.copytree(trained.folder, tmp_path / trained.folder.name)
    (copy / adapter.WEIGHTS).write_bytes((copy / adapter.WEIGHTS).read_bytes()[:-1])
    assert "adapter_model.safetensors has" in checkpoint.flaw(copy)


def test_load_policy_opens_a_checkpoint_as_its_base_with_the_adapter_merged(trained):
    tokenizer = load_tokenizer(str(trained.folder))
    model = load_policy(str(trained.folder), tokenizer, torch.device("cpu"))
    torch.testing.assert_close(model(IDS).logits, trained.logits, atol=1e-5, rtol=1e-5)
    initial = AutoModelForCausalLM.from_pretrained(trained.initial)
    assert (initial(IDS).logits - trained.logits).abs().max() > 0.05, "training has changed it"


def test_merge_py_writes_a_folder_that_transformers_and_train_py_open(trained, flags, tmp_path):
    code, out = recipe(merge, "--policy", trained.folder, "--out", tmp_path / "whole")
    assert code == 0, out
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model(IDS).logits, trained.logits, atol=1e-5, rtol=1e-5)
    out = train_here(*flags, "--policy", tmp_path / "whole", "--max-steps", "1", "--log-dir", tmp_path / "run")
    assert out.returncode == 0, out.stdout


def test_an_adapter_without_a_tokenizer_has_its_base_s(trained, tmp_path):
    """PEFT saves none."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(trained.folder) / name, tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == load_tokenizer(str(trained.folder)).get_vocab()


def test_peft_opens_a_checkpoint(trained):
    """peft is a package for development alone."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(trained.initial)
    model = peft.PeftModel.from_pretrained(base, trained.folder)
    torch.testing.assert_close(model(IDS).logits, trained.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [(), ("attn.c_proj", "c_fc")])
def test_peft_opens_an_adapter_of_gpt2_and_of_some_layers(tmp_path, targets):
    peft = pytest.importorskip("peft")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), targets=targets).eval()
    (tmp_path / "adapter").mkdir()
    adapter.write(model, tmp_path / "adapter", {key: value.detach() for key, value in adapter.tensors(model).items()})
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(opened(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert sum("lora_A" in name for name, _ in opened.named_parameters()) == len(lora.adapters(model))


def test_evaluation_and_chat_open_a_checkpoint(six, small, server_port):
    address = ["--run", six, "--rm-host", "127.0.0.1", "--rm-port", server_port]
    code, out = recipe(evaluate, *address)
    assert code == 0, out
    assert json.loads((six / "evaluation.json").read_text())["kl"]["mean"] > 0.01
    code, out = recipe(chat, "--policy", checkpoint.checkpoints_of(six)[-1], "--max-new-tokens", "4", stdin="anna\n")
    assert code == 0 and "policy: " in out


# The other trainings


def changes(folder, initial, kind):
    """What training has done to each weight that both models have."""
    before, after = (dict(kind.from_pretrained(path).named_parameters()) for path in (initial, folder))
    return {name: (after[name] - before[name]).detach() for name in before if name in after}


@pytest.mark.parametrize("what", ["sft", "reward model"])
def test_sft_and_reward_models_learn_by_lora_and_their_folders_are_ordinary(small, pairs, tmp_path, what):
    """Every change of a weight has the adapter's rank, and what is in no block stays as it was."""
    words = ["--model", small / "policy", "--out", tmp_path / "out", "--lora-rank", "2", "--lr", "2e-2"]
    if what == "sft":
        code, out = recipe(sft, *words, "--data", pairs, "--val-data", pairs)
        change = changes(tmp_path / "out", small / "policy", AutoModelForCausalLM)
    else:
        code, out = recipe(train_rm, *words, "--pairs", pairs, "--epochs", "8")
        change = changes(tmp_path / "out", small / "policy", AutoModelForSequenceClassification)
        del change["score.weight"]
    assert code == 0 and "LoRA: rank 2, alpha 4, 14 layers" in out, out
    for name, moved in change.items():
        if ".layers." in name and moved.ndim == 2:
            assert moved.norm() > 0 and torch.linalg.matrix_rank(moved, rtol=1e-4) <= 2, name
        else:
            assert not moved.any(), name
    if what == "sft":
        before, after = (float(word) for word in out.split("--val-data: ")[2 if out.count("--val-data: ") > 1 else 1].split() if "." in word and word.replace(".", "", 1).isdigit())  # fmt: skip
        assert after < before - 0.3
    else:
        assert float(out.split("held-out accuracy ")[1].split()[0]) > 0.6


# Refusals: one sentence, code 2


@pytest.mark.parametrize(("more", "reason"), [
    (["--lora-targets", "qproj"], "--lora-targets qproj: no linear layer of the model's blocks has this name; it has down_proj, gate_proj"),
    (["--lora-rank", "-1"], "--lora-rank is -1; it must not be negative"),
    (["--lora-alpha", "0"], "--lora-alpha is 0.0; it must be positive and finite"),
    (["--lora-alpha", "nan"], "--lora-alpha is nan; it must be positive and finite"),
    (["--lora-rank", "0", "--lora-alpha", "8"], "--lora-alpha goes with --lora-rank"),
    (["--lora-rank", "0", "--lora-targets", "q_proj"], "--lora-targets goes with --lora-rank"),
    (["--tensor-model-parallel-size", "2"], "--lora-rank adapts whole layers, not those of --tensor-model-parallel-size"),
    (["--offload-reference"], "--offload-reference: with --lora-rank the reference is the policy itself"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused_in_one_sentence(flags, tmp_path, more, reason):
    out = train_here(*flags, *more, "--log-dir", tmp_path / "run")
    assert out.returncode == 2 and reason in out.stdout and "Traceback" not in out.stdout, out.stdout
    assert not (tmp_path / "run/checkpoints").exists()


def edit(folder, **change):
    path = folder / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda f: edit(f, base_model_name_or_path="/nowhere/policy"), "an adapter of /nowhere/policy, which is no folder here"),
    (lambda f: edit(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
    (lambda f: edit(f, use_dora=True), "is not one of plain LoRA (use_dora)"),
    (lambda f: edit(f, peft_type="IA3"), "is not one of plain LoRA"),
    (lambda f: edit(f, r=4), "does not fit the base model's layer"),
    (lambda f: (f / adapter.CONFIG).write_text("[]"), "cannot be used"),
    (lambda f: (f / adapter.WEIGHTS).write_bytes(b"x"), "adapter_model.safetensors cannot be read"),
    (lambda f: save_file({"base_model.model.x.lora_A.weight": torch.ones(3, 2)}, f / adapter.WEIGHTS), "no linear layer x"),
    (lambda f: save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(3, 2)}, f / adapter.WEIGHTS), "does not fit"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_opened_is_refused_in_one_sentence(trained, tmp_path, damage, reason):
    folder = shutil.copytree(trained.folder, tmp_path / "adapter")
    damage(folder)
    code, out = recipe(merge, "--policy", folder, "--out", tmp_path / "whole")
    assert code == 2 and reason in out and str(folder) in out and "Traceback" not in out, out


def test_an_adapter_as_policy_is_refused_with_the_command_that_merges_it(trained, flags, tmp_path):
    out = train_here(*flags, "--policy", trained.folder, "--log-dir", tmp_path / "run")
    assert out.returncode == 2 and f"python recipes/merge.py --policy {trained.folder} --out FOLDER" in out.stdout
    code, out = recipe(merge, "--policy", trained.initial, "--out", tmp_path / "whole")
    assert code == 2 and "no folder with adapter_config.json" in out


def test_an_adapters_own_alpha_counts_when_it_is_merged(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    model, base = (
        adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")),
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
    )
    adapter.write(model, tmp_path / "adapter", {key: value.detach() for key, value in adapter.tensors(model).items()})
    adapter.merge_into(base, str(tmp_path / "adapter"), "--policy")
    torch.testing.assert_close(base(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_alpha_and_targets_of_the_flags_are_those_of_the_adapters():
    config = TrainConfig(lora_rank=2, lora_alpha=3.0, lora_targets=("q_proj",))
    loading.add_adapters(SimpleNamespace(config=config, start=SimpleNamespace(folder=None)), model := tiny_llama())
    found = lora.adapters(model)
    assert len(found) == 2 and all(name.endswith("q_proj") and one.scale == 1.5 for name, one in found.items())
