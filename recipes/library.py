"""One step of REINFORCE with the library alone, on a model, prompts and a reward of one's own.

python recipes/library.py FOLDER "a prompt" "another prompt"
"""

import sys

import torch

import reinforce

K, BETA, CPU = 4, 0.05, torch.device("cpu")
folder, *prompts = sys.argv[1:] if len(sys.argv) > 2 else sys.exit(__doc__)
tokenizer = reinforce.load_tokenizer(folder)
policy, reference = (reinforce.load_policy(folder, tokenizer, CPU) for _ in range(2))
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
ends = reinforce.end_tokens(folder, tokenizer)
sampling = reinforce.Sampling(24, end_ids=ends, pad_id=tokenizer.pad_token_id)

ids = [reinforce.encode(tokenizer, prompt) for prompt in prompts]
seeds = [reinforce.row_seed(0, 0, i, k) for i in range(len(ids)) for k in range(K)]
out = reinforce.sample(policy, ids, seeds, sampling)  # B = P * K rows
rows = (out.prompt, out.prompt_mask, out.response, out.mask)
texts = [tokenizer.decode(y[mask]) for y, mask in zip(out.response, out.mask, strict=True)]
reward = torch.tensor([float(len(set(y.split()))) for y in texts])  # (B,): yours goes here
with torch.no_grad():
    ref_logp = reinforce.Scorer(reference)(*rows)  # (B, T)
kl = reinforce.per_response(reinforce.k1(out.logp, ref_logp), out.mask)  # (B,), nats
advantage = reinforce.rloo((reward - BETA * kl).view(-1, K)).flatten()  # (B,)
logp = reinforce.Scorer(policy)(*rows)  # (B, T)
loss = reinforce.reinforce_loss(logp, advantage, out.mask, divisor=len(texts))
loss.backward()
optimizer.step()
print(f"mean reward {reward.mean():.2f} of {len(texts)} responses, the first: {texts[0]!r}")
