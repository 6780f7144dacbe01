"""The flags of train.py."""

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from reinforce import lora, optim
from reinforce.baselines import BASELINES
from reinforce.errors import ConfigError
from reinforce.flags import flag, refuse
from reinforce.kl import KL

# The flags of the tutorial's launch script, then those of its configuration file: |k1| averaged
# over the tokens of a response, and token means. That file has AdamW's betas at 0.9/0.98. A beta on
# a mean of |k1| weighs about beta / length on a sum.
PRESETS: dict[str, dict[str, Any]] = {
    "nemo-aligner": {
        "baseline": "rloo",
        "initial_policy_kl_penalty": 0.01,
        "max_epochs": 1,
        "max_steps": 313,
        "val_check_interval": 4,
        "save_top_k": 1,
        "lr": 1e-6,
        "weight_decay": 0.01,
        "num_rollout_samples": 16,
        "num_rollouts_per_prompt": 4,
        "global_batch_size": 16,
        "micro_batch_size": 1,
        "rollout_micro_batch_size": 4,
        "forward_micro_batch_size": 4,
        "val_rollout_micro_batch_size": 4,
        "kl": "abs",
        "kl_reduce": "mean",
        "loss_norm": "length",
        "truncated": "drop",
        "min_new_tokens": 1,
        "adam_betas": (0.9, 0.98),
    }
}

REWARD = "the reward is serve_rm.py's; ./launch.sh run --help shows how both start"
ELSEWHERE = {"--reward-model": REWARD, "--reward-fn": REWARD}

# the defaults of a language model; those of the toy are in recipes/toy.py
LANGUAGE_MODEL: dict[str, Any] = {"lr": 1e-6, "max_new_tokens": 256}

POSITIVE = """
    num_rollout_samples num_rollouts_per_prompt micro_batch_size micro_batch_tokens
    rollout_micro_batch_size forward_micro_batch_size val_rollout_micro_batch_size
    max_new_tokens max_prompt_length temperature val_temperature lr
    max_epochs max_steps val_check_interval save_interval tensor_model_parallel_size
""".split()  # noqa: SIM905
NOT_NEGATIVE = """
    initial_policy_kl_penalty rm_wait min_new_tokens warmup_steps constant_steps
    weight_decay max_grad_norm val_top_k min_lr skip_refused save_top_k missing_eos_penalty
""".split()  # noqa: SIM905


def baseline_name(text: str) -> str:
    """A baseline's name in lower case (RLOO and ReMax are accepted), or FILE.py:NAME as it is."""
    if text.lower() in BASELINES:
        return text.lower()
    if ".py" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(BASELINES)}, and no FILE.py:NAME"
        )
    return text


@dataclass(frozen=True)
class TrainConfig:
    """Every flag of train.py.

    A batch flag counts responses of one rank in one forward pass, unless its help says otherwise.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    ELSEWHERE: ClassVar[dict[str, str]] = ELSEWHERE

    preset: str | None = flag(
        None,
        "model and data",
        "other defaults for the flags; nemo-aligner: those of NeMo-Aligner's tutorial",
        choices=tuple(PRESETS),
    )
    policy: str | None = flag(
        None,
        "model and data",
        "SFT'd causal language model to train: Hugging Face folder or hub id",
    )
    train_data: str | None = flag(
        None,
        "model and data",
        "training prompts: jsonl, json, csv, parquet, folder or hub id; NAME:SPLIT takes a split",
    )
    val_data: str | None = flag(
        None,
        "model and data",
        "validation prompts, in any form of --train-data "
        "(default: those of the toy for the toy, else no validation)",
    )
    prompt_key: str | None = flag(
        None,
        "model and data",
        "column of the prompt, a text or chat messages (default: prompt, text or messages)",
    )
    label_key: str | None = flag(
        None,
        "model and data",
        "column of the label that the reward server is sent (default: label, if it exists)",
    )
    max_prompt_length: int = flag(
        1024, "model and data", "tokens of a prompt at most; longer prompts are left out"
    )
    skip_bad_lines: bool = flag(
        False,
        "model and data",
        "leave out malformed prompt lines and count them, instead of refusing",
    )

    rm_host: str | None = flag(None, "reward server", "host of serve_rm.py")
    rm_port: int | None = flag(None, "reward server", "port of serve_rm.py")
    rm_wait: float = flag(
        0.0, "reward server", "seconds to wait for the reward server at the start; 0: one try"
    )
    rm_format: str = flag(
        "auto",
        "reward server",
        "what the server is sent; auto: messages for message prompts, else text; "
        "query: always text",
        choices=("auto", "query"),
    )
    skip_refused: int = flag(
        0,
        "reward server",
        "sampled responses that the reward server may refuse in a run; "
        "a refused one is left out (biased)",
    )
    rm_fingerprint: str | None = flag(
        None,
        "reward server",
        "sha256 that the server's /info must show (default: trust the first answer)",
    )

    baseline: str = flag(
        "rloo",
        "objective",
        f"what is subtracted from the objective: {', '.join(BASELINES)} "
        "(group-mean and grpo are biased), or FILE.py:NAME, a function f(R, valid) of your own",
        type=baseline_name,
    )
    initial_policy_kl_penalty: float = flag(
        0.05,
        "objective",
        "beta, reward per nat of KL to the initial policy; 0: no initial policy is loaded",
    )
    kl: str = flag(
        "k1",
        "objective",
        "KL estimate of a token, in the reward; k1: log pi - log pi_ref; "
        "abs: |k1|, as in the tutorial (biased)",
        choices=tuple(KL),
    )
    kl_reduce: str = flag(
        "sum",
        "objective",
        "KL of a response: sum or mean over its tokens; mean: as in the tutorial (biased)",
        choices=("sum", "mean"),
    )
    truncated: str = flag(
        "keep",
        "objective",
        "treatment of unfinished responses; keep: as any other; "
        "drop: out of baseline and loss (biased); penalize: less reward",
        choices=("keep", "drop", "penalize"),
    )
    missing_eos_penalty: float | None = flag(
        None, "objective", "reward that an unfinished response loses with --truncated penalize"
    )
    loss_norm: str = flag(
        "sequence",
        "objective",
        "what the loss is a mean of; sequence: token sums, over rows; token: tokens, over all; "
        "length: token means, over rows, as in the tutorial (token and length: biased)",
        choices=("sequence", "token", "length"),
    )
    ratio_clip: float = flag(
        0.2,
        "objective",
        "epsilon of the clipped ratio, used if --global-batch-size gives several optimizer steps",
    )
    ema_decay: float = flag(
        0.9, "objective", "share of its value that --baseline ema keeps in a step"
    )

    num_rollout_samples: int = flag(16, "batch sizes", "P, prompts per step over all ranks")
    num_rollouts_per_prompt: int = flag(4, "batch sizes", "K, responses per prompt")
    global_batch_size: int | None = flag(
        None,
        "batch sizes",
        "responses per optimizer step over all ranks; below P*K later steps take the clipped ratio "
        "(biased; default: P*K)",
    )
    micro_batch_size: int = flag(
        32, "batch sizes", "responses in one forward and backward pass at most"
    )
    micro_batch_tokens: int | None = flag(
        None,
        "batch sizes",
        "tokens in one forward and backward pass at most, with padding if it runs "
        "(default: 2048, on a GPU 16384)",
    )
    rollout_micro_batch_size: int = flag(
        64, "batch sizes", "responses sampled together, rounded down to whole groups"
    )
    forward_micro_batch_size: int = flag(
        64, "batch sizes", "responses in one forward pass of the initial policy"
    )
    val_rollout_micro_batch_size: int = flag(
        64, "batch sizes", "responses sampled together in validation"
    )

    temperature: float = flag(
        1.0,
        "sampling",
        "temperature of training; the trained policy is softmax(logits / temperature)",
    )
    # None until `filled`
    max_new_tokens: int = flag(
        None, "sampling", "tokens of a response at most (default: 256; the toy's: 24)"
    )
    min_new_tokens: int = flag(
        0, "sampling", "tokens that a response has before an end token may follow"
    )
    end_strings: tuple[str, ...] = flag(
        (), "sampling", "texts that end a response, beside the end tokens", nargs="+"
    )
    top_k: int = flag(
        0,
        "sampling",
        "refused unless 0: top-k sampling would train another policy than the one scored",
    )
    top_p: float = flag(
        1.0,
        "sampling",
        "refused unless 1: top-p sampling would train another policy than the one scored",
    )
    val_temperature: float | None = flag(
        None, "sampling", "sampling temperature of validation (default: --temperature)"
    )
    val_top_k: int = flag(0, "sampling", "likeliest tokens kept in validation; 0: all")
    val_top_p: float = flag(1.0, "sampling", "probability mass kept in validation")
    val_greedy: bool = flag(False, "sampling", "take the likeliest token in validation")

    lora_rank: int = flag(
        0,
        "LoRA",
        "r, rank of the change that each adapted layer learns; 0: all weights are trained",
    )
    lora_alpha: float | None = flag(
        None, "LoRA", "alpha; a layer's change is alpha / r * B A x (default: 2 r)"
    )
    lora_targets: tuple[str, ...] = flag(
        (),
        "LoRA",
        "names of the adapted layers, say q_proj v_proj (default: all linear layers of the blocks)",
        nargs="+",
    )

    # None until `filled`
    lr: float = flag(
        None, "optimizer", "peak learning rate of AdamW (default: 1e-6; the toy's: 7e-4)"
    )
    min_lr: float | None = flag(
        None,
        "optimizer",
        "learning rate that the cosine decay goes to, and that of the last --constant-steps steps "
        "(default: --lr, a constant rate)",
    )
    warmup_steps: int = flag(0, "optimizer", "steps of linear warm-up of the learning rate")
    constant_steps: int = flag(
        0, "optimizer", "last steps, at the learning rate --min-lr, after the cosine decay"
    )
    weight_decay: float = flag(0.0, "optimizer", "weight decay of AdamW, on matrices alone")
    adam_betas: tuple[float, ...] = flag(
        (0.9, 0.95), "optimizer", "decay rates of AdamW's two averages", nargs=2, type=float
    )
    max_grad_norm: float = flag(
        1.0, "optimizer", "length to which the gradient is clipped (biased); 0: no clipping"
    )

    max_epochs: int | None = flag(1, "run", "times through the training prompts")
    max_steps: int | None = flag(
        None,
        "run",
        "training steps at most; --max-epochs may end the run before "
        "(default: as many as --max-epochs gives)",
    )
    val_check_interval: int = flag(
        25, "run", "steps between validations; the first comes before step 1, the last at the end"
    )
    save_interval: int | None = flag(
        None, "run", "steps between checkpoints (default: --val-check-interval)"
    )
    save_top_k: int = flag(
        1, "run", "checkpoints kept beside the last one: those of the best validation reward"
    )
    log_dir: str | None = flag(
        None, "run", "run folder (default: a new runs/NAME-TIME, and runs/latest points to it)"
    )
    resume: str = flag(
        "auto",
        "run",
        "auto: go on with the run in --log-dir, if it is this run; "
        "must: go on or end with an error; never: only begin anew",
        choices=("auto", "must", "never"),
    )
    max_time_per_run: str | None = flag(
        None,
        "run",
        "time DD:HH:MM:SS after which the run finishes its step, saves and ends with code 75",
    )
    seed: int = flag(0, "run", "seed of the prompt order and of every draw")

    device: str = flag("auto", "hardware", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto",
        "hardware",
        "bf16: bfloat16 matrix products over float32 weights; auto: bf16 where it is fast",
        choices=("auto", "fp32", "bf16"),
    )
    parallel: str = flag(
        "ddp",
        "hardware",
        "split over several processes; ddp: each has all parameters; fsdp: each has a part",
        choices=("ddp", "fsdp"),
    )
    offload_reference: bool = flag(
        False,
        "hardware",
        "keep the initial policy in the host's memory, and on the GPU only while it scores",
    )
    offload_optimizer: bool = flag(
        False,
        "hardware",
        "keep AdamW's averages in the host's memory; under --parallel fsdp the weights as well",
    )
    tensor_model_parallel_size: int = flag(
        1,
        "hardware",
        "processes that hold one model together, each some heads of every layer; "
        "--parallel splits over what is left",
    )
    gradient_checkpointing: bool = flag(
        False,
        "hardware",
        "keep no activations inside a block and compute them again: less memory, more time",
    )
    deterministic: bool = flag(
        False,
        "hardware",
        "use only algorithms that repeat bitwise on a GPU (those of a CPU always do)",
    )

    def filled(self, defaults: dict[str, Any] = LANGUAGE_MODEL) -> "TrainConfig":
        """These settings with the defaults that depend on the policy.

        Raises ConfigError if a default does not go with the other flags.
        """
        defaults = {"val_temperature": self.temperature, **defaults}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)
        config.check()
        return config

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate of a step, from 0, of a run of `total` steps."""
        min_lr = self.lr if self.min_lr is None else self.min_lr
        return optim.learning_rate(
            step, total, self.lr, min_lr, self.warmup_steps, self.constant_steps
        )

    def check(self) -> None:
        """Raise ConfigError on the first value or combination that cannot work."""
        refuse(self, positive=POSITIVE, not_negative=NOT_NEGATIVE)
        self._check_rollouts()
        self._check_objective()
        self._check_server()
        lora.check_flags(self.lora_rank, self.lora_alpha, self.lora_targets)
        self._check_run()

    def _check_rollouts(self) -> None:
        k = self.num_rollouts_per_prompt
        if self.baseline in BASELINES and k < BASELINES[self.baseline](0.0).min_k:
            raise ConfigError(
                f"--baseline {self.baseline} compares responses of one prompt: "
                f"--num-rollouts-per-prompt is {k}, give 2 or more, or take --baseline remax"
            )
        if self.top_k or self.top_p != 1.0:
            raise ConfigError(
                "--top-k and --top-p would sample from another policy than the one that is scored "
                "and trained; drop them (--val-top-k and --val-top-p are allowed)"
            )
        if self.max_new_tokens is not None and self.min_new_tokens >= self.max_new_tokens:
            raise ConfigError(
                f"--min-new-tokens {self.min_new_tokens} leaves no room below --max-new-tokens "
                f"{self.max_new_tokens}; give a smaller --min-new-tokens"
            )
        if self.rollout_micro_batch_size < self.num_rollouts_per_prompt:
            raise ConfigError(
                f"--rollout-micro-batch-size {self.rollout_micro_batch_size} is smaller than a "
                f"group of --num-rollouts-per-prompt {self.num_rollouts_per_prompt} responses"
            )
        rows, g = self.num_rollout_samples * k, self.global_batch_size
        if g is not None and (g <= 0 or g % k or rows % g):
            raise ConfigError(
                f"--global-batch-size {g} must be a multiple of --num-rollouts-per-prompt {k} that "
                f"divides --num-rollout-samples * --num-rollouts-per-prompt = {rows}"
            )

    def _check_objective(self) -> None:
        if (self.truncated == "penalize") != (self.missing_eos_penalty is not None):
            raise ConfigError(
                "--truncated penalize and --missing-eos-penalty, what an unfinished response "
                "loses, come together: give both or neither"
            )
        if not self.ratio_clip > 0:
            raise ConfigError(f"--ratio-clip is {self.ratio_clip}; it must be positive")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"--ema-decay is {self.ema_decay}; it must be in [0, 1)")
        if not 0 < self.val_top_p <= 1:
            raise ConfigError(f"--val-top-p is {self.val_top_p}; it must be in (0, 1]")
        if self.min_lr is not None and self.lr is not None and self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"--adam-betas are {self.adam_betas}; each must be in [0, 1)")

    def _check_server(self) -> None:
        if (self.rm_host is None) != (self.rm_port is None):
            raise ConfigError("--rm-host and --rm-port come together: give both or neither")
        host = self.rm_host or "x"
        if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", host) or ".." in host or host[0] == ".":
            raise ConfigError(
                f"--rm-host {self.rm_host!r} is no host: "
                "give a name or an address, without http:// and port"
            )
        if self.rm_port is not None and not 0 < self.rm_port < 65536:
            raise ConfigError(f"--rm-port is {self.rm_port}; it must be in 1 to 65535")

    def _check_run(self) -> None:
        if self.max_time_per_run is not None:
            seconds(self.max_time_per_run)
        if self.resume == "must" and self.log_dir is None:
            raise ConfigError("--resume must: give the run to go on with as --log-dir")
        if any("\ud800" <= character <= "\udfff" for character in self.log_dir or ""):
            raise ConfigError("--log-dir: its name is no text in UTF-8; give another folder")
        if self.log_dir == "":
            raise ConfigError("--log-dir is empty; give a folder, or leave it out")
        if any("\ud800" <= character <= "\udfff" for character in "".join(self.end_strings)):
            raise ConfigError("--end-strings: one of them is no text in UTF-8")
        if "" in self.end_strings:
            raise ConfigError("--end-strings: an empty string would end every response at once")
        offloads = self.offload_reference or self.offload_optimizer
        if self.tensor_model_parallel_size > 1 and offloads:
            raise ConfigError(
                "--offload-reference and --offload-optimizer move whole models, not those of "
                "--tensor-model-parallel-size: leave out one or the other"
            )
        if self.lora_rank and self.tensor_model_parallel_size > 1:
            raise ConfigError(
                "--lora-rank adapts whole layers, not those of --tensor-model-parallel-size: "
                "leave out one or the other, or take --parallel fsdp"
            )
        if self.lora_rank and self.offload_reference:
            raise ConfigError(
                "--offload-reference: with --lora-rank the reference is the policy itself, its "
                "adapters off; leave the flag out"
            )
        given = {
            "--policy": self.policy,
            "--train-data": self.train_data,
            "--rm-host/--rm-port": self.rm_host,
        }
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            present = ", ".join(name for name in given if name not in missing)
            raise ConfigError(
                f"{present} without {' and '.join(missing)}: policy, prompts and reward "
                "come as a set; give all of them, or none of them for the toy"
            )


def seconds(time: str) -> int:
    """DD:HH:MM:SS in seconds. Raises ConfigError.

    >>> seconds("00:03:45:00")
    13500
    """
    if not re.fullmatch(r"\d{1,3}(:\d{2}){3}", time):
        raise ConfigError(
            f"--max-time-per-run is {time!r}; it must be DD:HH:MM:SS, say 00:03:45:00"
        )
    days, hours, minutes, rest = map(int, time.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest
