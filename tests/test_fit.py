"""The training loop of SFT and of reward models, against one that is written out."""

import copy
import math

import pytest
import torch
from conftest import tiny_llama

from recipes import sft
from recipes.fit import Plan
from reinforce.data.prompts import step_prompts
from reinforce.errors import FailedError

EXAMPLES = [([3 + i % 7] * (1 + i % 5), [9 + i % 11] * (1 + i % 4) + [2]) for i in range(17)]


def by_hand(model, plan, steps):
    """Losses of PyTorch's AdamW, one example at a time: warm-up over a twentieth, cosine towards a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup, losses = steps // 20, []
    for step in range(steps):
        batch = [EXAMPLES[i] for i in step_prompts(len(EXAMPLES), plan.batch_size, plan.seed, step)]
        total = 0.0
        for prompt, answer in batch:
            logp = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total = total - logp[range(len(answer)), answer].sum()
        loss = total / sum(len(answer) for _, answer in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        fall = 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        optimizer.param_groups[0]["lr"] = plan.lr * ((step + 1) / warmup if step < warmup else fall)
        optimizer.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@pytest.mark.parametrize(("epochs", "tokens", "steps"), [(2.5, 30, 10), (10.0, 10**6, 40)])
def test_training_is_that_of_a_loop_written_out(epochs, tokens, steps):
    """Order, epochs, divisor, warm-up, decay, clipping, AdamW's betas, and the loss that is reported."""
    plan = Plan(lr=3e-3, batch_size=5, epochs=epochs, seed=9, micro_batch_tokens=tokens, quiet=True)
    model = tiny_llama()
    expected = copy.deepcopy(model)
    assert sft.train_sft(model, EXAMPLES, 0, plan) == pytest.approx(by_hand(expected, plan, steps), rel=1e-4)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_a_gradient_that_is_not_finite_ends_the_training():
    model = tiny_llama()
    model.lm_head.weight.data[5, 0] = torch.nan
    with pytest.raises(FailedError, match="the gradient of step 1 is nan"):
        sft.train_sft(model, EXAMPLES, 0, Plan(lr=1e-3, batch_size=5, quiet=True))


def test_no_pass_is_wider_than_its_tokens_allow(monkeypatch):
    """Prompts are padded left, answers right: long prompts and long answers in one pass would be both."""
    widths, real = [], sft.loss_sum

    def measured(scorer, examples, *rest):
        widths.append(len(examples) * (max(len(p) for p, _ in examples) + max(len(a) for _, a in examples)))
        return real(scorer, examples, *rest)

    monkeypatch.setattr(sft, "loss_sum", measured)
    examples = [([5] * (20 if i % 2 else 1), [6] * (1 if i % 2 else 20)) for i in range(12)]
    sft.train_sft(tiny_llama(), examples, 0, Plan(lr=1e-3, batch_size=12, micro_batch_tokens=63, quiet=True))
    sft.mean_loss(tiny_llama(), examples, 0, most=63)
    assert len(widths) > 4 and max(widths) <= 63
