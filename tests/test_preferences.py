"""Preference pairs: HH-RLHF's dialogues as they really are, split so that nothing held out opens like anything trained on."""

import gzip
import json

import pytest

from recipes import hh
from reinforce.data.preferences import parse_dialogue, parse_pair, read_pairs, split_by_opening
from reinforce.data.prompts import check_record
from reinforce.data.records import BadLineError, read_records
from reinforce.errors import ConfigError
from reinforce.text import TEMPLATE


def dialogue(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def pair(chosen, rejected, *before):
    return {"chosen": dialogue(*before, chosen), "rejected": dialogue(*before, rejected)}


def save(path, records):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return str(path)


def test_a_dialogue_of_many_turns_becomes_messages():
    got = parse_dialogue(dialogue("Hi", "Hello.\n\nHow are you?", "Fine: thanks", "Good."))
    assert [m["role"] for m in got] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in got] == ["Hi", "Hello.\n\nHow are you?", "Fine: thanks", "Good."]


@pytest.mark.parametrize(
    "said", ["Human: is a label", "He said\nHuman: no", "a Human:Assistant: thing", "Assistant:", "x\n\nhuman: y"]
)
def test_a_speakers_name_inside_a_turn_is_text(said):
    assert parse_dialogue(dialogue("Hi", said))[1]["content"] == said


def test_a_second_turn_of_the_same_speaker_belongs_to_the_first():
    got = parse_dialogue("\n\nHuman: Hi\n\nAssistant: One\n\nAssistant: two")
    assert got == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One\n\nAssistant: two"}]


@pytest.mark.parametrize(("record", "reason"), [
    ({"chosen": dialogue("a", "b"), "rejected": dialogue("c", "d")}, "different prompts"),
    ({"chosen": dialogue("a", "b") + "\n\nAssistant: c", "rejected": dialogue("a", "b") + "\n\nAssistant: d"}, "in two turns"),
    (pair(" ", "b", "a"), "empty reply"), (pair("b", "", "a"), "empty reply"), (pair("b", "b ", "a"), "same reply"),
])  # fmt: skip
def test_pairs_that_teach_nothing_are_counted_and_left_out(tmp_path, record, reason):
    good = pair("yes", "no", "Really?")
    pairs, odd = read_pairs(save(tmp_path / "p.jsonl.gz", [good, record, good]), "--pairs")
    assert len(pairs) == 2 and [n for why, n in odd.items() if reason in why] == [1]


@pytest.mark.parametrize("record", [
    {"chosen": "hello", "rejected": "x"}, {"chosen": dialogue("a"), "rejected": dialogue("a")}, {"chosen": dialogue("a", "b")},
    {"chosen": "\n\nAssistant: first", "rejected": "\n\nAssistant: first"}, {"chosen": 3, "rejected": 4}, [1],
    {"chosen": [{"role": "user"}], "rejected": []}, {"prompt": "text", "chosen": dialogue("a", "b"), "rejected": dialogue("a", "c")},
    {"prompt": " ", "chosen": "b", "rejected": "c"}, {"prompt": 3, "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": 1, "rejected": "c"},
    {"prompt": "a", "chosen": "b \ud800", "rejected": "c"}, {"chosen": dialogue("a \udfff", "b"), "rejected": dialogue("a \udfff", "c")},
    {"prompt": "text", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": "c"},
])  # fmt: skip
def test_a_malformed_pair_is_named_by_file_and_line(tmp_path, record):
    path = save(tmp_path / "p.jsonl", [pair("yes", "no", "Really?"), record])
    with pytest.raises(ConfigError, match=r"p\.jsonl line 2: "):
        read_pairs(path, "--pairs")
    pairs, odd = read_pairs(path, "--pairs", skip_bad_lines=True)
    assert len(pairs) == 1 and odd == {"left out, malformed": 1}


def test_the_same_pair_as_dialogue_as_conversations_and_with_a_prompt_of_its_own():
    before, replies = [{"role": "user", "content": "Hi"}], {"chosen": "Hello.", "rejected": "Go."}
    answers = {k: [{"role": "assistant", "content": v}] for k, v in replies.items()}
    forms = [pair("Hello.", "Go.", "Hi"), {k: before + v for k, v in answers.items()}, {"prompt": before, **answers}]
    forms += [
        {"prompt": "Hi", **replies},
        {"prompt": "Hi", **answers},
        {"prompt": "Hi", **{k: before + v for k, v in answers.items()}},
    ]
    forms += [
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", **replies},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", **pair("Hello.", "Go.", "Hi")},
    ]
    assert len({repr(parse_pair(form)) for form in forms}) == 1


def test_a_pair_is_also_a_prompt_for_the_policy():
    assert check_record(pair("Hello.", "Go.", "Hi"))["messages"] == [{"role": "user", "content": "Hi"}]
    assert check_record({**pair("b", "c", "a"), "label": 7})["label"] == 7
    with pytest.raises(BadLineError):
        check_record({"chosen": "nothing"})


def test_openings_are_on_one_side_only_and_always_the_same():
    pairs = [parse_pair(pair("yes", "no", f"Question {i % 40}?", "Go on.", f"Part {i}")) for i in range(400)]
    train, held_out = split_by_opening(pairs, 0.3)
    sides = [{p.prompt[0]["content"] for p in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and len(train) + len(held_out) == 400 and 0.1 < len(held_out) / 400 < 0.5
    again = split_by_opening(pairs[::-1], 0.3)[1]
    assert {p.prompt[0]["content"] for p in again} == sides[1]
    spaced = [parse_pair(pair("yes", "no", f"  question {i}?\n")) for i in range(40)]
    assert {" ".join(p.prompt[0]["content"].lower().split()) for p in split_by_opening(spaced, 0.3)[1]} == {
        s.lower() for s in sides[1]
    }


def test_a_shared_system_message_is_no_opening():
    system = [{"role": "system", "content": "Be kind."}]
    answers = {k: [{"role": "assistant", "content": k}] for k in ("chosen", "rejected")}
    pairs = [parse_pair({"prompt": [*system, {"role": "user", "content": f"Question {i}?"}], **answers}) for i in range(100)]
    train, held_out = split_by_opening(pairs, 0.3)
    assert train and held_out
    with pytest.raises(BadLineError, match="something that the assistant replies to"):
        parse_pair({"prompt": system, **answers})


def test_a_damaged_archive_is_named(tmp_path):
    path = save(tmp_path / "p.jsonl.gz", [pair("yes", "no", f"Question {i}?") for i in range(200)])
    content = bytearray((tmp_path / "p.jsonl.gz").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "p.jsonl.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"p\.jsonl\.gz"):
        read_pairs(path, "--pairs")


def test_a_tokenizer_without_a_chat_template_gets_hh_rlhfs_text():
    from jinja2 import Template

    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"}]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    text = Template(TEMPLATE).render(messages=said, add_generation_prompt=True, **names)
    assert text == "<s>\n\nHuman: Hi\n\nAssistant: Hello.</s>\n\nHuman: Bye\n\nAssistant:"
    whole = Template(TEMPLATE).render(messages=[*said, {"role": "assistant", "content": "Bye."}], **names)
    assert whole == text + " Bye.</s>", "an answer continues the generation prompt"


def test_a_folder_in_hub_layout_is_read_through_datasets(tmp_path):
    (tmp_path / "data/sub").mkdir(parents=True)
    save(tmp_path / "data/train.jsonl", [pair("yes", "no", f"Question {i}?") for i in range(3)])
    save(tmp_path / "data/test.jsonl", [pair("yes", "no", "Last?")])
    assert len(read_pairs(str(tmp_path / "data"), "--pairs")[0]) == 3
    pairs, _ = read_pairs(f"{tmp_path}/data:test", "--pairs")
    assert pairs[0].prompt[0]["content"] == "Last?"
    prompts, _ = read_records(str(tmp_path / "data"), "--train-data", check_record)
    assert prompts[0]["messages"][0]["content"] == "Question 0?"
    with pytest.raises(ConfigError, match=r"datasets cannot read this folder|no such file"):
        read_pairs(str(tmp_path / "data/sub"), "--pairs")


def test_a_file_with_no_usable_pair_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no usable pairs in it"):
        read_pairs(save(tmp_path / "p.jsonl", [pair("same", "same", "a")]), "--pairs")


def test_a_prompt_that_both_replies_repeat_counts_once():
    """As lists it is known which part it is; of three texts nobody knows, and the policy would learn to repeat the question."""
    hi = {"role": "user", "content": "Hi"}
    sides = {name: [hi, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert parse_pair({"prompt": [hi], **sides}).prompt == parse_pair(sides).prompt == [hi]
    assert parse_pair({"prompt": [hi], **{name: said[1:] for name, said in sides.items()}}).prompt == [hi]
    odd = [{"role": "user", "content": "Hi ", "name": "x"}]  # the same words
    assert parse_pair({"prompt": odd, **sides}).prompt == [hi]
    system = {"role": "system", "content": "Be kind."}
    for first in ([system, hi], [{"role": "user", "content": "Ho"}]):  # not the prompt, and not what follows it
        other = {name: [*first, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
        with pytest.raises(BadLineError, match='neither begins with "prompt" nor goes on where it ends'):
            parse_pair({"prompt": [hi], **other})
    with pytest.raises(BadLineError, match='begins with its whole "prompt"'):
        parse_pair({"prompt": "Q: How much is 2+2? A:", "chosen": "Q: How much is 2+2? A: 4", "rejected": "5"})
    assert parse_pair({"prompt": "Hi", "chosen": "Hi there!", "rejected": "What?"}).chosen == "Hi there!"


def test_the_three_parts_of_the_hh_recipe_share_no_opening(tmp_path, monkeypatch):
    openings = [f"question {i % 40}" for i in range(400)]
    pairs = [
        {name: f"\n\nHuman: {text}\n\nAssistant: {name} {i}" for name in ("chosen", "rejected")} for i, text in enumerate(openings)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr(hh, "ROOT", tmp_path)
    folder = hh.prepare(str(tmp_path / "pairs.jsonl"))
    parts = [
        {json.loads(line)["prompt"][0]["content"] for line in (folder / f"{name}.jsonl").open()}
        for name in ("train", "validation", "test")
    ]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
