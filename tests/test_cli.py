"""Bad input: one sentence that names the flag and the fix, exit code 2, no traceback, and no model loaded."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, metrics, script, train_here
from transformers import LlamaForSequenceClassification

from recipes import toy
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.policy import context_length, load_policy, load_tokenizer
from reinforce.run import distributed, setup
from reinforce.run.config import TrainConfig
from reinforce.serving.config import ServeConfig
from reinforce.serving.load import load_reward

HERE = ["--rm-host", "127.0.0.1", "--rm-port", "9"]


@pytest.mark.parametrize(("flags", "reason"), [
    (["--baseline", "critic"], "--baseline"), (["--num-rollouts-per-prompt", "1"], "--num-rollouts-per-prompt is 1"),
    (["--baseline", "grpo", "--num-rollouts-per-prompt", "1"], "--baseline grpo"), (["--top-p", "0.9"], "--top-k and --top-p"),
    (["--top-k", "5"], "--top-k and --top-p"), (["--lr", "0"], "--lr"), (["--lr", "fast"], "--lr"), (["--max-steps", "0"], "--max-steps"),
    (["--rollout-micro-batch-size", "3"], "smaller than a group"), (["--min-new-tokens", "24"], "--min-new-tokens 24"),
    (["--policy", "x"], "--policy without --train-data"), (["--train-data", "x"], "come as a set"), (HERE, "come as a set"),
    (["--rm-host", "x"], "--rm-host and --rm-port"), (["--ema-decay", "1"], "--ema-decay"), (["--end-strings", ""], "--end-strings"),
    (["--num-rollouts", "3"], "unrecognized"), (["--temperature", "0"], "--temperature"), (["--adam-betas", "0.9", "1"], "--adam-betas"),
    (["--global-batch-size", "6"], "--global-batch-size 6 must be a multiple"), (["--global-batch-size", "0"], "--global-batch-size 0"),
    (["--reward-fn", "a.py:f"], "serve_rm.py"), (["--reward-model=x"], "serve_rm.py"),
    (["--global-batch-size", "128"], "divides"), (["--global-batch-size", "12"], "divides"), (["--ratio-clip", "0"], "--ratio-clip"),
    (["--truncated", "penalize"], "--missing-eos-penalty"), (["--missing-eos-penalty", "1"], "come together"),
    (["--truncated", "penalize", "--missing-eos-penalty", "-1"], "--missing-eos-penalty is -1.0"), (["--kl", "k3"], "--kl"),
    (["--kl-reduce", "max"], "--kl-reduce"), (["--loss-norm", "batch"], "--loss-norm"), (["--preset", "trl"], "--preset"),
    (["--initial-policy-kl-penalty", "-1"], "--initial-policy-kl-penalty"), (["--val-top-p", "0"], "--val-top-p"),
    (["--warmup-steps", "9" * 400], "it must be below 2^63"), (["--max-new-tokens", str(2**63)], "below 2^63"),
    (["--end-strings", "\udcff"], "--end-strings: one of them is no text"),
    (["--initial-policy-kl-penalty", "inf"], "must be finite"), (["--lr", "inf"], "--lr is inf; it must be positive and finite"),
    (["--lr", "nan"], "--lr is nan"), (["--skip-refused", "-1"], "--skip-refused"), ([*HERE[:2], "--rm-port", "0"], "--rm-port is 0"),
    (["--rm-host", "http://here", "--rm-port", "1"], "--rm-host 'http://here' is no host"),
    (["--rm-host", "a b", "--rm-port", "1"], "is no host"), (["--min-lr", "inf"], "--min-lr is inf; it must be finite"),
    (["--rm-host", "foo..bar", "--rm-port", "1"], "--rm-host 'foo..bar' is no host"), (["--min-lr", "1", "--lr", "1e-3"], "--min-lr 1.0 is above --lr 0.001"),
])  # fmt: skip
def test_flags_that_cannot_work_are_refused_by_name(flags, reason):
    with pytest.raises(ConfigError) as refused:
        parse(TrainConfig, "", flags).filled(toy.DEFAULTS)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_the_seeds_spellings_of_the_baselines_are_accepted():
    assert [parse(TrainConfig, "", ["--baseline", name]).baseline for name in ("RLOO", "ReMax", "none")] == [
        "rloo",
        "remax",
        "none",
    ]


def test_a_preset_changes_defaults_and_a_flag_of_your_own_wins():
    seed = parse(TrainConfig, "", ["--preset", "nemo-aligner"])
    assert (seed.kl, seed.kl_reduce, seed.loss_norm, seed.global_batch_size, seed.baseline) == ("abs", "mean", "length", 16, "rloo")
    assert (seed.truncated, seed.min_new_tokens, seed.adam_betas) == ("drop", 1, (0.9, 0.98))
    assert (seed.lr, seed.min_lr, seed.weight_decay, seed.initial_policy_kl_penalty, seed.max_steps) == (
        1e-6,
        None,
        0.01,
        0.01,
        313,
    )
    assert parse(TrainConfig, "", ["--preset", "nemo-aligner", "--lr", "1e-5"]).lr == 1e-5
    assert parse(TrainConfig, "", []).kl == "k1"


@pytest.mark.parametrize(("config", "words"), [(TrainConfig, ["sampling:", "batch sizes:", "(default: 0.05)", "tokens"]),
                                               (ServeConfig, ["server:", "--ready-file", "(default: 32)"])])  # fmt: skip
def test_help_is_grouped_and_shows_units_and_defaults(config, words, capsys):
    with pytest.raises(SystemExit) as done:
        parse(config, "what it does", ["--help"])
    text = " ".join(capsys.readouterr().out.split())  # however the lines are cut
    assert done.value.code == 0 and all(word in text for word in words)
    import dataclasses

    assert all("--" + f.name.replace("_", "-") in text for f in dataclasses.fields(config))


def refused(*flags, code=2, **how):
    """Run train.py, which must end with this code and one sentence; return it."""
    out = train_here(*flags, **how)
    lines = [line for line in out.stdout.splitlines() if line.startswith("train.py: ")]
    assert out.returncode == code and len(lines) == 1 and "Traceback" not in out.stdout, out.stdout
    return lines[0]


def own(small, *flags, policy=None, data=None):
    return ["--policy", policy or small / "policy", "--train-data", data or small / "train.jsonl", *HERE, *flags]


def test_a_reward_server_that_is_not_there_ends_with_exit_json(small, tmp_path):
    line = refused(*own(small, "--log-dir", tmp_path / "run"))
    assert "--rm-wait" in line and "http://127.0.0.1:9" in line
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 2, "reason": line.removeprefix("train.py: ")}
    assert "within 1 s" in refused(*own(small, "--rm-wait", "1"), code=75)


def test_a_web_server_is_not_a_reward_server(small):
    import functools
    import http.server
    import threading

    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=small)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        line = refused("--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1",
                       "--rm-port", web.server_port, "--rm-wait", "60")  # fmt: skip
        web.shutdown()
    assert "not a reward server" in line and "text/html" in line


def test_a_malformed_line_is_reported_before_any_server_or_model_is_asked_for(small, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "ok"}\n{"prompt": \n')
    assert "bad.jsonl line 2" in refused(*own(small, data=tmp_path / "bad.jsonl", policy="does/not-exist"))
    assert "no such file" in refused(*own(small, data=tmp_path / "none.jsonl"))


def test_more_ranks_than_prompts_are_refused(small):
    assert "fewer prompts than the 4 ranks" in refused("--num-rollout-samples", "2", WORLD_SIZE=4, RANK=0)
    assert "on several nodes" in refused(WORLD_SIZE=4, RANK=0, GROUP_WORLD_SIZE=2)


def test_a_gpu_that_is_not_there_is_named(small, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda" in refused(*own(small, "--device", "cuda"))


def test_a_refusal_is_the_only_line_that_a_process_prints(small):
    out = script("train.py", "--num-rollouts-per-prompt", "1")
    assert out.returncode == 2 and out.stdout.count("\n") == 1 and out.stdout.startswith("train.py: --baseline rloo compares")


def test_a_folder_that_holds_another_run_is_left_alone(small, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "exit.json").write_text('{"code": 0}')
    assert "holds another run" in refused(*own(small, "--log-dir", tmp_path))
    assert (tmp_path / "exit.json").read_text() == '{"code": 0}'
    assert metrics(tmp_path) == [{}]


def test_a_model_without_a_language_head_is_refused(small):
    with pytest.raises(
        ConfigError, match="LlamaForSequenceClassification, not a language model; were --policy and --reward-model swapped"
    ):
        load_policy(untied(small), toy.make_tokenizer(), torch.device("cpu"))


def untied(small):
    """A classifier's folder, whose checkpoint holds no output embeddings."""
    folder = small / "untied"
    config = toy.make_config(toy.make_tokenizer(), num_labels=1)
    config.tie_word_embeddings = False
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_hub_id_says_what_it_is_trying_before_it_waits(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no wait here; with a network it would ask
    with pytest.raises(ConfigError, match="nobody/nothing"):
        load_tokenizer("nobody/nothing")
    assert "asking the Hugging Face hub" in capsys.readouterr().err


def served(small, port):
    """The small policy and prompts, and a server that is there."""
    return ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port]


def test_a_context_too_short_for_the_response_is_refused(small, server_port):
    flags = served(small, server_port)
    assert "128 positions" in refused(*flags, "--max-new-tokens", "128")
    assert "longer than 2 tokens (--max-prompt-length)" in refused(*flags, "--max-prompt-length", "2", "--max-new-tokens", "8")
    assert "(the model's 128 positions less --max-new-tokens)" in refused(*flags, "--max-new-tokens", "126")


def test_learning_rate_and_response_length_are_the_toys_without_a_policy_and_a_language_models_with_one(flags, tmp_path, capsys):
    """The toy's 7e-4 held silently for one's own model, where it is seven hundred times too large."""
    toys, own = parse(TrainConfig, "", []).filled(toy.DEFAULTS), parse(TrainConfig, "", []).filled()
    assert (toys.lr, toys.max_new_tokens, own.lr, own.max_new_tokens) == (7e-4, 24, 1e-6, 256)
    here = ["--train-data", "x", *HERE]
    assert toy.filled(parse(TrainConfig, "", ["--policy", str(toy.prepare() / "policy"), *here])).max_new_tokens == 24
    assert toy.filled(parse(TrainConfig, "", ["--policy", "x", *here])).max_new_tokens == 256
    seed = parse(TrainConfig, "", ["--preset", "nemo-aligner", "--max-new-tokens", "9"]).filled(toy.DEFAULTS)
    assert (seed.lr, seed.max_new_tokens) == (1e-6, 9), "a preset and a flag come before"
    with pytest.raises(SystemExit):
        parse(TrainConfig, "", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 1e-6; the toy's: 7e-4)" in text and "(default: 256; the toy's: 24)" in text
    i = flags.index("--lr")
    out = train_here(*flags[:i], *flags[i + 2 :], "--max-steps", "1", "--log-dir", tmp_path)
    assert out.returncode == 0 and "lr 1e-06 · responses of at most 8 tokens" in out.stdout
    identity = json.loads((tmp_path / "identity.json").read_text())
    assert (identity["lr"], identity["max_new_tokens"]) == (1e-6, 8)


@pytest.mark.parametrize(("warmup", "constant", "min_lr", "told"), [
    (0, 0, None, ""), (5, 4, 0.0, ""), (9, 0, None, ""), (0, 9, 1e-3, ""), (10, 0, None, ""),
    (40, 0, None, "to 0.0005 at most"), (0, 10, 1e-3, "to 0.001 at most"), (0, 10, 0.0, "to 0 at most"),
])  # fmt: skip
def test_a_schedule_that_never_gets_to_the_learning_rate_is_told_and_one_of_zeros_refused(capsys, warmup, constant, min_lr, told):
    config = TrainConfig(lr=2e-3, warmup_steps=warmup, constant_steps=constant, min_lr=min_lr)
    rates = [config.learning_rate(step, 10) for step in range(10)]
    if max(rates) == 0:
        with pytest.raises(ConfigError, match=f"the run has 10 steps.*{told}"):
            setup.check_schedule(config, 10)
    else:
        setup.check_schedule(config, 10)
        said = capsys.readouterr().out
        assert told in said and bool(said) == bool(told) == (max(rates) < 0.999 * 2e-3)


def test_two_ranks_that_find_two_reward_models_at_one_address_are_refused(flags, monkeypatch):
    of_all = distributed.of_all
    monkeypatch.setattr(
        distributed, "of_all", lambda item: [item, "f" * 64] if isinstance(item, str) and len(item) == 64 else of_all(item)
    )
    out = train_here(*flags)
    assert out.returncode == 2 and "ranks have found different reward models" in out.stdout and "Traceback" not in out.stdout, (
        out.stdout
    )


def test_a_step_in_which_no_response_counts_says_that_it_trains_nothing(flags, tmp_path):
    out = train_here(*flags, "--truncated", "drop", "--max-new-tokens", "1", "--max-steps", "2", "--log-dir", tmp_path)
    assert [line["optimizer_steps"] for line in metrics(tmp_path)] == [0, 0], "or choose another seed: a response has ended"
    assert out.stdout.count("step 1 trains nothing: --truncated drop, and no response ended within --max-new-tokens 1\n") == 1
    assert "no update    in 2 steps: none of their responses counted" in out.stdout and "step 2 trains" not in out.stdout


@pytest.mark.parametrize(("words", "reason"), [
    (["--reward-fn", "f.py:f", "--max-length", "5"], "--max-length is of --reward-model"),
    (["--reward-fn", "f.py:f", "--precision", "bf16"], "--precision is of --reward-model"),
    (["--ready-file", "nowhere/ready"], "--ready-file nowhere/ready: its folder is not there"),
])  # fmt: skip
def test_flags_of_the_server_that_cannot_work_are_refused_by_name(words, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(ServeConfig, "", words)


def test_a_ready_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "f.py").write_text("def f(completions, **rest):\n    return [0.0 for _ in completions]\n")
    out = script("serve_rm.py", "--reward-fn", f"{tmp_path}/f.py:f", "--ready-file", tmp_path)
    assert out.returncode == 2 and "cannot be written (Is a directory)" in out.stdout and "Traceback" not in out.stdout, out.stdout


@pytest.mark.parametrize(
    ("mean", "std"), [(0.0, 0.0), (0.0, -1.0), ("a", 1.0), (float("nan"), 1.0), (0.0, None), (0.0, float("inf"))]
)
def test_a_mean_or_deviation_of_a_reward_model_that_is_none_is_refused_unless_a_flag_replaces_it(small, tmp_path, mean, std):
    folder = shutil.copytree(small / "reward_model", tmp_path / "rm")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "reward_mean": mean, "reward_std": std}))
    with pytest.raises(ConfigError, match=r"has reward_mean .*, reward_std .*: give --reward-mean and --reward-std"):
        load_reward(ServeConfig(reward_model=str(folder)))
    assert load_reward(ServeConfig(reward_model=str(folder), reward_mean=1.0, reward_std=2.0)).std == 2.0


def test_a_folder_that_cannot_be_made_is_one_sentence(small, tmp_path, server_port):
    words = served(small, server_port)
    (tmp_path / "file").write_text("")
    assert "--log-dir" in refused(*words, "--max-new-tokens", "8", "--log-dir", tmp_path / "file")
    assert "--log-dir" in refused(*words, "--max-new-tokens", "8", "--log-dir", "/proc/nowhere/run")


def test_a_near_miss_of_a_flag_is_answered_with_the_flag():
    for words, near in ((["--basline", "rloo"], "--baseline"), (["--lrr=1"], "--lr"), (["--val-dat", "x"], "--val-data")):
        with pytest.raises(ConfigError, match=re.escape(near)):
            parse(TrainConfig, "", words)
    with pytest.raises(ConfigError, match="--help lists every flag"):
        parse(TrainConfig, "", ["--zzzzzz"])


@pytest.mark.parametrize("name", ["runs/x/policy", "./policy", "policy/", "~/policy", "/nowhere/policy", "tests/policy"])
def test_a_path_that_is_missing_is_never_asked_for_on_the_hub(name, capsys):
    with pytest.raises(ConfigError, match=f"--policy {name}: no such folder$"):
        load_tokenizer(name)
    assert "hub" not in capsys.readouterr().err


def test_a_run_folder_is_no_policy_and_its_last_checkpoint_is_named(tmp_path):
    for step in ("000002", "000010"):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    (tmp_path / "identity.json").write_text("{}")
    for load in (load_tokenizer, context_length):
        with pytest.raises(ConfigError, match=r"a run folder; give a policy that it saved, .*step-000010$"):
            load(str(tmp_path))


def test_the_file_instead_of_its_folder_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ConfigError, match="a file; give the folder that holds config"):
        load_tokenizer(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["train.py", "serve_rm.py"])
def test_a_missing_pytorch_and_an_old_python_are_one_sentence(name):
    out = subprocess.run([sys.executable, "-S", name], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith(f"{name}: no torch, ") and len(out.stderr.splitlines()) == 1
    old = (
        f"import runpy, sys; sys.version_info = (3, 9, 1); sys.argv = [{name!r}]; sys.path.insert(0, '.'); runpy.run_path({name!r})"
    )
    out = subprocess.run([sys.executable, "-c", old], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr == f"{name}: this is Python 3.9; 3.10 or newer is needed\n"


@pytest.mark.slow
def test_torchruns_report_ends_with_the_reason_where_it_has_a_folder_for_it(tmp_path):
    """torchrun passes a file for the reason only where it keeps logs."""
    out = script("-m", "torch.distributed.run", "--standalone", "--log-dir", tmp_path, ROOT / "train.py", "--lr", "-1")
    report = out.stdout[out.stdout.index("Root Cause") :]
    assert out.returncode == 1 and "--lr is -1.0; it must be positive" in report


@pytest.mark.parametrize(
    ("change", "told"), [(["--lr", "0.05"], "--lr is 0.0007 here and 0.05 on rank 1"), ("prompts", "rank 1 reads other prompts")]
)
def test_nodes_that_are_given_different_commands_or_files_are_refused(small, flags, tmp_path, change, told):
    if change == "prompts":
        (tmp_path / "edited.jsonl").write_text((small / "train.jsonl").read_text().replace("rome", "paris", 1))
        change = ["--train-data", str(tmp_path / "edited.jsonl")]
    (tmp_path / "node.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nsys.argv += {change!r} if os.environ['RANK'] == '1' else []\ntrain.main()\n"
    )
    out = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "node.py", *flags,
                 "--log-dir", tmp_path / "run", OMP_NUM_THREADS=1)  # fmt: skip
    assert out.returncode != 0 and told in out.stdout, out.stdout
    assert not (tmp_path / "run/metrics.jsonl").exists()
