"""What the reward model reads is what was sampled: the same tokens, and an end token only where there is one."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes import smollm2, toy
from recipes.sft import encode_example
from reinforce.data.prompts import tokenize
from reinforce.objective import Judged
from reinforce.policy import with_template
from reinforce.rollout import Rollout
from reinforce.run.group import make_groups
from reinforce.sampler import Sampling, row_seed, sample
from reinforce.serving.reward_model import messages_ids, query_ids
from reinforce.text import decoded, response_ids, reward_requests


def rollout(tokenizer, records, k=16, pad_id=None):
    prompts, _ = tokenize(records, tokenizer, 100, "--train-data")
    how = Sampling(5, (tokenizer.eos_token_id,), tokenizer.pad_token_id if pad_id is None else pad_id)
    seeds = [row_seed(0, 0, p.index, j) for p in prompts for j in range(k)]
    model = tiny_llama(vocabulary=len(tokenizer))
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2
    return prompts, sample(model, [p.ids for p in prompts], seeds, how)


def test_query_text_is_read_as_exactly_the_sampled_tokens():
    tokenizer = toy.make_tokenizer()
    prompts, out = rollout(tokenizer, [{"prompt": "anna on the pizza in rome :"}, {"prompt": "ben on the film :", "label": 3}])
    ((rows, request),) = reward_requests(tokenizer, prompts, out, as_text=False)
    assert rows == list(range(len(out.finished)))
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id}
    checked = 0
    for b, ids in enumerate(response_ids(out)):
        if not special & set(ids):
            assert query_ids(tokenizer, request["query"][b]) == [*prompts[b // 16].ids, *ids]
            checked += 1
        assert request["query"][b].startswith(request["prompts"][b])
    assert checked >= 4 and out.finished.any() and not out.finished.all()
    assert request["finished"] == out.finished.tolist() and request["labels"] == [None] * 16 + [3] * 16
    ends = [q.endswith("</s>") for q in request["query"]]
    assert ends == request["finished"]
    assert not any("</s>" in c for c in request["completions"])


def test_messages_carry_the_response_without_special_tokens_and_can_be_sent_as_text():
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}on{% endif %}"
    prompts, out = rollout(tokenizer, [{"messages": [{"role": "user", "content": "pizza :"}]}])
    ((rows, request),) = reward_requests(tokenizer, prompts, out, as_text=False)
    assert rows == list(range(len(out.finished)))
    assert "query" not in request
    for chat, plain in zip(request["messages"], request["completions"], strict=True):
        assert chat[0] == {"role": "user", "content": "pizza :"} and chat[1] == {"role": "assistant", "content": plain}
    assert reward_requests(tokenizer, prompts, out, as_text=True)[0][1]["query"][0].startswith("<s> pizza : on")


def test_a_file_that_mixes_texts_and_messages_sends_each_prompt_in_its_own_form_whatever_its_neighbours():
    """Decided for a whole batch, the same prompt would be sent as text on one rank and as messages on two."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<s> {% for m in messages %}{{ m.content }} {% endfor %}"
    records = [{"prompt": "anna on the pizza :"}, {"messages": [{"role": "user", "content": "pizza :"}]}, {"prompt": "ben :"}]
    prompts, out = rollout(tokenizer, records)
    k = len(out.finished) // 3
    sent = {}
    for rows, request in reward_requests(tokenizer, prompts, out, as_text=False):
        for i, b in enumerate(rows):
            sent[b] = {name: column[i] for name, column in request.items()}
    alone = []
    for i, prompt in enumerate(prompts):
        part = out.take(range(i * k, (i + 1) * k))
        ((_, request),) = reward_requests(tokenizer, [prompt], part, as_text=False)
        alone += [{name: column[j] for name, column in request.items()} for j in range(k)]
    assert [sent[b] for b in range(3 * k)] == alone
    assert ["messages" in sent[b] for b in range(3 * k)] == [b // k == 1 for b in range(3 * k)]
    ((rows, request),) = reward_requests(tokenizer, prompts, out, as_text=True)
    assert "query" in request and len(rows) == 3 * k


def test_a_space_between_prompt_and_response_is_not_lost():
    """A tokenizer of the SentencePiece kind marks word starts, and decodes the response alone without its first space."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "▁sat": 3, "</s>": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.decode([3]) == "sat"
    assert decoded(tokenizer, [1, 2], [3], skip_special_tokens=False) == " sat"
    assert decoded(tokenizer, [1, 2], [3, 4], skip_special_tokens=True) == " sat"


def test_groups_hold_each_prompts_own_rows():
    tokenizer = toy.make_tokenizer()
    prompts, out = rollout(tokenizer, [{"prompt": "anna on the pizza :"}, {"prompt": "ben on the film :"}])
    reward = out.logp.sum(1).double()
    groups = make_groups(tokenizer, prompts, out, Judged(reward, None, reward))
    assert [g.prompt for g in groups] == [p.text for p in prompts]
    assert [v for g in groups for v in g.logp] == pytest.approx(reward.tolist())
    assert [n for g in groups for n in g.length] == out.length.tolist()


def test_a_model_read_from_gguf_can_be_saved_once_its_marks_are_cleared(tmp_path):
    model = tiny_llama()

    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gguf"))
    model.is_quantized, model.quantization_method = True, "gguf"
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ValueError, match="gguf"):
        model.save_pretrained(tmp_path)
    smollm2.forget_quantisation(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_the_reward_model_reads_a_message_with_the_tokens_it_was_trained_on():
    """SFT's own answer, token for token, as a rollout: a base model's template has a space before it, which is not the message's."""
    words = "\n\nHuman: Hi\n\nAssistant: I don't know. [INST] [/INST]</s>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([words], trainer)
    mistral = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
    for template in (None, mistral, mistral.replace("' ' + m.content", "m.content")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
        tokenizer.chat_template = template
        with_template(tokenizer, "--model")
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I don't know."}
        (prompt,), _ = tokenize([{"messages": [question]}], tokenizer, 999, "f")
        ids, response = encode_example(tokenizer, [tokenizer.eos_token_id], [question, answer])
        assert tuple(ids) == prompt.ids
        out = Rollout(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), torch.tensor([response]),
                      torch.ones(1, len(response), dtype=torch.bool), torch.zeros(1, len(response)), torch.tensor([True]))  # fmt: skip
        ((_, request),) = reward_requests(tokenizer, [prompt], out, as_text=False)
        assert request["messages"][0] == [question, answer]
        assert messages_ids(tokenizer, request["messages"][0], True) == [*ids, *response]
