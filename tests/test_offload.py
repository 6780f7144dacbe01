"""--offload-reference and --offload-optimizer: what moves between host and device, when, and that no bit of a run changes.

A recording stand-in takes the place of the copies, since a GPU is not always there: its "device" is other memory of the CPU.
Everything else is a real run. On a GPU the last test compares real runs.
"""

import dataclasses
import json

import pytest
import torch
from conftest import small_flags, tiny_llama, train_here
from safetensors.torch import load_file
from same_run import assert_same

from reinforce.optim import adamw, clip
from reinforce.run import checkpoint, offload
from reinforce.run.actor import Actor
from reinforce.run.offload import AVERAGES, Chosen, HostAdamW, Idle, Moves
from reinforce.text import Prompt


class Recorder(Moves):
    """Copies within the CPU, written down."""

    def __init__(self, device=None, log=None):
        self.device, self.log, self.out = device, [] if log is None else log, 0

    def to_device(self, host):
        self.log.append("to device")
        self.out += 1
        return host.clone()

    def new_host(self, like):
        return torch.full_like(like, torch.nan) if like.is_floating_point() else torch.empty_like(like)

    def to_host(self, tensor, host):
        self.log.append("to host")
        self.out -= 1
        host.copy_(tensor)

    def wait(self):
        self.log.append("wait")


def weights(steps, kind):
    """A small model after so many steps of one kind of AdamW, and the optimizer."""
    model = tiny_llama()
    optimizer = adamw(model, 0.01, (0.9, 0.95), 0.1, kind)
    for step in range(steps):
        ids = torch.arange(3, 11)[None] + step  # (1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_averages_on_the_host_make_bitwise_the_same_steps():
    model, optimizer = weights(4, torch.optim.AdamW)
    other, on_host = weights(4, lambda *a, **k: HostAdamW(*a, moves=Recorder(), **k))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][key], on_host.state[q][key]) for key in ("step", *AVERAGES))


def test_each_parameter_s_averages_come_and_go_before_the_next_one_s():
    """The first step makes them on the device, so they only go; at most two tensors are there at a time."""
    moves = Recorder()
    model, _ = weights(1, lambda *a, **k: HostAdamW(*a, moves=moves, **k))
    count = len(list(model.parameters()))
    assert moves.log == ["to host", "to host"] * count + ["wait"]
    moves = Recorder()
    weights(3, lambda *a, **k: HostAdamW(*a, moves=moves, **k))
    assert moves.log[2 * count + 1 :] == (["to device", "to device", "to host", "to host"] * count + ["wait"]) * 2


def test_a_parameter_without_gradient_is_not_touched():
    moves = Recorder()
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = HostAdamW(parameters, moves=moves, lr=0.1)
    parameters[1].grad = torch.ones(2)
    optimizer.step()
    assert moves.log == ["to host", "to host", "wait"] and parameters[0] not in optimizer.state
    assert [group["params"] for group in optimizer.param_groups] == [parameters]


def test_an_idle_model_has_one_copy_on_the_device_and_gives_it_back():
    """Tied weights are one tensor in both memories."""
    model, log = tiny_llama(tie_word_embeddings=True).requires_grad_(False), []
    ids = torch.arange(3, 9)[None]  # (1, 6)
    right = model(input_ids=ids).logits
    idle = Idle(model, Recorder(log=log))
    log.clear()
    home = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        idle.fetch()
        idle.fetch()
        assert not set(home) & {p.data_ptr() for p in model.parameters()}
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert torch.equal(model(input_ids=ids).logits, right)
        idle.drop()
        idle.drop()
        assert [p.data_ptr() for p in model.parameters()] == home
        assert set(log) == {"to device"} and len(log) == len(home) + len(list(model.buffers()))
        log.clear()


@pytest.fixture
def stand_in(monkeypatch):
    """Runs on the CPU that move as on a GPU, and the log of what they did."""
    log = []

    def spied(verb):
        work = getattr(Actor, verb)

        def call(actor, *words, **named):
            if verb == "micro_batches":  # the part before the first micro-batch runs when that one is asked for
                return updated(actor, work(actor, *words, **named))
            log.append((verb, on_device(actor)))
            done = work(actor, *words, **named)
            log.append((f"{verb} done", on_device(actor)))
            return done

        return call

    def updated(actor, parts):
        for part in parts:
            log.append(("update", on_device(actor)))
            yield part

    def on_device(actor):
        return any(tensor.data_ptr() != host.data_ptr() for tensor, host in actor.idle._pairs)

    for verb in ("respond", "score", "micro_batches"):
        monkeypatch.setattr(Actor, verb, spied(verb))
    monkeypatch.setattr(offload, "Moves", lambda device: Recorder(device, log))
    monkeypatch.setattr(offload, "chosen", lambda config, device: Chosen(config.offload_reference, config.offload_optimizer))
    return log


def run(flags, folder, *more):
    out = train_here(*flags, "--lr", "0.01", "--max-epochs", 9, "--log-dir", folder, *more)
    assert out.returncode == 0, out.stdout
    return out.stdout


BOTH = ("--offload-reference", "--offload-optimizer")


@pytest.mark.parametrize("baseline", ["rloo", "remax"])
def test_a_step_brings_the_reference_once_and_only_to_score(small, server_port, stand_in, tmp_path, baseline):
    """Sample → reference to the device → score (twice with ReMax) → back → update → averages, one parameter after the other."""
    run(small_flags(small, server_port)[:4] + small_flags(small, server_port)[6:], tmp_path / "run", *BOTH, "--max-steps", 2,
        "--baseline", baseline)  # fmt: skip
    log = stand_in
    assert ("respond", True) not in log and ("update", True) not in log and ("score", False) not in log
    starts = [i for i, entry in enumerate(log) if entry == ("respond", False)]
    greedy, parameters = baseline == "remax", len(load_file(small / "policy/model.safetensors"))
    first, second = starts[:: 1 + greedy]
    for start, end, averages in ((first, second, ["to host"]), (second, len(log), ["to device", "to host"])):
        names = [entry if isinstance(entry, str) else entry[0] for entry in log[start:end]]
        order = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        scored = ["to device", "score", "score done"] + ["score", "score done"] * greedy
        assert order[: order.index("update")] == ["respond", "respond done"] * (1 + greedy) + scored
        assert order[order.index("update") :][: 1 + len(averages)] == ["update", *averages] and order[-1] == "wait"
        assert names[-names[::-1].index("update") :].count("to host") == 2 * parameters


@pytest.mark.parametrize("cut", [2, 4])
def test_a_run_that_moves_is_bitwise_the_run_that_does_not(small, server_port, stand_in, tmp_path, cut):
    """Also in two parts, and where the second part moves nothing: the flags are no part of a run's identity."""
    flags = small_flags(small, server_port)
    run(flags, tmp_path / "plain", "--max-steps", 4, "--save-top-k", 9)
    run(flags, tmp_path / "moved", "--max-steps", cut, "--save-top-k", 9, *BOTH)
    run(flags, tmp_path / "moved", "--max-steps", 4, "--save-top-k", 9, *BOTH)
    assert_same(tmp_path / "moved", tmp_path / "plain")
    run(flags, tmp_path / "mixed", "--max-steps", 2, "--save-top-k", 9, *BOTH)
    run(flags, tmp_path / "mixed", "--max-steps", 4, "--save-top-k", 9)
    assert_same(tmp_path / "mixed", tmp_path / "plain")


def test_restored_averages_wait_on_the_host(small, server_port, stand_in, tmp_path):
    """Otherwise the first rollout after a resume would have 8 bytes a parameter less room than all others."""
    run(small_flags(small, server_port), tmp_path / "run", *BOTH, "--max-steps", 1, "--save-interval", 1)
    folder = checkpoint.newest(tmp_path / "run")
    from transformers import AutoModelForCausalLM

    model, moves = AutoModelForCausalLM.from_pretrained(folder), Recorder()
    optimizer = adamw(model, 0.01, (0.9, 0.95), 0.0, lambda *a, **k: HostAdamW(*a, moves=moves, **k))
    checkpoint.restore(folder, model, optimizer)
    parameters = list(model.parameters())
    assert moves.out == -2 * len(parameters) and moves.log.count("to host") == 2 * len(parameters)
    assert all(optimizer.state[p][key] is optimizer._hosts[p][key] for p in parameters for key in AVERAGES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is that of a machine without a GPU")
def test_on_a_cpu_the_flags_change_nothing_and_say_so(small, server_port, tmp_path):
    flags = small_flags(small, server_port)
    run(flags, tmp_path / "plain", "--max-steps", 2)
    out = run(flags, tmp_path / "flags", "--max-steps", 2, *BOTH)
    assert out.count("--offload-reference and --offload-optimizer: nothing to move, this run computes on the CPU\n") == 1
    assert_same(tmp_path / "flags", tmp_path / "plain")
    assert json.loads((tmp_path / "flags/config.json").read_text())["offload_optimizer"] is True


def test_under_fsdp_pytorch_s_own_policy_makes_bitwise_the_same_run(small, server_port, stand_in, tmp_path):
    """CPUOffloadPolicy for policy and reference, in place of the two classes: nothing of ours moves."""
    flags = [*small_flags(small, server_port), "--parallel", "fsdp"]
    run(flags, tmp_path / "plain", "--max-steps", 3)
    run(flags, tmp_path / "moved", "--max-steps", 2, *BOTH)
    run(flags, tmp_path / "moved", "--max-steps", 3, *BOTH)
    assert_same(tmp_path / "moved", tmp_path / "plain")
    assert not [entry for entry in stand_in if isinstance(entry, str)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it is about real copies between a host and a GPU")
def test_on_a_gpu_the_flags_change_no_bit(small, server_port, tmp_path):
    flags = [*small_flags(small, server_port), "--device", "cuda", "--deterministic", "--max-steps", 4]
    for precision in ("fp32", "bf16"):
        run(flags, tmp_path / f"plain-{precision}", "--precision", precision)
        run(flags, tmp_path / f"moved-{precision}", "--precision", precision, *BOTH)
        assert_same(tmp_path / f"moved-{precision}", tmp_path / f"plain-{precision}")


@pytest.mark.parametrize("bf16", [False, True])
def test_what_memory_py_counts_is_its_formula_and_the_same_activations_with_every_flag(small, bf16):
    """On this small model activations are as large as weights; what the flags save is exact but for single numbers."""
    from bench import memory

    above = {}
    for on_host in memory.COMBINATIONS:
        found, model = memory.peaks(str(small / "policy"), bf16, on_host)
        right = memory.formula(model, bf16, on_host)
        above[on_host] = {part: found[part] - right[part] for part in right}
        size = 4 * sum(p.numel() for p in model.parameters())
    for part in ("sampling", "scoring", "update"):
        assert above[True, True][part] >= 0 and abs(above[True, True][part] - above[False, False][part]) < 0.01 * size, (
            part,
            above,
        )
    assert all(0 <= gap["AdamW"] < 0.01 * size for gap in above.values()), above


def test_evaluation_has_one_policy_at_a_time_on_the_device(small, monkeypatch):
    """The trained one answers, goes, and the initial one comes to score; rewards are not what this is about."""
    from bench import memory
    from recipes import evaluate

    pair = [memory.make_actor(str(small / "policy"), False, (False, False)) for _ in range(2)]
    initial, trained = (dataclasses.replace(actor, idle=Idle(actor.policy, Recorder())) for actor in pair)
    log = []

    def spied(verb):
        work = getattr(Actor, verb)

        def call(actor, *words, **named):
            log.append((verb, *("initial" if a is initial else "trained" for a in (initial, trained) if a.idle._fetched)))
            return work(actor, *words, **named)

        return call

    for verb in ("respond", "score"):
        monkeypatch.setattr(Actor, verb, spied(verb))
    monkeypatch.setattr(
        Actor, "ask", lambda actor, prompts, out: (log.append(("reward",)), (torch.zeros(len(prompts)).double(), []))[1]
    )
    prompts = [Prompt(i, "the", (3, 4, 5 + i)) for i in range(3)]
    evaluate.answer(initial, prompts, False)
    evaluate.answer(trained, prompts, False, initial)
    assert log[:2] == [("respond", "initial"), ("reward",)]
    assert log[2:] == [("respond", "trained"), ("reward",), ("score", "initial")]
    assert not initial.idle._fetched and not trained.idle._fetched


def test_offload_and_tensor_parallelism_are_refused_together():
    from conftest import train_here

    done = train_here("--offload-reference", "--tensor-model-parallel-size", "2")
    assert done.returncode == 2 and "leave out one or the other" in done.stdout and len(done.stdout.splitlines()) == 1
