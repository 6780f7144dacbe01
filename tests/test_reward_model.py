"""Reward models: padding changes nothing, end tokens count, a missing head is an error."""

import shutil

import pytest
import torch
from conftest import tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertDecoderConfig,
    ModernBertDecoderForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from recipes import toy, train_rm
from recipes.fit import Plan
from reinforce.errors import ConfigError
from reinforce.serving.config import ServeConfig
from reinforce.serving.load import load_reward
from reinforce.serving.protocol import Text
from reinforce.serving.reward_model import (
    bradley_terry_loss,
    fingerprint,
    load_reward_model,
    messages_ids,
    new_reward_model,
    query_ids,
    score,
)

TEXTS = [[1, 5, 9, 2], [1, 7], [1, 4, 4, 8, 11, 3]]


def classifier(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForSequenceClassification(toy.make_config(toy.make_tokenizer(), num_labels=1, initializer_range=0.3)).eval()
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, num_labels=1, pad_token_id=0,
                                                        initializer_range=0.3)).eval()  # fmt: skip
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                    intermediate_size=32, num_labels=1, initializer_range=0.3)).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_score_in_a_padded_batch_equals_the_score_alone_and_transformers_own(kind):
    model = classifier(kind)
    together = score(model, TEXTS, pad_id=0)
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(score(model, [text], pad_id=0)[0], together[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(input_ids=torch.tensor([text])).logits[0, 0], together[i], rtol=0, atol=1e-5)


def test_the_end_token_is_read_even_when_it_is_the_pad_token():
    model = classifier("llama")
    ended, open_ended = score(model, [[1, 5, 9, 2], [1, 5, 9]], pad_id=2).tolist()
    assert abs(ended - open_ended) > 1e-3
    assert score(model, [[1, 5, 9, 2]], pad_id=0).item() == pytest.approx(ended, abs=1e-5)


def test_a_checkpoint_without_a_reward_head_is_refused(tmp_path):
    tokenizer = toy.make_tokenizer()
    tiny_llama(vocabulary=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no trained reward head"):
        load_reward_model(str(tmp_path), torch.device("cpu"))


def test_a_checkpoint_with_two_labels_is_refused(tmp_path):
    tokenizer = toy.make_tokenizer()
    LlamaForSequenceClassification(toy.make_config(tokenizer, num_labels=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="2 labels"):
        load_reward_model(str(tmp_path), torch.device("cpu"))


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--reward-model"):
        load_reward_model(str(tmp_path / "nothing"), torch.device("cpu"))


def test_query_text_loses_pad_tokens_and_gains_no_second_begin_token():
    tokenizer = toy.make_tokenizer()
    expected = tokenizer.convert_tokens_to_ids(["<s>", "pizza", ":", "the", "crust", "</s>"])
    for text in ("pizza : the crust </s>", "<s> pizza : the crust </s>", "<pad> <pad> <s> pizza : the crust </s> <pad>"):
        assert query_ids(tokenizer, text) == expected
    assert query_ids(tokenizer, "pizza : the crust")[-1] != tokenizer.eos_token_id


def test_an_unfinished_message_is_rendered_without_its_closing_token():
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %} {{ m.content }} </s>{% endfor %}"
    chat = [{"role": "user", "content": "pizza :"}, {"role": "assistant", "content": "the crust"}]
    end = tokenizer.eos_token_id
    assert messages_ids(tokenizer, chat, finished=True).count(end) == 2
    assert messages_ids(tokenizer, chat, finished=False).count(end) == 1


def test_bradley_terry_training_orders_pairs_that_it_has_not_seen():
    model = classifier("llama")
    draw = torch.Generator().manual_seed(0)
    bodies = [torch.randint(20, 60, (5,), generator=draw).tolist() for _ in range(200)]
    pairs = [([1, *body, 10, 2], [1, *body, 11, 2]) for body in bodies]
    before = train_rm.pair_accuracy(model, pairs[150:], 0)
    train_rm.train_reward_model(model, pairs[:150], 0, Plan(lr=3e-3, batch_size=16, epochs=3, quiet=True))
    assert before < 0.9 and train_rm.pair_accuracy(model, pairs[150:], 0) == 1.0
    mean, std = train_rm.standardise(model, [c for c, _ in pairs], 0)
    rewards = (score(model, [c for c, _ in pairs], 0) - model.config.reward_mean) / model.config.reward_std
    assert rewards.mean().abs() < 1e-3 and rewards.std().item() == pytest.approx(1, abs=1e-3) and (mean, std) != (0, 1)


def test_a_damaged_file_of_a_backbone_is_one_sentence(small, tmp_path):
    folder = shutil.copytree(small / "policy", tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"--model .*: no model with a classification head"):
        new_reward_model(str(folder), toy.make_tokenizer(), torch.device("cpu"), "--model")


def test_bradley_terry_loss_is_the_negative_log_probability_of_the_choice():
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    torch.testing.assert_close(bradley_terry_loss(a, b), -(a - b).sigmoid().log().mean())


def test_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    names = [tmp_path / n for n in "abc"]
    for i, folder in enumerate(names):
        torch.manual_seed(i // 2)
        LlamaForSequenceClassification(toy.make_config(toy.make_tokenizer(), num_labels=1)).save_pretrained(folder)
    a, b, c = (fingerprint(str(n)) for n in names)
    assert a == b != c


def test_the_day_of_a_template_is_the_flags_and_belongs_to_the_fingerprint(small, tmp_path):
    from reinforce.serving.config import ServeConfig
    from reinforce.serving.load import load_reward
    from reinforce.serving.protocol import Text

    folder = tmp_path / "rm"
    shutil.copytree(small / "reward_model", folder)
    chat = Text(None, [{"role": "user", "content": "anna"}, {"role": "assistant", "content": "ben"}], None, None, None, True)
    plain, dated = (
        "{% for m in messages %}{{ m.content }} {% endfor %}",
        "{% for m in messages %}{% if strftime_now('%d') == '05' %}the {% endif %}{{ m.content }} {% endfor %}",
    )
    found = {}
    for template in (plain, dated):
        (folder / "chat_template.jinja").write_text(template)
        for date in ("2024-07-26", "2024-07-05"):
            reward = load_reward(ServeConfig(reward_model=str(folder), date=date))
            found[template, date] = reward.fingerprint, len(reward.encode(chat)[0])
    assert found[plain, "2024-07-26"] == found[plain, "2024-07-05"]
    (a, short), (b, long) = found[dated, "2024-07-26"], found[dated, "2024-07-05"]
    assert a != b and long == short + 2


def test_a_conversation_that_cannot_be_continued_is_rendered_as_ended():
    """The template drops what the response begins with, so transformers cannot find where to cut; a 422 would end a run."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.split()[-1] }} {% endfor %}"
    chat = [{"role": "user", "content": "anna"}, {"role": "assistant", "content": "the crust was superb"}]
    assert messages_ids(tokenizer, chat, finished=False) == messages_ids(tokenizer, chat, finished=True) != []


def test_scores_under_bf16_are_not_rounded_to_bfloat16(small):
    """Of 400 texts, more than 300 had the same score as another one."""
    model, tokenizer = load_reward_model(str(small / "reward_model"), torch.device("cpu"))
    texts = [tokenizer(f"{a} on the {b} :")["input_ids"] for a in toy.PEOPLE for b in toy.PARTS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score(model, texts, 0)
    assert len(set(scores.tolist())) > 1.25 * len(set(scores.bfloat16().tolist()))


WORDS = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", *(f"w{i}" for i in range(40))]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.5}


def saved(folder, kind, config, template, **special):
    """A reward model of any family, and a tokenizer of words that fills in a template."""
    torch.manual_seed(0)
    kind(config(num_labels=1, vocab_size=len(WORDS), **{"pad_token_id": 0, **SHAPE, **special.pop("extra", {})})).save_pretrained(
        folder
    )
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single=template, special_tokens=[(word, i) for i, word in enumerate(WORDS[:6])])
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **{"pad_token": "<pad>", **special}).save_pretrained(folder)
    return load_reward(ServeConfig(reward_model=str(folder), device="cpu", precision="fp32"))


def read(reward, text):
    return reward.encode(Text(text, None, None, None, None, True))[0]


def test_the_text_is_cut_behind_its_begin_token_and_to_what_the_model_has_positions_for(tmp_path):
    """Cut in front of it, BERT would pool an arbitrary word; RoBERTa has two positions fewer than its config says."""
    text = " ".join(f"w{i % 40}" for i in range(100))
    bert = saved(tmp_path / "bert", BertForSequenceClassification, BertConfig, "[CLS] $A [SEP]", cls_token="[CLS]",
                 sep_token="[SEP]", extra={"max_position_embeddings": 32})  # fmt: skip
    ids = read(bert, text)
    assert len(ids) == 32 and (ids[0], ids[-1]) == (4, 5)
    roberta = saved(tmp_path / "roberta", RobertaForSequenceClassification, RobertaConfig, "<s> $A </s>", bos_token="<s>",
                    eos_token="</s>", cls_token="<s>", sep_token="</s>", extra={"max_position_embeddings": 34})  # fmt: skip
    ids = read(roberta, text)
    assert len(ids) == roberta.max_length == 33 and (ids[0], ids[-1]) == (2, 3)
    roberta.score([ids])
    with pytest.raises(ConfigError, match="has 33 positions"):
        load_reward(ServeConfig(reward_model=str(tmp_path / "roberta"), device="cpu", max_length=34))


def test_a_longrope_model_reads_no_more_than_its_original_length(tmp_path):
    """Beyond it, all texts of the batch get other frequencies."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4,
            "original_max_position_embeddings": 16}  # fmt: skip
    extra = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": rope}
    reward = saved(tmp_path, Phi3ForSequenceClassification, Phi3Config, "<s> $A", bos_token="<s>", eos_token="</s>", extra=extra)
    short, long = (read(reward, " ".join(["w1"] * n)) for n in (5, 60))
    assert reward.score([short]) == pytest.approx(reward.score([short, long])[:1], abs=1e-5)


def test_an_end_token_stands_once_where_the_tokenizer_adds_one_too(tmp_path):
    reward = saved(tmp_path, LlamaForSequenceClassification, LlamaConfig, "<s> $A </s>", bos_token="<s>", eos_token="</s>")
    assert read(reward, "w1 w2") == [2, 7, 8]
    assert read(reward, "w1 w2 </s>") == read(reward, "<s> w1 w2 </s>") == [2, 7, 8, 3]
    assert read(reward, "w1 </s> </s>") == [2, 7, 3, 3]


def test_a_model_that_does_not_find_a_texts_last_token_is_not_served(tmp_path):
    with pytest.raises(ConfigError, match="the score of a text changes from"):  # it pools the padding
        saved(tmp_path / "xlnet", XLNetForSequenceClassification, XLNetConfig, "$A [SEP] [CLS]", eos_token="</s>", cls_token="[CLS]",
              sep_token="[SEP]", extra={"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32})  # fmt: skip
    with pytest.raises(ConfigError, match="a plain text has no score"):  # it looks for end tokens
        saved(tmp_path / "bart", BartForSequenceClassification, BartConfig, "<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
              extra={"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                     "encoder_ffn_dim": 16, "decoder_ffn_dim": 16})  # fmt: skip
    with pytest.raises(ConfigError, match="with its end token and one without get the same score"):
        saved(tmp_path / "decoder", ModernBertDecoderForSequenceClassification, ModernBertDecoderConfig, "<s> $A", bos_token="<s>",
              eos_token="</s>", pad_token="</s>", extra={"pad_token_id": 3, "eos_token_id": 3, "bos_token_id": 2})  # fmt: skip
    with pytest.raises(ConfigError, match="the score of a text changes from"):  # its convolutions see the padding
        saved(tmp_path / "convbert", ConvBertForSequenceClassification, ConvBertConfig, "[CLS] $A [SEP]", cls_token="[CLS]",
              sep_token="[SEP]", extra={"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1})  # fmt: skip


def test_a_token_that_the_tokenizer_alone_knows_has_no_score_and_may_be_the_pad_token(small, tmp_path):
    folder = shutil.copytree(small / "reward_model", tmp_path / "rm")
    texts = ["anna on the pizza in lima :", "anna"]

    def scores():
        reward = load_reward(ServeConfig(reward_model=str(folder), device="cpu", precision="fp32"))
        return reward, reward.score([read(reward, text) for text in texts])

    _, before = scores()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<nothing>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    reward, after = scores()
    assert after == before
    with pytest.raises(ValueError, match=r"the token \d+, of the tokenizer alone"):
        read(reward, "anna <image>")


def test_what_changes_a_reward_changes_the_fingerprint(small, tmp_path):
    from reinforce.serving.config import ServeConfig
    from reinforce.serving.load import load_reward

    folder = shutil.copytree(small / "reward_model", tmp_path / "rm")
    changes = [{}, {"reward_mean": 1.0}, {"reward_std": 2.0}, {"reward_clip": 3.0}, {"max_length": 50}, {"precision": "bf16"}]
    found = [load_reward(ServeConfig(reward_model=str(folder), **change)).fingerprint for change in changes]
    vocabulary = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(vocabulary.replace('"crust"', '"crumb"'))
    found.append(load_reward(ServeConfig(reward_model=str(folder))).fingerprint)
    assert len(set(found)) == 7
