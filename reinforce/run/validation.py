"""Validation: one response to each held-out prompt, with the same random numbers every time, and its reward."""

from reinforce.objective import Judged
from reinforce.run import distributed
from reinforce.run.actor import Actor
from reinforce.run.group import Group, make_groups
from reinforce.text import Prompt

STEP = (
    -1
)  # the "step" of its random numbers: the same at every validation, so before and after compare


def validate(actor: Actor, prompts: list[Prompt]) -> list[Group]:
    """One response to each prompt, scored; the same groups on every rank."""
    own = distributed.deal(prompts)

    def answered() -> list[Group]:
        if not own:
            return []
        rollout = actor.respond(
            own, 1, STEP, actor.validation, actor.config.val_rollout_micro_batch_size
        )
        reward, _ = actor.ask(own, rollout)
        return make_groups(actor.tokenizer, own, rollout, Judged(reward, None, reward))

    with distributed.gathered(actor.policy):
        groups = distributed.together(answered)
    return distributed.gather(groups)
