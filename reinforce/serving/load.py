"""The reward that the flags ask for."""

import hashlib
from dataclasses import replace

from reinforce.hub import refuse_missing_path
from reinforce.serving.config import ServeConfig
from reinforce.serving.reward import Reward, function_reward


def load_reward(config: ServeConfig) -> Reward:
    """What the flags ask for. Raises ConfigError.

    Its fingerprint covers all that changes a reward.
    """
    if config.reward_fn is not None:
        reward = function_reward(config, config.reward_fn)
    else:
        name = str(config.reward_model)
        refuse_missing_path(name, "--reward-model")
        from reinforce.serving.model_reward import model_reward  # loads PyTorch

        reward = model_reward(config, name)
    settings = (
        f"{reward.fingerprint}/{reward.mean}/{reward.std}/{config.reward_clip}/{reward.max_length}"
    )
    return replace(reward, fingerprint=hashlib.sha256(settings.encode()).hexdigest())
