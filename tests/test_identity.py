"""Which run a folder holds: a command that means another one is refused, with the difference."""

import datetime
import json
import shutil

import pytest
import torch
from conftest import train_here
from same_run import assert_same, go, untimed

from reinforce.run import resume
from reinforce.run.config import TrainConfig


@pytest.mark.parametrize(("change", "told"), [
    (["--lr", "0.02"], "lr was 0.01, is 0.02"), (["--seed", "1"], "seed was 0, is 1"), (["--temperature", "0.9"], "temperature was 1.0, is 0.9"),
    (["--baseline", "rloo"], "baseline was ema, is rloo"), (["--num-rollout-samples", "6"], "num_rollout_samples was 7, is 6"),
])  # fmt: skip
def test_another_configuration_is_refused_with_the_difference(six, change, told):
    flags, right = six
    own = ("exit.json", ".lock")  # exit.json tells of the last command
    before = {p: p.stat().st_mtime_ns for p in right.rglob("*") if p.is_file() and p.name not in own}
    out = train_here(*flags, "--lr", "0.01", "--max-epochs", "99", "--max-steps", "6", "--log-dir", right, *change)
    assert out.returncode == 2 and told in out.stdout and "holds another run" in out.stdout, out.stdout
    assert out.stdout.count(" was ") == 1
    assert {p: p.stat().st_mtime_ns for p in right.rglob("*") if p.is_file() and p.name not in own} == before


def test_other_prompts_another_policy_and_another_reward_model_are_another_run(six, small, tmp_path):
    flags, right = six
    own = json.loads((right / "identity.json").read_text())
    fewer = tmp_path / "train.jsonl"
    fewer.write_text("".join((small / "train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    out = go([*flags, "--train-data", fewer], right, 6, code=2)
    assert "prompts was" in out and "policy was" not in out
    other = shutil.copytree(small / "reward_model", tmp_path / "policy")
    assert resume.weights(str(other)) != own["policy"] == resume.weights(str(small / "policy"))
    assert own["reward_model"] and len(own["reward_model"]) == 64
    moved = shutil.copytree(small / "policy", tmp_path / "moved")
    assert "has all its 6 steps" in go([*flags, "--policy", moved], right, 6), "the same policy in another place is the same"


def test_prompts_that_draw_other_numbers_or_reach_the_reward_in_another_form_are_another_run(six, small, tmp_path):
    """A line that is too long is left out, but counts; messages are not scored as text."""
    flags, _ = six
    prompts = (small / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "max on the film in paris : " * 40}) + "\n" + prompts)
    own = [*flags, "--train-data", tmp_path / "train.jsonl"]
    go(own, tmp_path / "run", 1)
    (tmp_path / "train.jsonl").write_text(prompts)
    assert "holds another run: prompt_lines was" in go(own, tmp_path / "run", 2, code=2)


def test_flags_that_only_cut_the_work_otherwise_may_change(six, tmp_path):
    flags, right = six
    run = tmp_path / "run"
    go(flags, run, 3)
    out = go(flags, run, 6, "--micro-batch-size", "3", "--save-interval", "2", "--gradient-checkpointing", "--parallel", "fsdp")
    assert "going on after step 3" in out
    for a, b in zip(untimed(run), untimed(right), strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_flags_that_say_the_same_in_other_words_are_no_other_run(six, tmp_path):
    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    same = ("--min-lr", "0.01", "--global-batch-size", "14")
    assert "has all its 6 steps" in go(flags, tmp_path / "run", 6, *same)
    assert "global_batch_size was None, is 2" in go(flags, tmp_path / "run", 6, "--global-batch-size", "2", code=2)


HARD = """
    adam_betas baseline constant_steps ema_decay end_strings global_batch_size initial_policy_kl_penalty kl kl_reduce loss_norm lora_alpha
    lora_rank lora_targets lr max_grad_norm max_new_tokens max_prompt_length min_lr min_new_tokens missing_eos_penalty num_rollout_samples
    num_rollouts_per_prompt precision ratio_clip rm_format seed temperature top_k top_p truncated val_greedy val_temperature val_top_k
    val_top_p warmup_steps weight_decay
"""


def test_a_flag_is_soft_only_if_it_is_not_named_here():
    """A new soft flag is a decision: a run goes on under another value of it."""
    import dataclasses

    assert {f.name for f in dataclasses.fields(TrainConfig)} >= resume.SOFT
    assert set(resume.identity(TrainConfig(), policy="x")) == {*HARD.split(), "policy"}


def test_a_decaying_rate_ties_a_run_to_its_end_and_a_younger_flag_counts_as_its_default(six, tmp_path):
    flags, right = six
    go(flags, tmp_path / "run", 2, "--min-lr", "0.001")
    assert "total_steps was 2, is 6" in go(flags, tmp_path / "run", 6, "--min-lr", "0.001", code=2)
    run = shutil.copytree(right, tmp_path / "old")
    there = json.loads((run / "identity.json").read_text())
    del there["ratio_clip"]
    (run / "identity.json").write_text(json.dumps(there))
    go(flags, run, 6)
    assert "ratio_clip was 0.2, is 0.3" in go(flags, run, 6, "--ratio-clip", "0.3", code=2)


def test_another_run_is_refused_before_any_model_is_loaded(six, tmp_path, monkeypatch):
    """And the identity of a run that the guard refuses is never written, so its folder is free for the right command."""
    from reinforce.run import loading

    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    monkeypatch.setattr(loading, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "holds another run" in go(flags, tmp_path / "run", 6, "--temperature", "0.7", code=2)


def test_a_run_that_began_with_other_defaults_goes_on_with_its_own(six, tmp_path):
    """What the toy's defaults were for any policy is a language model's now; the same command is the same run."""
    flags, _ = six
    i = flags.index("--max-new-tokens")
    bare = [*flags[:i], *flags[i + 2 :]]
    go(flags, tmp_path / "run", 2)
    assert "responses of at most 8 tokens" in go(bare, tmp_path / "run", 3)
    assert "max_new_tokens was 8, is 9" in go([*bare, "--max-new-tokens", "9"], tmp_path / "run", 4, code=2)


def test_validation_samples_the_policy_that_is_trained_and_a_run_keeps_the_temperature_it_began_with(tmp_path):
    assert TrainConfig(temperature=0.7).filled().val_temperature == 0.7
    assert TrainConfig(temperature=0.7, val_temperature=0.5).filled().val_temperature == 0.5
    (tmp_path / "identity.json").write_text(json.dumps({"temperature": 0.7, "val_temperature": 1.0}))
    assert TrainConfig(temperature=0.7).filled(dict(resume.filled_of(tmp_path))).val_temperature == 1.0


def test_a_digest_takes_what_a_table_may_hold_beside_text():
    day = datetime.datetime(2024, 5, 1)
    assert resume.digest([{"role": "user", "sent": day}]) != resume.digest([{"role": "user", "sent": day.replace(day=2)}])


TODAY = "{% for m in messages %}on {{ strftime_now(format='%d') }} : {{ m.content }} {% endfor %}"


def test_a_chat_template_that_prints_the_day_gives_the_same_prompts_when_the_run_goes_on_tomorrow(
    small, server_port, tmp_path, monkeypatch
):
    policy = tmp_path / "policy"
    shutil.copytree(small / "policy", policy)
    (policy / "chat_template.jinja").write_text(TODAY)
    chats = [{"messages": [{"role": "user", "content": f"anna on the {thing}"}]} for thing in ("pizza", "hotel", "film", "phone")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    flags = ["--policy", policy, "--train-data", tmp_path / "chats.jsonl", "--rm-host", "127.0.0.1", "--rm-port", server_port,
             "--num-rollout-samples", "4", "--max-new-tokens", "6", "--save-interval", "1", "--rm-format", "query"]  # fmt: skip

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2099, 1, 17)

    go(flags, tmp_path / "run", 1)
    go(flags, tmp_path / "whole", 2)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    go(flags, tmp_path / "run", 2)
    assert_same(tmp_path / "run", tmp_path / "whole")
    kept = tmp_path / "run/checkpoints/step-000002/chat_template.jinja"
    assert kept.read_text() == TODAY and json.loads((tmp_path / "run/identity.json").read_text())["date"]
    assert resume.date_of(tmp_path / "run") == datetime.date.today().isoformat() and resume.date_of(tmp_path) is None


def test_auto_precision_goes_on_as_the_run_began_and_is_one_rule_for_all_processors(six, tmp_path, monkeypatch):
    from reinforce import device as devices

    cpu = torch.device("cpu")
    for has, fast in (
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert devices.bf16_is_fast(cpu) == fast
    monkeypatch.setattr(devices, "SMALL", 0)
    flags, right = six
    shutil.copytree(right, tmp_path / "run")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert "fp32" in go(flags, tmp_path / "run", 7), "not bf16, which this processor is faster in"
    assert "precision was auto, is bf16" in go(flags, tmp_path / "run", 8, "--precision", "bf16", code=2)
