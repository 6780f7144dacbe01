"""Where to compute, and in which precision.

bf16 here means torch.autocast: matrix products in bfloat16, weights, norms, the residual stream and
softmax in float32.
"""

import os

import torch

from reinforce.errors import ConfigError

SMALL = 10_000_000  # parameters; below this bf16 gains nothing


def pick(name: str, local_rank: int = 0) -> torch.device:
    """The device of this process: on a GPU that of its local rank, or the one with `name`'s number.

    Raises ConfigError on a GPU that is missing.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: PyTorch sees no usable GPU here; give --device cpu or auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if ":" in name:
        local_rank = int(name.partition(":")[2])
        if local_rank >= count:
            raise ConfigError(f"--device {name}: PyTorch sees {count} GPUs here, from cuda:0 on")
    if local_rank >= count:
        raise ConfigError(
            f"--device: rank {local_rank} of this machine has no GPU of its own ({count} here); "
            "start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(local_rank)
    _settle_gpu()
    return torch.device("cuda", local_rank)


def _settle_gpu() -> None:
    """float32 is float32, and attention is no kernel that is built anew for each shape.

    TF32 keeps 10 bits of 23; an environment variable of some containers switches it on. cuDNN's
    attention, PyTorch's first choice on newer GPUs, makes a plan for each length, of which sampling
    has one a token, and has given NaN gradients with a mask (pytorch/pytorch#196678).
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones.

    A rule and not a measurement, so that all ranks agree: on a GPU that has them, on Arm with bf16,
    on x86 with AMX, and on AMD with AVX512-BF16 (710 against 190 GFLOP/s on an EPYC of two cores).
    On a Xeon without AMX the same instructions are slower than float32 (147 against 260 GFLOP/s).
    See bench/precision.py.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch cannot tell
        return False
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16") or capabilities.get("bf16"):
        return True
    processor = str(capabilities.get("cpu_name", ""))
    return bool(capabilities.get("avx512_bf16")) and processor.startswith("AMD")


def use_bf16(precision: str, device: torch.device, parameters: int) -> bool:
    """Whether --precision means bfloat16 for a model of so many parameters."""
    if precision == "auto":
        return parameters > SMALL and bf16_is_fast(device)
    return precision == "bf16"


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """The context of every forward pass; without bf16 it does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def only_deterministic() -> None:
    """Use only algorithms that give the same bits each time; an operation that has none raises.

    See PyTorch's notes on reproducibility. cuBLAS reads its variable when its first product is
    computed, so call this before.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
