"""One process of a split test: torchrun --nproc-per-node N split_probe.py FOLDER. Rank 0 writes FOLDER/world-N.pt.

Every variant samples, takes the gradient of one stored rollout before clipping, and makes three steps of SGD from it.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from recipes import toy
from reinforce.data.prompts import Data
from reinforce.loss import normaliser, token_weights
from reinforce.rollout import Batch, Rollout
from reinforce.run import distributed
from reinforce.run.config import TrainConfig
from reinforce.run.loading import load
from reinforce.run.resume import Start
from reinforce.run.setup import Inputs
from reinforce.run.update import Update
from reinforce.text import Prompt, response_ids

K = 2
VARIANTS = {  # flags, and what is done to the update
    "ddp": {}, "ddp, micro-batch 1": {"micro_batch_size": 1, "rollout_micro_batch_size": 2}, "fsdp": {"parallel": "fsdp"},
    "fsdp, micro-batch 1": {"parallel": "fsdp", "micro_batch_size": 1, "rollout_micro_batch_size": 2},
    "fsdp, gradient checkpointing": {"parallel": "fsdp", "gradient_checkpointing": True, "micro_batch_size": 3},
    "ddp, gradient checkpointing": {"gradient_checkpointing": True, "micro_batch_size": 3},
    "ddp, bf16": {"precision": "bf16", "initial_policy_kl_penalty": 0.1},
    "fsdp, bf16": {"precision": "bf16", "parallel": "fsdp", "initial_policy_kl_penalty": 0.1},
    "more padding": {}, "mistake: twice": {}, "mistake: a divisor per rank": {},
}  # fmt: skip


def prompts(tokenizer):
    """Five, of two lengths: neither 2 nor 4 ranks divide them."""
    texts = [f"{person} on the pizza in rome :" for person in toy.PEOPLE[:3]] + ["anna : ben :", "the"]
    return [Prompt(i, text, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(texts)]


def stored(tokenizer):
    """A rollout that no model made: lengths 1 to 9; advantages; every row of prompts 1 and 3 dropped, so all of rank 1's of 2."""
    draw = torch.Generator().manual_seed(1)
    ids = [p.ids for p in prompts(tokenizer) for _ in range(K)]
    s, b, t = max(map(len, ids)), len(ids), 9
    prompt = torch.tensor([[0] * (s - len(i)) + list(i) for i in ids])  # (B, S)
    prompt_mask = torch.tensor([[False] * (s - len(i)) + [True] * len(i) for i in ids])  # (B, S)
    response = torch.randint(3, len(tokenizer), (b, t), generator=draw)  # (B, T)
    length = torch.tensor([9, 1, 4, 7, 2, 2, 8, 3, 5, 6])  # (B,)
    mask = torch.arange(t) < length[:, None]  # (B, T)
    advantage = torch.randn(b, generator=draw)  # (B,)
    valid = torch.tensor([b // K not in (1, 3) for b in range(b)])  # (B,)
    return Rollout(prompt, prompt_mask, response, mask, torch.zeros(b, t), torch.ones(b, dtype=torch.bool)), advantage, valid


def padded(r, n):
    """The same rollout with n more columns of padding on both sides."""
    pad = torch.nn.functional.pad
    return Rollout(pad(r.prompt, (n, 0)), pad(r.prompt_mask, (n, 0)), pad(r.response, (0, n), value=5), pad(r.mask, (0, n)),
                   pad(r.logp, (0, n)), r.finished)  # fmt: skip


def trained(model):
    """The trained parameters; asked for anew each time, since FSDP's root has others from its forward pass to its backward pass."""
    return [p for p in model.parameters() if p.requires_grad]


def measure(name, flags, policy, tokenizer):
    """Token ids, gradient, parameters after three steps, and how often a block ran forward in the first backward()."""
    flags = {"device": "cpu", "precision": "fp32", "initial_policy_kl_penalty": 0.0, "max_new_tokens": 12,
             "num_rollouts_per_prompt": K, **flags}  # fmt: skip
    config = TrainConfig(**flags).filled()
    device = torch.device("cpu")
    distributed.start(device, alone=config.parallel == "fsdp", tensor_parallel=config.tensor_model_parallel_size)
    inputs = Inputs(
        config, device, Start(), policy, "--policy", tokenizer, (tokenizer.eos_token_id,), Data(prompts(tokenizer), [], 1, 0), None
    )
    actor = load(inputs)
    mine = distributed.deal(prompts(tokenizer))
    out = actor.sample(mine, 0)
    ids = response_ids(out)
    ref_logp = actor.reference_logp(out)
    apart = 0.0 if ref_logp is None else (actor.score(actor.scorer, out) - ref_logp).abs().max().item()
    tokens = distributed.gather([ids[i * K : (i + 1) * K] for i in range(len(mine))])

    whole, advantage, valid = stored(tokenizer)
    divisor = normaliser(whole.mask.sum(1), valid, "sequence")
    places = distributed.deal(range(len(prompts(tokenizer))))
    own = [p * K + j for p in places for j in range(K)]
    part = whole.take(own) if name != "more padding" else padded(whole.take(own), 3)
    if name == "mistake: a divisor per rank":
        divisor = max(1, int(valid[own].sum())) * distributed.world_size()
    if name == "mistake: twice":
        advantage = 2 * advantage
    batch = Batch(part, advantage[own], token_weights(part.mask, "sequence") * valid[own][:, None])
    update = Update(range(len(prompts(tokenizer))), list(range(len(own))), divisor)
    reference = None if ref_logp is None else distributed.groups_of(ref_logp.double().sum(1), mine)  # (P, K)
    start = torch.cat([distributed.gather_tensor(p.detach()).flatten() for p in trained(actor.model)])
    calls, gradient = [], None
    block = actor.model.model.layers[0].mlp
    hook = block.register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(3):
        train.backward(actor, batch, update)
        if gradient is None:
            hook.remove()
            gradient = torch.cat([distributed.gather_tensor(p.grad).flatten() for p in trained(actor.model)])
        with torch.no_grad():
            for p in trained(actor.model):
                p -= 0.05 * p.grad
                p.grad = None
    end = torch.cat([distributed.gather_tensor(p.detach()).flatten() for p in trained(actor.model)])
    more = {"start": start, "reference": reference}
    return {**more, "tokens": tokens, "gradient": gradient, "end": end, "calls": len(calls), "apart": apart}


def main(folder, variants=VARIANTS):
    tokenizer = toy.make_tokenizer()
    found = {name: measure(name, flags, str(folder / "policy"), tokenizer) for name, flags in variants.items()}
    if distributed.rank() == 0:
        torch.save(found, folder / f"world-{distributed.world_size()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
