"""One process of a tensor parallel test: torchrun --nproc-per-node N team_probe.py FOLDER. Every rank checks, rank 0 writes FOLDER/ok.

Teams of two ranks, or one of three, hold a model with biases and a vocabulary of an odd size; the teams share the rows of one loss.
Rank 0 loads the model whole; the others do, or read their shards from its files.
"""

import itertools
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import tiny_llama
from transformers import Qwen3Config, Qwen3ForCausalLM

from reinforce import optim
from reinforce.logprobs import Scorer
from reinforce.policy import without_dropout
from reinforce.run import distributed, shards, tensor_parallel

CPU = torch.device("cpu")
TEAM = 3 if os.environ.get("WORLD_SIZE") == "3" else 2
ROWS = torch.randint(3, 11, (4, 9), generator=torch.Generator().manual_seed(2))  # (B, S + T)
WEIGHT = torch.tensor([1.0, -2.0, 0.5, 3.0])  # (B,)


def made(tied, norms=False):
    """The same model on every rank; its biases are not 0. A team of three gets the heads of SmolLM2-135M.

    `norms`: a Qwen3, whose queries and keys have norms that are whole on each rank.
    """
    heads = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3} if TEAM == 3 else {}
    if norms:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 24,
            **heads,
        }
        config = Qwen3Config(vocab_size=51, num_hidden_layers=2, tie_word_embeddings=tied, max_position_embeddings=128, **sizes)
        model = without_dropout(Qwen3ForCausalLM(config))
        model.config.tie_word_embeddings = True  # wrong, as in a folder whose head was untied later
    else:
        model = tiny_llama(vocabulary=51, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied, **heads)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return model, Scorer(model, plain=True)


def loss(scorer, rows):
    """Of so many of the rows, a sum over them."""
    prompt, response = ROWS[rows, :4], ROWS[rows, 4:]  # (b, S), (b, T)
    seen, mask = torch.ones_like(prompt, dtype=torch.bool), torch.ones_like(response, dtype=torch.bool)
    return (WEIGHT[rows] * scorer(prompt, seen, response, mask).sum(1)).sum()


def check_places(model, whole):
    """Each rank's shard of any tensor is that which it has of the parameter, and all shards together are the tensor."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        placed = distributed.shard_like(parameter, whole[name])
        assert getattr(placed, "placements", None) == getattr(parameter, "placements", None), name
        assert torch.equal(getattr(placed, "_local_tensor", placed), getattr(parameter, "_local_tensor", parameter)), name
        other = torch.randn(parameter.shape, generator=draw)
        assert torch.equal(distributed.gather_tensor(distributed.shard_like(parameter, other)), other), name


def check_gradient(model, scorer, wrapped, tied, norms):
    """Its length before clipping, and every part of it after, are those of one process; in one pass a row."""
    alone, alone_scorer = made(tied, norms)
    loss(alone_scorer, list(range(len(ROWS)))).backward()
    norm = torch.cat([p.grad.flatten() for p in alone.parameters()]).norm().item()
    rows = distributed.deal(range(len(ROWS)))
    for row in rows:
        with distributed.accumulating(wrapped, last=row == rows[-1]):
            distributed.backward(loss(wrapped, [row]))
    for most in (0.0, norm / 10):
        optim.clip(alone, most)
        found = optim.clip(model, most)
        assert abs(found - norm) <= 1e-5 * norm, (found, norm)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            error = (distributed.gather_tensor(p.grad) - q.grad).norm()
            assert error <= 1e-5 * q.grad.norm(), (name, error)


def main(folder):
    distributed.start(CPU, alone=False, tensor_parallel=TEAM)
    kinds = [*itertools.product((True, False), (True, False), (False,)), (False, False, True)]
    for parallel, (tied, reads, norms) in itertools.product(("ddp", "fsdp"), kinds):
        model, scorer = made(tied, norms)
        whole = {name: p.detach().clone() for name, p in model.named_parameters()}
        files = str(folder / f"tied-{tied}-{norms}")
        if distributed.rank() == 0:
            model.save_pretrained(files)
        distributed.gather([None])  # the files are there
        if reads and distributed.rank() > 0:
            model = shards.build(files)
            scorer = Scorer(model, plain=True)
        tensor_parallel.shard(model, CPU)
        wrapped = distributed.wrap(scorer, CPU, parallel, False)
        shards.read(scorer, files, CPU)
        tensor_parallel.place_gradients(model)
        check_places(model, whole)
        check_gradient(model, scorer, wrapped, tied, norms)
    if distributed.rank() == 0:
        (folder / "ok").touch()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
