"""A reward function of one's own: looked at before the server is ready, and asked once before a model loads."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment, metrics, script, torchrun, train_here
from test_client import INFO, reply
from test_server import call, serving

from recipes import rewards
from reinforce.errors import ConfigError
from reinforce.plugin import load_named
from reinforce.run.config import TrainConfig
from reinforce.serving.config import ServeConfig
from reinforce.serving.function import load_function
from reinforce.serving.load import load_reward
from reinforce.serving.protocol import Text

FILE = """
import asyncio
from functools import partial, wraps

CALLED = "it is called as f(prompts=, completions=, labels=)"

def good(prompts, completions, labels):
    return [1.0 for text in completions]

def any_names(**columns):
    return [1.0 for text in columns["completions"]]

def of_trl(completions, **kwargs):
    return [1.0 for text in completions]

def with_default(prompts, completions, labels, scale=1.0):
    return [scale for text in completions]

class Judge:
    def __call__(self, prompts, completions, labels):
        return [1.0 for text in completions]

judge = Judge()
halved = partial(with_default, scale=0.5)
bound = judge.__call__

@wraps(good)
def wrapped(*args, **kwargs):
    return good(*args, **kwargs)

def no_labels(prompts, completions):
    return [1.0 for text in completions]

def of_texts(texts):
    return [1.0 for text in texts]

def with_key(prompts, completions, labels, key):
    return [1.0 for text in completions]

def by_place(prompts, completions, labels, /):
    return [1.0 for text in completions]

async def later(prompts, completions, labels):
    return [1.0 for text in completions]

def one_by_one(prompts, completions, labels):
    yield 1.0

table = {"a": 1.0}
unbound = partial(with_key)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(FILE)
    return path


def line_of(text):
    return FILE[: FILE.index(text)].count("\n") + 1


@pytest.mark.parametrize("name", ["good", "any_names", "of_trl", "with_default", "judge", "halved", "bound", "wrapped"])
def test_whatever_can_be_called_with_the_three_columns_is_taken(file, name):
    function = load_function(f"{file}:{name}")
    assert function(prompts=["p"], completions=["c"], labels=[None]) in ([1.0], [0.5])
    assert function.shown == f"own.py:{name}"


@pytest.mark.parametrize(("name", "line", "reason"), [
    ("no_labels", "def no_labels", "it takes no: labels; it is called as f(prompts=, completions=, labels=)"),
    ("of_texts", "def of_texts", "it takes no: prompts, completions, labels and it needs as well: texts; it is called as"),
    ("with_key", "def with_key", "it needs as well: key; it is called as"),
    ("unbound", "def with_key", "it needs as well: key; it is"),
    ("by_place", "def by_place", "it takes by position alone: prompts, completions, labels; it is"),
    ("later", "async def later", "it is a coroutine (async def)"),
    ("one_by_one", "def one_by_one", "it is a generator (it has a yield); return a list of floats"),
    ("Judge", "class Judge", "it is a class; name a function, or an object of the class"),
    ("table", None, "it is no function, but of type dict"),
    ("CALLED", None, "it is no function, but of type str"),
])  # fmt: skip
def test_a_function_that_cannot_be_called_so_is_refused_with_its_line(file, name, line, reason):
    with pytest.raises(ConfigError) as refused:
        load_function(f"{file}:{name}")
    where = "own.py" if line is None else f"own.py line {line_of(line)}"
    assert str(refused.value).startswith(f"--reward-fn {file}:{name}: {where}: {reason}"), refused.value
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("asked", "answer"), [
    (":goood", "no function 'goood' in {file}; did you mean good?"),
    (":nothing_like_it", "no function 'nothing_like_it' in {file}; it has good, any_names, of_trl"),
    ("", "which name in it? Give {file}:NAME (it has good, any_names, of_trl, with_default, judge, "),
    (":", "which name in it? Give {file}:NAME (it has good,"),
])  # fmt: skip
def test_a_missing_name_is_answered_with_the_names_that_there_are(file, asked, answer):
    with pytest.raises(ConfigError) as refused:
        load_function(f"{file}{asked}")
    assert answer.format(file=file) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "reason"), [
    ("x = 1\ny = x +\n", "broken.py line 2: SyntaxError: invalid syntax"),
    ("import json\n\nz = json.loads('')\n", "broken.py line 3: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ("import sys\nsys.exit(3)\n", "broken.py line 2: SystemExit: 3"),
    ("import no_such_module\n", "broken.py line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ("raise ValueError('two\\nlines')\n", "broken.py line 1: ValueError: two lines"),
])  # fmt: skip
def test_a_file_that_cannot_be_imported_is_refused_with_its_line(tmp_path, text, reason):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_function(f"{tmp_path}/broken.py:f")
    assert str(refused.value).endswith(reason)


def test_what_a_function_writes_to_a_label_is_gone_when_it_is_called_again(tmp_path):
    (tmp_path / "f.py").write_text("def f(prompts, completions, labels):\n    return [label.pop('answer') for label in labels]\n")
    reward = load_reward(ServeConfig(reward_fn=f"{tmp_path}/f.py:f"))
    items = [reward.encode(Text("a", None, None, None, {"answer": 3.0}, True))[0]]
    assert [reward.score(items) for _ in range(2)] == [[3.0], [3.0]]


def test_the_server_refuses_in_one_sentence_before_it_is_ready(file, tmp_path):
    out = script("serve_rm.py", "--reward-fn", f"{file}:no_labels", "--ready-file", tmp_path / "ready")
    (said,) = out.stdout.splitlines()
    assert out.returncode == 2 and f"own.py line {line_of('def no_labels')}: it takes no: labels" in said
    assert not (tmp_path / "ready").exists()


NEIGHBOURS = """
import json

import lexicon

def own(prompts, completions, labels):
    import later
    import reinforce.errors

    assert json.dumps([]) == "[]" and reinforce.errors.ConfigError
    return [lexicon.value(text) + later.bonus(text) for text in completions]
"""


def test_a_file_may_import_its_neighbours_then_and_later_and_they_hide_no_other_module(tmp_path):
    """The neighbours json.py and reinforce/ would break the server if they were found first."""
    (tmp_path / "own.py").write_text(NEIGHBOURS)
    (tmp_path / "lexicon.py").write_text("def value(text):\n    return float(len(text))\n")
    (tmp_path / "later.py").write_text("def bonus(text):\n    return 0.5\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('this is not json')\n")
    (tmp_path / "reinforce").mkdir()
    (tmp_path / "reinforce/__init__.py").write_text("raise RuntimeError('this is not reinforce')\n")
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/own.py:own") as (host, port, _):
        assert call((host, port), "POST", "/get_reward", {"query": ["abc"]})[1]["rewards"] == [3.5]


def test_a_function_is_served_without_pytorch_unless_it_imports_it_itself(tmp_path):
    """It takes seconds to import and hundreds of MiB."""
    (tmp_path / "loaded.py").write_text(
        "import sys\ndef loaded(prompts, completions, labels):\n    return [float(name in sys.modules) for name in completions]\n"
    )
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/loaded.py:loaded") as (host, port, _):
        status, answer = call((host, port), "POST", "/get_reward", {"query": ["torch", "transformers", "json"]})
    assert status == 200 and answer["rewards"] == [0.0, 0.0, 1.0]


FAILING = """
import sys

def named_by_its_label(prompts, completions, labels):
    return globals()[labels[0]["fail"]](prompts, completions, labels)

def by_answer(prompts, completions, labels):
    return [float(look_up(label)) for label in labels]

def look_up(label):
    return label["answer"]

def leaves(prompts, completions, labels):
    sys.exit("enough")

def one_short(prompts, completions, labels):
    return [1.0] * (len(completions) - 1)

def nothing(prompts, completions, labels):
    print("forgot to return")

def undefined(prompts, completions, labels):
    return [float("nan") for text in completions]

def wide(prompts, completions, labels):
    raise ValueError("one\\n\\ttwo \\x1b[31m" + "x" * 9999)
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A server of all these functions."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.py").write_text(FAILING)
    with serving(folder, "--reward-fn", f"{folder}/failing.py:named_by_its_label") as (_, port, _p):
        yield folder, port


@pytest.mark.parametrize(("name", "reason"), [
    ("by_answer", "failing.py line 11: KeyError: 'answer'"),
    ("leaves", "failing.py line 14: SystemExit: enough"),
    ("one_short", "failing.py:named_by_its_label returned 0 scores for 1 completions"),
    ("nothing", "failing.py:named_by_its_label returned a NoneType, not a list of numbers"),
    ("undefined", "NaN or infinity"),
    ("wide", r"failing.py line 26: ValueError: one two \x1b[31mxxx"),
])  # fmt: skip
def test_a_function_that_fails_on_this_data_ends_the_run_before_a_model_loads(failing, small, flags, tmp_path, name, reason):
    """The weights are not there: whoever tries to load them fails in another way."""
    folder, port = failing
    (tmp_path / "policy").mkdir()
    for path in (small / "policy").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "policy" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "anna on the pizza :", "label": {"fail": name}}) + "\n")
    data = ["--policy", tmp_path / "policy", "--train-data", tmp_path / "train.jsonl", "--num-rollout-samples", 1]
    out = train_here(*flags, *data, "--rm-port", port, "--log-dir", tmp_path / "run")
    assert call(("127.0.0.1", port), "GET", "/health")[0] == 200, "the server goes on"
    last = out.stdout.strip().splitlines()[-1]
    assert out.returncode == 2 and last.startswith("train.py: --train-data, prompt 1: no reward for the response '"), out.stdout
    assert reason in last and str(folder) not in last and len(last) < 700 and "\x1b" not in last
    assert json.loads((tmp_path / "run/exit.json").read_text()) == {"code": 2, "reason": last.removeprefix("train.py: ")}
    assert not (tmp_path / "run/config.json").exists(), "no run has begun"


@pytest.fixture
def labelled(small, tmp_path):
    """The small prompts with labels."""
    lines = [json.loads(line) for line in (small / "train.jsonl").read_text().splitlines()]
    rows = [{**line, "label": {"n": n}} for n, line in enumerate(lines)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--train-data", tmp_path / "labelled.jsonl", "--val-data", tmp_path / "labelled.jsonl"]


def lengths(request, connection=None):
    return reply(
        {"rewards": [float(len(t)) for t in request["completions"]], "id": request["id"], "fingerprint": INFO["fingerprint"]}
    )


def test_the_first_prompt_and_its_label_are_asked_for_in_the_form_of_every_request_and_again_on_a_resume(
    server, flags, labelled, small, tmp_path
):
    s = server(lengths, info={**INFO, "max_texts": 99})
    common = [*flags, *labelled, "--rm-port", s.port, "--log-dir", tmp_path / "run"]
    assert train_here(*common, "--max-steps", 1).returncode == 0
    first = json.loads((small / "train.jsonl").read_text().splitlines()[0])["prompt"]
    asked, *others = s.posts
    assert sorted({len(other["query"]) for other in others}) == [12, 18], "a step, a validation, and nothing else"
    assert asked["prompts"] == [first] and asked["labels"] == [{"n": 0}] and asked["finished"] == [True]
    assert asked["query"][0].startswith(first) and all(asked.keys() == other.keys() for other in others)
    count = len(s.posts)
    assert train_here(*common, "--max-steps", 2).returncode == 0
    again = {key: value for key, value in s.posts[count].items() if key != "id"}
    assert again == {key: value for key, value in asked.items() if key != "id"}


def test_the_first_reward_changes_no_number_of_a_run(server, flags, labelled, tmp_path):
    """Whatever it is: what a run computes and logs comes from the later ones alone."""

    def huge_first(request, connection):
        return (
            reply({"rewards": [1e30], "id": request["id"], "fingerprint": INFO["fingerprint"]})
            if len(s.posts) == 1
            else lengths(request)
        )

    lines = []
    for name, answer in (("plain", lengths), ("huge", huge_first)):
        s = server(answer, info={**INFO, "max_texts": 99})
        out = train_here(*flags, *labelled, "--rm-port", s.port, "--max-steps", 2, "--log-dir", tmp_path / name)
        assert out.returncode == 0, out.stdout
        lines.append([{k: v for k, v in line.items() if "time" not in k and "per_s" not in k} for line in metrics(tmp_path / name)])
    assert lines[0] == lines[1] and len(lines[0]) == 2


def refuse_first(request, connection):
    if request["completions"] == [""] or len(request["completions"]) == 1:
        return reply({"error": "bad_text", "message": "not this one", "index": 0}, 422)
    return lengths(request)


def test_a_run_that_may_leave_out_refused_responses_says_so_and_goes_on(server, flags, labelled, tmp_path):
    s = server(refuse_first, info={**INFO, "max_texts": 99})
    common = [*flags, *labelled, "--rm-port", s.port, "--max-steps", 1]
    out = train_here(*common, "--log-dir", tmp_path / "a")
    assert out.returncode == 2 and "answered HTTP 422: not this one" in out.stdout
    out = train_here(*common, "--log-dir", tmp_path / "b", "--skip-refused", 1)
    assert out.returncode == 0 and "HTTP 422: not this one" in out.stdout and "--skip-refused" in out.stdout
    assert metrics(tmp_path / "b")[0]["refused"] == 0


@pytest.mark.slow
def test_of_two_ranks_the_first_alone_asks_and_both_end_with_its_reason(server, flags, labelled, tmp_path):
    s = server(refuse_first, info={**INFO, "max_texts": 99})
    out = torchrun(2, *flags, *labelled, "--rm-port", s.port, "--log-dir", tmp_path / "run")
    assert len(s.posts) == 1 and out.returncode == 1
    assert "train.py: --train-data, prompt 1" in out.stdout and "train.py (rank 1): --train-data, prompt 1" in out.stdout
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 2


def test_the_examples_give_what_their_docstrings_say():
    texts = ["the answer is 42.", " Red\n", "", "word " * 20]
    labels = ["42", "red", "", "word"]
    three = {"prompts": [""] * 4, "completions": texts, "labels": labels}
    assert rewards.length(**three) == [-0.8, -0.95, -1.0, 0.0]
    assert rewards.pattern(**three) == [1.0, 0.0, 0.0, 0.0]
    assert rewards.exact_match(**three) == [0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match='needs a "label"'):
        rewards.exact_match(prompts=[""], completions=[""], labels=[None])


def test_problems_of_reasoning_gym_or_the_line_that_installs_it(tmp_path):
    """The package is optional; a stand-in of the three functions that are called shows the rest."""
    command = ("recipes/rewards.py", "sums", 3)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/reasoning_gym.py").write_text("raise ModuleNotFoundError('no', name='reasoning_gym')\n")
    out = script(*command, PYTHONPATH=tmp_path / "none")
    assert out.returncode == 2
    assert out.stdout == f"recipes/rewards.py: reasoning_gym is not installed; run: {sys.executable} -m pip install reasoning-gym\n"
    (tmp_path / "reasoning_gym.py").write_text(GYM)
    out = script(*command, PYTHONPATH=tmp_path)
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    assert out.returncode == 0 and [line["label"]["answer"] for line in lines] == ["0", "2", "4"]
    (tmp_path / "sums.jsonl").write_text(out.stdout)
    with serving(tmp_path, "--reward-fn", ROOT / "recipes/rewards.py:solved", PYTHONPATH=tmp_path) as (host, port, _):
        chats = [[*line["messages"], {"role": "assistant", "content": text}]
                 for line, text in zip(lines, ["0", "<answer> 2 </answer>", "5"], strict=True)]  # fmt: skip
        request = {"messages": chats, "labels": [line["label"] for line in lines]}
        assert call((host, port), "POST", "/get_reward", request)[1]["rewards"] == [1.0, 1.0, 0.0]
    for words, reason in ((("lost", 3), "no longer knows its answer"), (("other", 3), "not registered"), (("sums", 0), "positive")):
        out = script("recipes/rewards.py", *words, PYTHONPATH=tmp_path)
        assert out.returncode == 2 and reason in out.stdout and len(out.stdout.splitlines()) == 1, out.stdout


GYM = """
import re
from types import SimpleNamespace

def create_dataset(name, size, seed):
    if name not in ("sums", "lost"):
        raise ValueError(f"Dataset '{name}' not registered")
    assert size > 0, "size must be positive"
    terms = (lambda n: {n: n}) if name == "lost" else (lambda n: [n, n])  # JSON has no numbers as keys
    return [{"question": f"{n} + {n} =", "answer": str(2 * n), "metadata": {"source_dataset": name, "terms": terms(n)}} for n in range(size)]

def get_score_answer_fn(name):
    def grade(answer, entry):
        terms = entry["metadata"]["terms"]
        return float(answer == str(sum(terms) if isinstance(terms, list) else 2 * terms.get(int(answer) // 2, -1)))
    return grade

def extract_answer(text):
    found = re.findall("<answer>(.*?)</answer>", text)
    return found[-1].strip() if found else None

utils = SimpleNamespace(extract_answer=extract_answer)
"""


PAGE = (ROOT / "docs/rewards.md").read_text()


def test_the_functions_of_the_page_are_served_as_they_stand_there(tmp_path):
    """The last one is another project's, which the page turns into one of ours."""
    polite, adapted = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    theirs = "def reward_func(queries, prompts, labels):\n    return {'rewards': [float(len(q)) for q in queries]}\n\n"
    (tmp_path / "page.py").write_text(polite + "\n" + theirs + adapted)
    columns = {"prompts": ["ab", "c"], "completions": ["Please", ""], "labels": [None, None]}
    assert load_function(f"{tmp_path}/page.py:polite")(**columns) == [1.0, 0.0]
    assert load_function(f"{tmp_path}/page.py:reward")(**columns) == [8.0, 1.0]


def test_every_reward_and_flag_of_the_page_exists():
    flags = {"--" + f.name.replace("_", "-") for c in (TrainConfig, ServeConfig) for f in dataclasses.fields(c)}
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert {"--reward-fn", "--train-data"} <= found <= flags | {"--remote", "--model-only"}, found - flags
    named = re.findall(r"recipes/rewards\.py:(\w+)", PAGE)
    assert set(named) == {"length", "exact_match", "solved"}
    for name in (*named, "pattern"):
        assert load_function(f"{ROOT}/recipes/rewards.py:{name}") and f"`{name}`" in PAGE


@pytest.mark.slow
def test_the_pages_commands_on_the_toy_run(toy_folder, tmp_path):
    (toy, _) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    short = re.sub(r"(launch\.sh run.*)", rf"\1 --max-steps 1 --log-dir {tmp_path}/$RANDOM", toy).replace(
        "labelled.jsonl", f"{tmp_path}/labelled.jsonl"
    )
    env = environment(PATH=f"{sys.prefix}/bin:{os.environ['PATH']}", VIRTUAL_ENV=sys.prefix, OMP_NUM_THREADS=1)
    out = subprocess.run(["bash", "-euc", short], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    assert out.returncode == 0 and out.stdout.count("step 1/1") == 2, out.stdout + out.stderr


def test_a_file_of_the_same_length_and_time_is_not_taken_for_the_one_that_was_compiled(tmp_path, monkeypatch):
    """Python's cache goes by these two: a server gave the old file's rewards under the new file's fingerprint."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, got = tmp_path / "mine.py", []
    for value in ("+1.0", "-1.0"):
        file.write_text(f"def f(prompts, completions, labels):\n    return [{value}] * len(completions)\n")
        os.utime(file, (1e9, 1e9))
        reward = load_reward(ServeConfig(reward_fn=f"{file}:f"))
        got.append((reward.score([("", "a", None)]), reward.fingerprint))
    assert got[0][0] == [1.0] and got[1][0] == [-1.0] and got[0][1] != got[1][1]


def test_a_file_that_changes_while_it_is_imported_is_known_by_the_text_that_runs(tmp_path):
    file = tmp_path / "changing.py"
    text = f"def f(prompts, completions, labels):\n    return [1.0]\n\nopen({str(file)!r}, 'a').write('# more')\n"
    file.write_text(text)
    assert load_named(f"{file}:f", "--reward-fn").digest == hashlib.sha256(b"f/" + text.encode()).hexdigest()
    assert file.read_text().endswith("# more")
