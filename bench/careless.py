"""A table of careless command lines and inputs, each with the answer of the program.

    python bench/careless.py > careless.md          about five minutes on two cores

Commands run in a folder of odd files. Each must end with exit code 2, and the last line of its
answer must be one sentence without a traceback. If rows break this rule, the script prints them and
ends with exit code 1.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes import toy  # noqa: E402

FILES = {
    "good.jsonl": '{"prompt": "anna on the film in rome :"}\n' * 4,
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "cut.jsonl": '{"prompt": "a"}\n{"prompt": "b\n',
    "list.jsonl": '["a", "b"]\n',
    "nokey.jsonl": '{"question": "why?", "answer": "so"}\n',
    "null.jsonl": '{"prompt": null}\n',
    "twice.jsonl": '{"prompt": "a", "prompt": "b"}\n',
    "both.jsonl": '{"prompt": "a", "text": "b"}\n',
    "roles.jsonl": '{"messages": [{"role": "robot", "content": "hi"}]}\n',
    "assistant.jsonl": '{"messages": [{"role": "assistant", "content": "hi"}]}\n',
    "latin1.jsonl": '{"prompt": "caf\xe9"}\n'.encode("latin-1"),
    "bom.jsonl": b'\xef\xbb\xbf{"prompt": "a"}\n',
    "object.json": '{\n  "prompt": "a"\n}\n',
    "ragged.csv": "prompt,label\na,1\nb\n",
    "header.csv": "question,answer\nwhy,so\n",
    "fake.parquet": "not a parquet file",
    "fake.jsonl.gz": "not gzip",
    "cut.jsonl.gz": gzip.compress(b'{"prompt": "a"}\n' * 999)[:60],
    "odd.py": "x = 3\nclass C: pass\ndef two(prompts, completions): return [0.0]\n"
    "async def later(prompts, completions, labels): return []\n"
    "def good(prompts, completions, labels): return [0.0 for _ in completions]\n"
    "def needs(prompts, completions, labels): return [float(x['a']) for x in labels]\n"
    "def short(prompts, completions, labels): return []\n"
    "def words(prompts, completions, labels): return ['1.0' for _ in completions]\n",
    "broken.py": "def f(prompts, completions, labels)\n    return []\n",
    "raises.py": "1 / 0\n",
    "pairs.jsonl": '{"chosen": "hello", "rejected": "go away"}\n',
}

ADDRESS = "--rm-host 127.0.0.1 --rm-port 9"
TRAIN = f"train.py --policy TOY/policy {ADDRESS} --train-data"
COMMANDS = [
    # flags
    "train.py --basline rloo",
    "train.py --baseline critic",
    "train.py --lr fast",
    "train.py --lr 0",
    "train.py --max-steps -1",
    "train.py --num-rollouts-per-prompt 1",
    "train.py --global-batch-size 6",
    "train.py --top-p 0.9",
    "train.py --temperature 0",
    "train.py --truncated penalize",
    "train.py --initial-policy-kl-penalty inf",
    "train.py --max-time-per-run tomorrow",
    "train.py --adam-betas 0.9",
    "train.py --policy good.jsonl",
    "train.py --rm-host here",
    "train.py --device cuda",
    "train.py --log-dir good.jsonl",
    "train.py --resume must --log-dir new",
    "train.py --baseline odd.py:nothing",
    "train.py --baseline odd.py",
    "train.py --baseline missing.py:f",
    # models
    f"train.py --policy runs/nowhere {ADDRESS} --train-data good.jsonl",
    f"train.py --policy TOY/reward_model {ADDRESS} --train-data good.jsonl",
    f"train.py --policy good.jsonl {ADDRESS} --train-data good.jsonl",
    f"train.py --policy empty {ADDRESS} --train-data good.jsonl",
    # prompts
    *(
        f"{TRAIN} {name}"
        for name in FILES
        if name.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz"))
        and name not in ("good.jsonl", "pairs.jsonl")
    ),
    f"{TRAIN} missing.jsonl",
    f"{TRAIN} missing.csv",
    f"{TRAIN} good.jsonl:test",
    f"{TRAIN} good.jsonl --prompt-key question",
    f"{TRAIN} nokey.jsonl --prompt-key question --label-key grade",
    f"{TRAIN} good.jsonl",
    f"{TRAIN} good.jsonl --num-rollout-samples 64",
    f"{TRAIN} empty",
    # the server
    "serve_rm.py --reward-fn odd.py",
    "serve_rm.py --reward-fn odd.py:god",
    "serve_rm.py --reward-fn odd.py:x",
    "serve_rm.py --reward-fn odd.py:C",
    "serve_rm.py --reward-fn odd.py:two",
    "serve_rm.py --reward-fn odd.py:later",
    "serve_rm.py --reward-fn missing.py:f",
    "serve_rm.py --reward-fn broken.py:f",
    "serve_rm.py --reward-fn raises.py:f",
    "serve_rm.py --reward-model TOY/policy",
    "serve_rm.py --reward-model nowhere/at/all",
    "serve_rm.py --reward-model TOY/reward_model --reward-fn odd.py:good",
    "serve_rm.py --reward-std 0",
    "serve_rm.py --reward-mean nan",
    "serve_rm.py --host 0.0.0.0",
    "serve_rm.py --port 99999",
    # the launcher
    "launch.sh lauch",
    "launch.sh run --reward-fn odd.py:good --policy TOY/policy",
    "launch.sh --rm-host elsewhere",
    "launch.sh --max-stps 3",
    "launch.sh hh",
    "launch.sh hh pairs.jsonl --size huge",
    "launch.sh hh missing.jsonl.gz",
    "launch.sh run --reward-fn odd.py:needs -- --policy TOY/policy --train-data good.jsonl "
    "--num-rollout-samples 2",
    "launch.sh run --reward-fn odd.py:short -- --policy TOY/policy --train-data good.jsonl "
    "--num-rollout-samples 2",
    "launch.sh run --reward-fn odd.py:words -- --policy TOY/policy --train-data good.jsonl "
    "--num-rollout-samples 2",
    # recipes
    "recipes/sft.py --model TOY/policy --data pairs.jsonl --out new-sft",
    "recipes/train_rm.py --model TOY/policy --pairs good.jsonl --out new-rm",
    "recipes/evaluate.py --run nowhere",
    "recipes/compare.py --seeds 1",
    "recipes/step.py --policy TOY/policy",
    "recipes/chat.py --policy nowhere/at/all",
]


def answer(command: str, folder: Path) -> tuple[int, str]:
    """Exit code of a command, and its text on stderr."""
    script, *words = command.replace("TOY", str(toy.prepare())).split()
    start = [sys.executable] if script.endswith(".py") else ["bash"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("RM_TOKEN", None)
    done = subprocess.run(
        [*start, str(ROOT / script), *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr.strip()


def flaw(code: int, text: str) -> str | None:
    """What is wrong with an answer, None if nothing is."""
    if code != 2:
        return f"exit code {code}"
    return "a traceback" if "Traceback" in text or not text else None


def message(text: str) -> str:
    """The last sentence of an answer, without the launcher's lines about exit code and logs."""
    ends = ("; logs: ", "its log: ")
    lines = [line for line in text.splitlines() if not any(end in line for end in ends)]
    return (lines or [""])[-1]


def main() -> None:
    """Run all commands, two at a time, and print the table."""
    toy.prepare()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        (folder / "empty").mkdir()
        for file, content in FILES.items():
            data = content if isinstance(content, bytes) else content.encode()
            (folder / file).write_bytes(data)
        answers = list(pool.map(lambda command: answer(command, folder), COMMANDS))
    print(f"{len(COMMANDS)} careless commands, `python bench/careless.py`:\n")
    print("| command | answer |\n|---|---|")
    for command, (_, text) in zip(COMMANDS, answers, strict=True):
        sentence = message(text).replace(str(toy.prepare()), "TOY").replace("|", "\\|")
        print(f"| `{command}` | {sentence} |")
    bad = {
        command: f"{problem}: {text}"
        for command, (code, text) in zip(COMMANDS, answers, strict=True)
        if (problem := flaw(code, text))
    }
    if bad:
        sys.exit(json.dumps(bad, indent=2))


if __name__ == "__main__":
    main()
