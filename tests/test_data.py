"""Prompts: every bad line named by file and line, every prompt once an epoch."""

import json
import random

import hypothesis.strategies as st
import pyarrow
import pytest
from hypothesis import given
from pyarrow import parquet

from recipes import sft, toy
from reinforce.data.prompts import check_record, step_prompts, steps_per_epoch, tokenize
from reinforce.data.records import BadLineError, read_records
from reinforce.errors import ConfigError
from reinforce.text import encode

GOOD = b'{"prompt": "anna on the pizza in rome :"}\n'


@pytest.mark.parametrize(("line", "reason"), [
    (b"{not json}", "not JSON"), (b"[1, 2]", "not an object"), (b'{"question": "x"}', 'it has "question": --prompt-key'),
    (b'{"prompt": "x", "text": "y"}', '"prompt" and "text" in one record: --prompt-key'), (b'{"prompt": 3}', "must be a string"), (b'{"prompt": ""}', "not empty"),
    (b'{"text": "   "}', "not empty"), (b'{"prompt": "x", "prompt": "y"}', "same key twice"), (b'{"prompt": null}', "it has nothing"),
    (b"\xef\xbb\xbf" + GOOD.strip(), "byte order mark"), (b'{"prompt": "\xff"}', "not JSON"),
    (b'{"messages": []}', '"messages" must be'), (b'{"messages": [{"role": "user"}]}', '"messages" must be'),
    (b'{"messages": [{"role": "assistant", "content": "hi"}]}', '"messages" must be'), (b"[" * 100_000, "not JSON"),
])  # fmt: skip
def test_a_bad_line_is_named_by_file_and_line_or_counted(tmp_path, line, reason):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ConfigError, match=rf"prompts\.jsonl line 2: .*{reason}"):
        read_records(str(path), "--train-data", check_record)
    records, bad = read_records(str(path), "--train-data", check_record, skip_bad_lines=True)
    assert len(records) == 2 and bad == 1


def test_a_missing_or_empty_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--train-data .*no such file"):
        read_records(str(tmp_path / "none.jsonl"), "--train-data", check_record)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError, match="no prompts in it"):
        read_records(str(tmp_path / "empty.jsonl"), "--train-data", check_record)


def test_the_seeds_key_and_labels_are_read(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "anna on the pizza in rome :", "label": {"answer": 3}}\n')
    records, _ = read_records(str(tmp_path / "p.jsonl"), "--train-data", check_record)
    prompts, _ = tokenize(records, toy.make_tokenizer(), 100, "--train-data")
    assert prompts[0].text == "anna on the pizza in rome :" and prompts[0].label == {"answer": 3}


def test_prompts_that_are_too_long_are_dropped_and_counted_and_keep_their_place():
    records = [{"prompt": " ".join(["anna"] * n)} for n in (3, 30, 4)]
    prompts, dropped = tokenize(records, toy.make_tokenizer(), 10, "--train-data")
    assert [p.index for p in prompts] == [0, 2] and dropped == 1
    with pytest.raises(ConfigError, match=r"longer than 2 tokens \(--max-prompt-length\)"):
        tokenize(records, toy.make_tokenizer(), 2, "--train-data")


def test_messages_need_a_chat_template_and_are_rendered_with_it():
    tokenizer, records = toy.make_tokenizer(), [{"messages": [{"role": "user", "content": "pizza :"}]}]
    with pytest.raises(ConfigError, match="no chat template"):
        tokenize(records, tokenizer, 100, "--train-data")
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}on{% endif %}"
    prompt = tokenize(records, tokenizer, 100, "--train-data")[0][0]
    assert prompt.text == "<s> pizza : on" and list(prompt.ids) == tokenizer.convert_tokens_to_ids(["<s>", "pizza", ":", "on"])


def test_encoding_adds_one_begin_token_and_no_end_token():
    tokenizer = toy.make_tokenizer()
    begin = tokenizer.bos_token_id
    assert encode(tokenizer, "pizza :")[0] == begin and encode(tokenizer, "pizza :").count(begin) == 1
    assert encode(tokenizer, "<s> pizza :") == encode(tokenizer, "pizza :")
    assert encode(tokenizer, "pizza : </s>")[-1] == tokenizer.eos_token_id
    from tokenizers.processors import TemplateProcessing

    ids = [("<s>", begin), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    assert encode(tokenizer, "pizza :")[-1] != tokenizer.eos_token_id


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5))
def test_every_prompt_comes_once_an_epoch_in_another_order_each_time(count, per_step, seed):
    steps = steps_per_epoch(count, per_step)
    epochs = [[i for s in range(steps) for i in step_prompts(count, per_step, seed, e * steps + s)] for e in range(2)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 12:
        assert epochs[0] != epochs[1]
    assert all(len(step_prompts(count, per_step, seed, s)) == per_step for s in range(steps - 1))


@given(st.integers(0, 10_000))
def test_the_toys_grammar_knows_the_sentiment_of_its_own_reviews_only(seed):
    rng = random.Random(seed)
    review = toy.make_review(rng, rng.choice(list(toy.PARTS)))
    words = review.split()
    by_hand = sum((2 if i and words[i - 1] == "very" else 1) * toy.MOODS.get(w, 0) for i, w in enumerate(words))
    assert toy.sentiment(review) == by_hand
    assert toy.sentiment(review + " .") is None and toy.sentiment("superb " + review) is None
    assert json.loads(json.dumps(review)) == review


@pytest.mark.parametrize("record", [
    {"prompt": "a \ud800 b"}, {"messages": [{"role": "user", "content": "\udfff"}]},
    {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
])  # fmt: skip
def test_half_a_surrogate_pair_is_a_bad_line(record):
    with pytest.raises(BadLineError, match="half of a surrogate pair"):
        check_record(record)


@pytest.mark.parametrize("record", [
    {"prompt": "a", "completion": "\ud800"}, {"prompt": "\ud800", "completion": "b"}, {"prompt": "a", "chosen": "\ud800", "rejected": "c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud800"}]},
])  # fmt: skip
def test_half_a_surrogate_pair_is_a_bad_example_of_sft(record):
    with pytest.raises(BadLineError, match="half of a surrogate pair"):
        sft.check_example(record)


def test_a_prompt_of_exactly_the_longest_length_is_kept():
    tokenizer = toy.make_tokenizer()
    n = len(tokenizer("anna on the pizza :")["input_ids"])
    assert [tokenize([{"prompt": "anna on the pizza :"}, {"prompt": "anna"}], tokenizer, m, "f")[1] for m in (n, n - 1)] == [0, 1]


def test_a_date_beyond_pythons_is_one_sentence(tmp_path):
    columns = {"prompt": ["a"], "when": pyarrow.array([5_000_000], pyarrow.date32())}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=r"p\.parquet: not a parquet file, or a damaged one"):
        read_records(str(tmp_path / "p.parquet"), "--train-data", check_record)
