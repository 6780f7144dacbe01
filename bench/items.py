"""Where the seconds of a step go: the models' passes, and everything around them by name.

    python bench/items.py --policy cache/smollm2/policy --case forced --precision fp32

The step is that of bench/step.py: train.py's own loop with a reward server, its first step left
out. A function below is timed without the functions below that it calls; the rest of the step is
the last line. On a GPU each would wait for the device, so this is for a CPU.
"""

import argparse
import functools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train
from bench import step
from reinforce import kv_cache, logprobs, optim, packed_weights, sampler
from reinforce.run import actor, distributed
from reinforce.run.run import Run

MODELS = ("sampling: the model", "reference: the model", "update: forward", "update: backward")
FUNCTIONS: list[tuple[Any, str, str]] = [
    (logprobs.Scorer, "decode", MODELS[0]),
    (actor.Actor, "reference_logp", MODELS[1]),
    (actor.Actor, "logp", MODELS[2]),
    (distributed, "backward", MODELS[3]),
    (packed_weights, "_packed_forward", "sampling: weights laid out"),
    (sampler, "draw_coins", "sampling: coins"),
    (sampler, "policy_logits", "sampling: temperature, end ids"),
    (sampler, "sample_token", "sampling: tokens drawn"),
    (kv_cache, "give_room", "sampling: room in the cache"),
    (kv_cache.RoomyLayer, "batch_select_indices", "sampling: ended rows leave the cache"),
    (actor.Actor, "sample", "sampling: softmax, masks, the rest"),
    (actor.Actor, "rewards", "reward: wait"),
    (train, "judge", "KL and objective"),
    (train, "backward", "update: micro-batches, sums"),
    (optim, "clip", "update: norm, clipping"),
    (torch.optim.AdamW, "step", "update: AdamW"),
    (torch.optim.AdamW, "zero_grad", "update: gradients freed"),
    (Run, "finished", "logs"),
]


class Stopwatch:
    """Seconds of each timed function, without those of the timed functions that it calls."""

    def __init__(self) -> None:
        """Times nothing yet."""
        self.seconds: Counter[str] = Counter()
        self._inner: list[float] = []  # of each call that is open, seconds of timed calls in it

    def time(self, owner: Any, attribute: str, name: str) -> None:
        """Have `owner.attribute` timed from now on."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[name] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, attribute, timed)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="folder of the language model")
    parser.add_argument("--case", choices=tuple(step.CASES), default="forced", help="of step.py")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of products")
    parser.add_argument("--steps", type=int, default=2, help="steps that count")
    args = parser.parse_args()
    watch = Stopwatch()
    finished = Run.finished

    def first_is_left_out(run: Run, made: Any) -> None:
        finished(run, made)
        if made.number == 0:
            watch.seconds.clear()

    Run.finished = first_is_left_out  # type: ignore[method-assign]
    for function in FUNCTIONS:
        watch.time(*function)
    with step.reward_server(f"{step.__file__}:variety") as port:
        found = step.ours(args.policy, args.case, args.steps, args.precision, int(port))
    whole = sum(found["seconds"])
    print(step.matrix_rate())
    rows = [*watch.seconds.most_common(), ("the rest", whole - watch.seconds.total())]
    for name, seconds in rows:
        print(f"{name:40} {seconds / args.steps:8.3f} s {seconds / whole:7.1%}")
    outside = whole - sum(watch.seconds[name] for name in MODELS)
    print(f"{'a step':40} {whole / args.steps:8.3f} s, outside the models {outside / whole:.1%}")


if __name__ == "__main__":
    main()
