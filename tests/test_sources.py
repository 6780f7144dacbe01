"""Where prompts and pairs come from: every form says the same, text stays text, what cannot be read is named in one sentence."""

import datetime
import gzip
import json
import os
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, environment, script, train_here
from datasets import Dataset, DatasetDict

from recipes.sft import check_example
from reinforce.data.preferences import read_pairs
from reinforce.data.prompts import check_record
from reinforce.data.records import read_records
from reinforce.data.sources import is_hub_id
from reinforce.errors import ConfigError

ROWS = [{"question": "2 + 2 ?", "answer": "4"}, {"question": "3, or\n4 ?", "answer": "7"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'question,answer\n2 + 2 ?,4\n"3, or\n4 ?",7\n'
TSV = 'question\tanswer\n2 + 2 ?\t4\n"3, or\n4 ?"\t7\n'
PROMPTS = [{"prompt": row["question"], "label": row["answer"]} for row in ROWS]


def read(source, **keys):
    return read_records(str(source), "--train-data", partial(check_record, **keys))[0]


def refused(source, **keys):
    """The sentence that refuses a source: one line, and it names the file and the flag."""
    with pytest.raises(ConfigError) as error:
        read(source, **keys)
    text = str(error.value)
    assert "\n" not in text and str(source).partition(":")[0] in text and "--train-data" in text
    return text


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FORMS = {
    "p.jsonl": lambda path: write(path, LINES),
    "p.jsonl.gz": lambda path: write(path, gzip.compress(LINES.encode())),
    "lines.json": lambda path: write(path, LINES),
    "list.json": lambda path: write(path, json.dumps(ROWS, indent=1)),
    "list.json.gz": lambda path: write(path, gzip.compress(json.dumps(ROWS).encode())),
    "p.csv": lambda path: write(path, CSV),
    "P.CSV.gz": lambda path: write(path, gzip.compress(CSV.encode())),
    "excel.csv": lambda path: write(path, "\ufeff" + CSV.replace("\n", "\r\n").replace("or\r\n", "or\n")),
    "p.tsv": lambda path: write(path, TSV),
    "p.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "a[1]*.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "dict": lambda path: DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(path),
    "folder of csv": lambda path: write(path / "data/train-00000.csv", CSV),
    "folder of arrow": lambda path: Dataset.from_list(ROWS).save_to_disk(path) or (path / "state.json").unlink(),
    "run:1": lambda path: write(path / "train.jsonl", LINES),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_prompts_in_any_form(tmp_path, name):
    FORMS[name](tmp_path / name)
    assert read(tmp_path / name, prompt_key="question", label_key="answer") == PROMPTS
    assert read(f"{tmp_path / name}:train[1:]", prompt_key="question") == [{"prompt": ROWS[1]["question"]}]


def test_every_csv_cell_is_text(tmp_path):
    cells = ["007", "1e5", "true", "NA", "null", "nan", "1,5", "2020-01-01", ""]
    table = "prompt,label\n" + "".join(f'{cell or "x"},"{cell}"\n' for cell in cells if "," not in cell)
    for path in (tmp_path / "p.csv", tmp_path / "folder/train.csv"):
        labels = [record["label"] for record in read(write(path, table))]
        assert labels == [cell for cell in cells if "," not in cell]
    assert read(tmp_path / "folder")[0] == {"prompt": "007", "label": "007"}


def test_line_ends_of_windows_and_blank_lines_are_no_fault_and_lines_keep_their_numbers(tmp_path):
    path = write(tmp_path / "p.jsonl", b'{"prompt": "a"}\r\n\r\n \t\n{"prompt": "b"}\r\n\n{bad}\r\n{"prompt": "c"}')
    assert "p.jsonl line 6: not JSON" in refused(path)
    records, bad = read_records(str(path), "--train-data", check_record, skip_bad_lines=True)
    assert [record["prompt"] for record in records] == ["a", "b", "c"] and bad == 1


def test_a_column_is_named_by_a_key_and_a_wrong_name_is_answered_with_those_that_are_there(tmp_path):
    path = write(tmp_path / "p.csv", CSV)
    assert 'line 2: no "prompt", "text", "messages" or "chosen"; it has "question", "answer": --prompt-key' in refused(path)
    assert 'no "q"; it has "question", "answer": --prompt-key' in refused(path, prompt_key="q")
    assert 'no "a" (--label-key), null or empty; it has "question", "answer"' in refused(path, prompt_key="question", label_key="a")
    both = write(tmp_path / "both.jsonl", '{"prompt": "x", "text": "y"}\n')
    assert '"prompt" and "text" in one record: --prompt-key' in refused(both)
    assert read(both, prompt_key="text") == [{"prompt": "y"}]
    every = r'no prompts in it; all 2 lines are bad, the first: .*p\.csv line 2: no "prompt"'
    with pytest.raises(ConfigError, match=every):
        read_records(str(path), "--train-data", check_record, skip_bad_lines=True)


def test_a_prompt_that_is_a_list_of_messages_counts_as_messages(tmp_path):
    said = [{"role": "user", "content": "Hi"}]
    Dataset.from_list([{"prompt": said}]).to_parquet(tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [{"messages": said}]
    assert check_record({"q": said}, prompt_key="q") == {"messages": said}
    reply = {"role": "assistant", "content": "Hello."}
    for completion in ("Hello.", [reply]):
        assert check_example({"prompt": said, "completion": completion}) == [*said, reply]


def test_pairs_come_in_any_form_too(tmp_path):
    side = "\n\nHuman: Hi\n\nAssistant: {}"
    rows = [{"chosen": side.format("Hello."), "rejected": side.format("Go.")}]
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    write(tmp_path / "p.csv", 'rejected,chosen\n"{rejected}","{chosen}"\n'.format(**rows[0]))
    write(tmp_path / "p.json", json.dumps(rows))
    found = [read_pairs(f"{tmp_path}/p.{form}", "--pairs")[0] for form in ("parquet", "csv", "json")]
    assert found[0] == found[1] == found[2] and found[0][0].chosen == "Hello."
    with pytest.raises(ConfigError, match=r'p\.csv line 2: a pair needs "chosen" and "rejected"; it has "question", "answer"'):
        read_pairs(str(write(tmp_path / "p.csv", CSV)), "--pairs")


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("p.jsonl.gz", b"text", "cannot be read"), ("p.csv.gz", gzip.compress(b"prompt\nx\n")[:-9], "cannot be read"),
    ("p.parquet", b"text", "not a parquet file"), ("p.parquet", b"", "not a parquet file"),
    ("p.csv", "prompt,label\na,b\nc\n", "p.csv line 3: cells: 1, but columns: 2"),
    ("p.csv", 'prompt,label\n"a\n\nb",c\nd,e,f\n', "p.csv line 5: cells: 3, but columns: 2"),
    ("p.csv", 'prompt\nx\n"a\n', "p.csv line 3: not CSV"), ("p.csv", b"prompt\nx\n\xff\n", "p.csv line 3: not CSV in UTF-8"),
    ("p.csv", "a,a\n1,2\n", "line 1: the same column twice"), ("p.csv", "", "empty; the first line"),
    ("p.csv", "prompt\n", "no prompts in it"),
    ("p.json", '{\n "data": [1]\n}', "one object; it must be a list of objects"), ("p.json", '{"data": []}', 'line 1: no "prompt"'),
    ("p.json", '[{"prompt": "a"}, {"prompt": ', "row 2: not JSON"), ("p.json", '[{"prompt": "a"}] x', "Extra data"),
    ("p.json", '[{"prompt": "a"}, 3]', "row 2: not an object"), ("p.json", "[]", "no prompts in it"),
    ("p.json", '[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]', "row 2: the same key twice"),
    ("p.json", "", "no prompts in it"), ("p.json", b'["\xff"]', "not UTF-8"),
    ("p.json", "[" * 100_000, "row 1: not JSON"), ("p.jsonl", "\n\n", "no prompts in it"),
])  # fmt: skip
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, name, content, reason):
    assert reason in refused(write(tmp_path / name, content))


def test_a_label_that_json_does_not_have_is_named_by_its_row(tmp_path):
    Dataset.from_list([{"prompt": "a", "label": datetime.datetime(2020, 1, 1)}]).to_parquet(tmp_path / "p.parquet")
    assert 'p.parquet row 1: "label" is no JSON value' in refused(tmp_path / "p.parquet")
    Dataset.from_list([{"prompt": "a", "label": 1.0}, {"prompt": "b", "label": float("nan")}]).to_parquet(tmp_path / "p.parquet")
    assert 'p.parquet row 2: "label" is no JSON value' in refused(tmp_path / "p.parquet")
    for number in ("NaN", "-Infinity", "1e999", '{"x": [NaN]}'):
        content = f'{{"prompt": "a"}}\n{{"prompt": "b", "label": {number}}}\n'
        assert 'line 2: "label" is no JSON value' in refused(write(tmp_path / "p.jsonl", content)), number


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    data = Dataset.from_list([{"prompt": f"p{i}"} for i in range(4)])
    DatasetDict(train=data, test=data.select([3])).save_to_disk(tmp_path / "dict")
    write(tmp_path / "folder/test.csv", "prompt\na\n")
    assert read(f"{tmp_path}/dict:test") == [{"prompt": "p3"}]
    assert [r["prompt"] for r in read(f"{tmp_path}/dict:train[:50%]+test")] == ["p0", "p1", "p3"]
    assert "no split dev in it, only train, test" in refused(f"{tmp_path}/dict:dev")
    assert "no split train in it, only test" in refused(tmp_path / "folder")
    assert "no split test in it, only train" in refused(f"{write(tmp_path / 'p.csv', CSV)}:test")


def test_a_configuration_is_named_before_the_split(tmp_path):
    names = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "other"))
    write(tmp_path / "README.md", f"---\nconfigs:\n{names}---\n")
    for name in ("main", "other"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"prompt": name}))
    assert read(f"{tmp_path}:other:train") == [{"prompt": "other"}]
    assert "['main', 'other']: NAME:CONFIG:SPLIT takes one" in refused(tmp_path)


def test_a_folder_without_data_is_refused_and_a_damaged_saved_one_too(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refused(tmp_path / "empty")
    write(tmp_path / "saved/state.json", "{}")
    write(tmp_path / "saved/dataset_info.json", "{}")
    assert "not what save_to_disk writes" in refused(tmp_path / "saved")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "damaged")
    (arrow,) = (tmp_path / "damaged").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "damaged" in refused(tmp_path / "damaged")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")


def test_a_path_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in ("data/prompts", "./x/y", "../x", "~/x", "/x", "a/b/c", "prompts.parquet", "org/p.json", "a b", "", "x" * 97):
        assert not is_hub_id(path)
        assert "no such file or folder" in refused(path)
    assert "asking" not in capfd.readouterr().err
    assert is_hub_id("imdb") and is_hub_id("openai/gsm8k") and is_hub_id("Anthropic/hh-rlhf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert "nor a data set on the hub" in refused("nobody/nothing:test")
    assert "nobody/nothing:test: no such file here, asking the Hugging Face hub" in capfd.readouterr().err


@pytest.mark.slow
def test_nothing_is_left_behind_and_nothing_old_is_served(tmp_path):
    """Not even to a file of the same size and time; several processes at once, as the ranks of a run, with one cache."""
    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir()
    home.mkdir()

    def save(word):
        Dataset.from_list([{"prompt": word}]).to_parquet(data / "p.parquet")
        write(data / "folder/train.csv", f"prompt\n{word}\n")
        write(data / "lines/train.jsonl", json.dumps({"prompt": word}))
        for path in data.rglob("*.*"):
            os.utime(path, (1e9, 1e9))
        return sorted(data.rglob("*"))

    code = (
        "import sys\nfrom reinforce.data.prompts import check_record\nfrom reinforce.data.records import read_records\n"
        "print([read_records(name, '--x', check_record)[0][0]['prompt'] for name in sys.argv[1:]])"
    )
    names = [str(data / name) for name in ("p.parquet", "folder", "lines")]
    for word in ("old", "new"):
        before = save(word)
        ranks = [
            subprocess.Popen([sys.executable, "-c", code, *names], cwd=ROOT, env=environment(HF_HOME=home, HOME=home),
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]  # fmt: skip
        told = [rank.communicate(timeout=120) for rank in ranks]
        assert [out for out, _ in told] == [f"{[word] * 3}\n"] * 2, told
        assert sorted(data.rglob("*")) == before and not list(home.rglob("*.arrow"))


def test_a_run_goes_on_from_the_same_prompts_in_another_form_and_not_from_other_labels(small, server_port, tmp_path):
    prompts = [json.loads(line)["prompt"] for line in (small / "train.jsonl").read_text().splitlines()]
    rows = [{"question": prompt, "answer": str(i), "other": "x"} for i, prompt in enumerate(prompts)]
    write(tmp_path / "p.csv", "question,answer,other\n" + "".join(f"{','.join(row.values())}\n" for row in rows))
    Dataset.from_list([{"prompt": row["question"], "label": row["answer"]} for row in rows]).to_parquet(tmp_path / "p.parquet")
    common = ["--policy", small / "policy", "--rm-host", "127.0.0.1", "--rm-port", server_port, "--num-rollout-samples", "6",
              "--num-rollouts-per-prompt", "2", "--max-new-tokens", "4", "--log-dir", tmp_path / "run"]  # fmt: skip

    def go(data, *more):
        return train_here(*common, "--train-data", tmp_path / data, *more)

    assert "--prompt-key" in (out := go("p.csv")).stdout and out.returncode == 2
    keys = ["--prompt-key", "question", "--label-key"]
    assert (out := go("p.csv", *keys, "answer", "--max-steps", "1")).returncode == 0, out.stdout
    assert (out := go("p.parquet", "--max-steps", "2")).returncode == 0 and "step 2/2" in out.stdout, out.stdout
    assert (out := go("p.csv", *keys, "other", "--max-steps", "3")).returncode == 2
    assert "holds another run: prompts was" in out.stdout
    facts = json.loads((tmp_path / "run/config.json").read_text())
    assert facts["prompt_key"] is None and facts["train_data"].endswith("p.parquet")

    words = ["--run", tmp_path / "run", "--rm-host", "127.0.0.1", "--rm-port", server_port, "--max-prompts", "4"]
    told = script("recipes/evaluate.py", *words, "--test-data", tmp_path / "p.csv", "--prompt-key", "question")
    assert told.returncode == 0 and "win rate" in told.stdout, told.stdout
