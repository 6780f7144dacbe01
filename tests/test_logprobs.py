"""The scorer: the same policy as the sampler's, whatever the padding, the positions or the chunks."""

import math

import pytest
import torch
from conftest import VOCABULARY, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, Lfm2Config

from reinforce import logprobs
from reinforce.guard import head_is_plain
from reinforce.kl import k1
from reinforce.logprobs import Scorer
from reinforce.loss import reinforce_loss
from reinforce.policy import checkpoint_blocks, without_dropout
from reinforce.sampler import Sampling, row_seed, sample
from reinforce.shared_prompt import _copies

PROMPTS = [[1, 5, 9], [1, 7], [1, 4, 4, 8, 11, 3]]
SEEDS = [row_seed(0, 0, i, k) for i in range(3) for k in range(4)]


def rollout(model, **how):
    return sample(model, PROMPTS, SEEDS, Sampling(**{"max_new_tokens": 10, "end_ids": (2,), "pad_id": 0, **how}))


def score(model, out, **how):
    return Scorer(model, head_is_plain(model), **how)(out.prompt, out.prompt_mask, out.response, out.mask)


def naive(model, prompt, response):
    """log pi of a response by one unpadded forward pass, (T,)."""
    ids = torch.tensor([[*prompt, *response]])
    logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logp[len(prompt) - 1 + t, token] for t, token in enumerate(response)])


def test_scores_of_padded_batches_equal_unpadded_ones(model):
    out = rollout(model)
    logp = score(model, out)
    for b in range(len(SEEDS)):
        response = out.response[b][out.mask[b]].tolist()
        torch.testing.assert_close(logp[b][out.mask[b]], naive(model, PROMPTS[b // 4], response), rtol=0, atol=1e-5)
    assert torch.equal(logp[~out.mask], torch.zeros_like(logp[~out.mask]))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"min_new_tokens": 4}, {"temperature": 1.7, "min_new_tokens": 2}])
def test_the_sampler_stores_the_scorers_logp(model, how):
    out = rollout(model, **how)
    logp = score(model, out, end_ids=(2,), **how)
    assert (out.logp - logp).abs().max() < 1e-4


def test_scoring_at_another_temperature_would_show():
    out = rollout(tiny_llama(), temperature=0.6)
    assert (out.logp - score(tiny_llama(), out)).abs().max() > 0.1


def test_a_policy_equal_to_its_reference_has_kl_zero_from_the_scorer_and_almost_from_the_sampler(model):
    out = rollout(model)
    reference = score(model, out)
    assert torch.equal(k1(score(model, out), reference), torch.zeros_like(reference))
    assert k1(out.logp, reference).abs().max() <= 1e-4


def test_bf16_reference_scores_exactly_as_the_policy_under_autocast(tmp_path):
    from recipes import toy
    from reinforce.policy import load_policy

    tokenizer = toy.make_tokenizer()
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), tokenizer, torch.device("cpu"))
    frozen = load_policy(str(tmp_path), tokenizer, torch.device("cpu"), frozen_dtype=torch.bfloat16)
    assert any(p.dtype == torch.bfloat16 for p in frozen.parameters())
    out = rollout(policy)
    with torch.autocast("cpu", torch.bfloat16):
        args = (out.prompt, out.prompt_mask, out.response, out.mask)
        assert torch.equal(Scorer(policy, True)(*args), Scorer(frozen, True)(*args))


def test_neither_chunks_nor_logits_computed_again_change_scores_or_gradients(model, monkeypatch):
    out = rollout(model)

    def run(floats, kept=4):
        monkeypatch.setattr(logprobs, "CHUNK_FLOATS", floats)
        monkeypatch.setattr(logprobs, "KEPT_CHUNKS", kept)
        model.zero_grad()
        logp = score(model, out)
        reinforce_loss(logp, torch.linspace(-1, 1, 12), out.mask, 12).backward()
        return logp.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    a, grad_a = run(10**9)
    for b, grad_b in run(3 * VOCABULARY), run(3 * VOCABULARY, kept=0):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (grad_a - grad_b).norm() <= 1e-5 * grad_a.norm()


def test_logits_are_computed_again_only_where_they_would_not_fit(model, monkeypatch):
    out, calls = rollout(model), []
    once = Scorer._token_logp
    monkeypatch.setattr(Scorer, "_token_logp", lambda *a: (calls.append(len(a[2])), once(*a))[1])
    tokens = int(out.mask.sum())
    monkeypatch.setattr(logprobs, "CHUNK_FLOATS", math.ceil(tokens / 3) * VOCABULARY)
    chunks = [len(part) for part in torch.arange(tokens).tensor_split(3)]
    for kept in range(4):
        monkeypatch.setattr(logprobs, "KEPT_CHUNKS", kept)
        score(model, out).sum().backward()
        assert calls == chunks + chunks[kept:][::-1]  # on the way back, the last one first
        calls.clear()


def test_the_hand_written_gradient_of_a_tokens_logp_is_the_numerical_one():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    logits[0, 3] = -torch.inf  # a barred token: probability 0, gradient 0
    token = torch.tensor([1, 6, 0, 0, 3])
    free = logits.isfinite()

    def logp(values):
        return logprobs._TokenLogp.apply(logits.masked_scatter(free, values), token)

    assert torch.autograd.gradcheck(logp, logits[free].requires_grad_())
    torch.testing.assert_close(logp(logits[free]), logits.log_softmax(-1)[range(5), token])


def test_gradient_agrees_with_a_naive_unpadded_loop(model):
    out, advantage = rollout(model), torch.linspace(-1, 1, 12)
    reinforce_loss(score(model, out), advantage, out.mask, 12).backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    for b in range(12):
        (-advantage[b] * naive(model, PROMPTS[b // 4], out.response[b][out.mask[b]].tolist()).sum() / 12).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_gradient_reaches_the_logits_of_positions_before_response_tokens_and_no_others():
    """Off by one, it would reach the last token's own logits, or the first token would teach nothing."""
    model, s = tiny_llama(), 6
    out = sample(model, PROMPTS[2:], SEEDS[:1], Sampling(max_new_tokens=5, end_ids=(2,), pad_id=0))
    seen = []
    scorer = Scorer(model, head_is_plain(model))

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    model.model.register_forward_hook(keep)
    logp = scorer(out.prompt, out.prompt_mask, out.response, out.mask)
    reinforce_loss(logp, torch.ones(1), out.mask, 1).backward()
    touched = seen[-1].grad[0].abs().sum(-1) > 0
    n = int(out.length[0])
    assert touched.tolist() == [s - 1 <= i < s - 1 + n for i in range(s + out.response.shape[1])]


def test_the_end_token_is_trained_when_pad_is_the_end_token():
    model = tiny_llama()
    out = rollout(model, pad_id=2, max_new_tokens=30)
    rows = out.finished.nonzero()[:, 0].tolist()
    part = out.take(rows)
    logp = score(model, part)
    last = logp.gather(1, part.length[:, None] - 1)
    assert len(rows) and (last < 0).all()
    grad = torch.autograd.grad(last.sum(), model.lm_head.weight)[0]
    assert grad[2].norm() > 0


def test_two_scorings_are_equal_because_dropout_is_off():
    model = tiny_gpt2(dropout=0.5).train()
    out = rollout(model)
    assert torch.equal(score(model, out), score(model, out))
    assert torch.equal(rollout(model).response, out.response)


def test_after_an_update_the_sampler_draws_from_the_new_policy():
    model = tiny_llama()
    before = rollout(model)
    reinforce_loss(score(model, before), torch.linspace(-1, 1, 12), before.mask, 12).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    after = rollout(model)
    assert not torch.equal(before.logp[:, 0], after.logp[:, 0])
    assert (after.logp - score(model, after)).abs().max() < 1e-4


@pytest.mark.parametrize("config", [
    Gemma2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
                 num_key_value_heads=2, final_logit_softcapping=2.0, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, initializer_range=0.3),
    Gemma2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
                 num_key_value_heads=2, final_logit_softcapping=30.0, query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, initializer_range=0.01),  # logits so small that the cap does not show
    CohereConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
])  # fmt: skip
def test_models_that_change_their_logits_are_found_and_scored_by_their_own_forward(config):
    torch.manual_seed(0)
    model = without_dropout(AutoModelForCausalLM.from_config(config))
    assert not head_is_plain(model)
    out = rollout(model)
    logp = score(model, out)
    for b in range(len(SEEDS)):
        response = out.response[b][out.mask[b]].tolist()
        torch.testing.assert_close(logp[b][out.mask[b]], naive(model, PROMPTS[b // 4], response), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gpu", [False, True])
def test_under_bf16_the_head_has_bfloat16_operands_a_float32_result_and_their_gradient(gpu, monkeypatch):
    """torch.mm has `out_dtype` on CUDA alone; a stand-in does what it is documented to do."""
    from reinforce import head

    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: plain(a.float(), b.float()) if out_dtype else plain(a, b))
    monkeypatch.setattr(head, "_on_gpu", lambda weight: gpu)
    draw = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(576, 400, bias=False)
    states = torch.randn(50, 576, generator=draw).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = head.float32_product(linear)
        logits = product(states)
        assert product(torch.zeros(0, 576)).shape == (0, 400), "a rank that has no rows left"
        assert product(torch.zeros(2, 3, 576)).shape == (2, 3, 400)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none", "left as it was"
    weight = linear.weight
    exact, rounded = states @ weight.T, states.bfloat16().float() @ weight.bfloat16().float().T
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    # a processor without bfloat16 products computes in float32
    assert min((logits - right).abs().max() for right in (exact, rounded)) < 1e-5
    up = torch.randn(50, 400, generator=draw)
    got = torch.autograd.grad((logits * up).sum(), (states, weight))
    want = torch.autograd.grad((exact * up).sum(), (states, weight))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_float32_under_bf16_in_sampler_scorer_and_reference_and_the_last_two_agree_bitwise(tied, tmp_path):
    from recipes import toy
    from reinforce.policy import load_policy

    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    config = toy.make_config(tokenizer)
    config.tie_word_embeddings = tied
    toy.LlamaForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), tokenizer, torch.device("cpu"))
    reference = load_policy(str(tmp_path), tokenizer, torch.device("cpu"), frozen_dtype=torch.bfloat16)
    assert reference.lm_head.weight.dtype == torch.float32 and reference.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sample(policy, PROMPTS, SEEDS, Sampling(max_new_tokens=10, end_ids=(2,), pad_id=0))
        rows = (out.prompt, out.prompt_mask, out.response, out.mask)
        logits = policy(input_ids=out.prompt).logits
        scored, frozen = Scorer(policy, True)(*rows), Scorer(reference, True)(*rows)
    assert logits.dtype == torch.float32 and len(set(logits[0, -1].tolist())) > 0.9 * logits.shape[-1], "not rounded to bfloat16"
    assert torch.equal(scored, frozen) and 0 < (out.logp - scored).abs().max() < 0.1


def ragged(longest):
    """Six rows of three prompts in any order, responses of 0 to `longest` tokens, some of which attend apart."""
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=draw) for n in ((5, 2, 7) if longest > 1 else (1, 1, 1))]
    order = [0, 2, 1, 0, 2, 0]
    lengths = torch.tensor([3, 1, longest, 6, 0, longest // 2]) if longest > 1 else torch.ones(6, dtype=torch.long)
    s = max(map(len, prompts))
    prompt = torch.stack([torch.cat([torch.zeros(s - len(prompts[i]), dtype=torch.long), prompts[i]]) for i in order])
    prompt_mask = torch.stack([torch.arange(s) >= s - len(prompts[i]) for i in order])
    response = torch.randint(3, VOCABULARY, (6, longest), generator=draw)
    return prompt, prompt_mask, response, torch.arange(longest) < lengths[:, None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("longest", [1, 9, 70])
def test_a_prompt_that_runs_once_for_its_rows_gives_the_same_logp_and_gradient(longest, checkpointing):
    policy, rows = tiny_llama(), ragged(longest)
    found = []
    for shares in (False, True):
        policy.zero_grad()
        if shares and checkpointing:
            assert checkpoint_blocks(policy)
        logp = Scorer(policy, plain=True, shares_prompt=shares)(*rows)
        (logp * torch.arange(1, 7)[:, None]).sum().backward()
        found.append((logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (logp, gradient), (again, shared) = found
    torch.testing.assert_close(again, logp, atol=2e-5, rtol=0)
    assert (shared - gradient).norm() <= 1e-5 * gradient.norm()


def test_under_autocast_the_line_of_tokens_is_as_exact_as_whole_sequences():
    """Against float32: bfloat16 moves both by the same amount."""
    policy, rows = tiny_llama(), ragged(70)
    found = []
    for shares, half in ((False, False), (False, True), (True, True)):
        policy.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logp = Scorer(policy, plain=True, shares_prompt=shares)(*rows)
        logp.sum().backward()
        found.append((logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))
    (logp, gradient), *others = found
    (whole_logp, whole_gradient), (line_logp, line_gradient) = [((a - logp).norm(), (b - gradient).norm()) for a, b in others]
    assert 0 < line_logp <= 1.2 * whole_logp and 0 < line_gradient <= 1.2 * whole_gradient


def test_gradients_of_copies_add_up_in_float32():
    """A sum of ones in bfloat16 stays at 256."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    _copies(x, torch.tensor([0, 1]).repeat_interleave(torch.tensor([1000, 3]))).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad[:, 0].tolist() == [1000, 3]


def test_a_rank_without_rows_has_gradients_of_zero(model):
    part = rollout(model).take([])
    logp = Scorer(model, plain=True, shares_prompt=True)(part.prompt, part.prompt_mask, part.response, part.mask)
    logp.sum().backward()
    assert logp.eq(0).all() and all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_the_prompt_runs_once_whatever_the_number_of_its_rows_and_padding_does_not_run():
    policy, widths = tiny_llama(), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args, kw: widths.append(tuple(args[0].shape[:2])), with_kwargs=True)
    prompt, prompt_mask = torch.full((4, 5), 3), torch.ones(4, 5, dtype=torch.bool)
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    Scorer(policy, plain=True, shares_prompt=True)(prompt, prompt_mask, torch.full((4, 3), 4), mask)
    assert widths == [(1, 5 + 3 + 1 + 2 + 3)]


@pytest.mark.parametrize("layers", [("eager",), ("conv", "full_attention")])
def test_a_layer_that_knows_nothing_of_the_line_of_tokens_is_an_error(layers):
    """Every token would see every other, or a convolution its neighbours of another sequence."""
    policy = tiny_llama()
    if layers == ("eager",):
        policy.set_attn_implementation("eager")
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        policy = AutoModelForCausalLM.from_config(
            Lfm2Config(vocab_size=VOCABULARY, layer_types=list(layers), num_hidden_layers=2, **sizes)
        )
    ones = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"not all its layers|must match the size"):
        Scorer(policy, plain=True, shares_prompt=True)(torch.full((2, 3), 3), ones, torch.full((2, 3), 4), ones)
