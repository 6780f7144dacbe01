"""One step of REINFORCE with the library alone: a model and prompts of one's own, a Python function as the reward.

python recipes/library.py FOLDER "a prompt" "another prompt"
"""

import sys

import torch

from reinforce import Sampling, Scorer, k1, load_policy, load_tokenizer, per_response, reinforce_loss, rloo, row_seed, sample

K, BETA, CPU = 4, 0.05, torch.device("cpu")
folder, *prompts = sys.argv[1:]
tokenizer = load_tokenizer(folder)
policy, reference = (load_policy(folder, tokenizer, CPU) for _ in range(2))
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
how = Sampling(max_new_tokens=24, end_ids=(tokenizer.eos_token_id,), pad_id=tokenizer.pad_token_id)

ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
rollout = sample(policy, ids, [row_seed(0, 0, i, k) for i in range(len(ids)) for k in range(K)], how)  # B = P * K rows
rows = (rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask)
texts = [tokenizer.decode(row[mask]) for row, mask in zip(rollout.response, rollout.mask, strict=True)]
reward = torch.tensor([float(len(set(text.split()))) for text in texts])  # (B,), different words: yours goes here
with torch.no_grad():
    kl = per_response(k1(rollout.logp, Scorer(reference)(*rows)), rollout.mask)  # (B,), nats
advantage = rloo((reward - BETA * kl).view(-1, K)).flatten()  # (B,)
loss = reinforce_loss(Scorer(policy)(*rows), advantage, rollout.mask, divisor=len(texts))
loss.backward()
optimizer.step()
print(f"mean reward {reward.mean():.2f} of {len(texts)} responses, the first: {texts[0]!r}")
