"""Validation: one response to each held-out prompt, and its reward.

The random numbers are the same in every validation.
"""

from reinforce.objective import Judged
from reinforce.run import distributed
from reinforce.run.actor import Actor
from reinforce.run.group import Group, make_groups
from reinforce.text import Prompt

# the "step" of the random numbers: the same at every validation, so that two of them compare
STEP = -1


def validate(actor: Actor, prompts: list[Prompt]) -> list[Group]:
    """One response to each prompt, with its reward; the same groups on every rank."""
    dealt = distributed.deal(prompts)  # the prompts of this rank

    def respond() -> list[Group]:
        if not dealt:
            return []
        rows = actor.config.val_rollout_micro_batch_size
        rollout = actor.respond(dealt, 1, STEP, actor.validation, rows)
        reward, _ = distributed.once_a_team(lambda: actor.ask(dealt, rollout))
        return make_groups(actor.tokenizer, dealt, rollout, Judged(reward, None, reward))

    with distributed.gathered(actor.policy):
        groups = distributed.together(respond)
    return distributed.gather(groups)
