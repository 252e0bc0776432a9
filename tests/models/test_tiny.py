"""The tiny checkpoint loads, is small, encodes any text, and has learnt something."""

import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

TINY = Path(__file__).parents[2] / "models" / "tiny"
MAX_TOTAL_BYTES = 10_000_000
MAX_PERPLEXITY = 12.0  # measured 4.5; random weights give about the vocabulary's size, 2048
MIN_DISTINCT_RATIO = 0.3  # a model stuck on one phrase falls below

# Written for this test, so in no version of the standard library.
UNSEEN_CODE = '''\
class Counter:
    """Count how many times each name has been seen."""

    def __init__(self, names=None):
        self._counts = {}
        if names is not None:
            for name in names:
                self.add(name)

    def add(self, name):
        """Add one to the count of name and return the new value."""
        if not isinstance(name, str):
            raise TypeError("name must be a string, not %r" % type(name))
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._counts[name]

    def __len__(self):
        return len(self._counts)
'''


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, token_ids: list[int]) -> float:
    tokens = torch.tensor([token_ids])
    return math.exp(model(input_ids=tokens, labels=tokens).loss.item())


def generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_tokens: int = 48,
    temperature: float | None = None,
) -> list[int]:
    """The continuation of `prompt`, without the prompt; greedy where no temperature is given."""
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": temperature is not None, "temperature": temperature}
    output = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def distinct_ratio(tokens: list[int]) -> float:
    """Distinct tokens over all tokens: 1 where none repeats, near 0 in a loop."""
    assert len(tokens) >= 4, "too short to judge"
    return len(set(tokens)) / len(tokens)


def test_config_is_the_shape_promised(model: LlamaForCausalLM) -> None:
    config = model.config
    assert isinstance(config, LlamaConfig)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (256, 704, 2048)
    assert (config.num_hidden_layers, config.head_dim) == (4, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.max_position_embeddings == 2048
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_weights_are_stored_in_bfloat16() -> None:
    stored = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_all_files_together_stay_under_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) < MAX_TOTAL_BYTES


def test_model_and_tokenizer_agree_on_special_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for owner in (model.config, model.generation_config):
        assert owner.bos_token_id == tokenizer.convert_tokens_to_ids("<|bos|>") == 0
        assert owner.eos_token_id == tokenizer.convert_tokens_to_ids("<|eos|>") == 1
        assert owner.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>") == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n  \t\r\n",
        "def read_file(path):\n    return open(path).read()\n",
        "naïve café, Ærøskøbing, Łódź",
        "e\u0301 is e with a combining accent",
        "👩🏽‍🚀 and 🇸🇪 and 🎉",
        "漢字とかな, العربية, עברית, हिन्दी",
        "\x00\x07\u200b\ufeff\uffff\U0010ffff",
        " spaces ,  before . punctuation ! isn 't",
    ],
)
def test_any_text_survives_encoding_and_decoding(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_single_byte_has_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    alphabet = {token for token in tokenizer.get_vocab() if len(token) == 1}
    assert len(alphabet) == 256


def test_encoding_adds_no_special_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not set(tokenizer.encode("def f(x):\n")) & set(tokenizer.all_special_ids)


def test_prompt_ending_in_a_newline_is_a_prefix_of_the_longer_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = tokenizer.encode("def f(x):\n")
    assert tokenizer.encode("def f(x):\n    return x\n")[: len(prompt)] == prompt


def test_chat_template_ends_where_the_assistant_starts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "user", "content": "What does a do?"},
        {"role": "assistant", "content": "Add."},
        {"role": "user", "content": "And b?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|user|>What does a do?<|assistant|>Add.<|eos|><|user|>And b?<|assistant|>"
    )


# Two prompts whose greedy text goes on. About half of all prompts end in a loop (the README says
# so): a model this small repeats itself unless it samples, which the test after this one does.
@pytest.mark.parametrize("prompt", ["def read_file(path):\n", "Return True if"])
def test_greedy_text_of_the_demo_prompts_does_not_get_stuck(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    assert distinct_ratio(generate(model, tokenizer, prompt)) > MIN_DISTINCT_RATIO


@pytest.mark.parametrize("prompt", ["Return the number of", "import os\n"])
def test_sampling_frees_prompts_whose_greedy_text_loops(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    torch.manual_seed(0)
    sampled = generate(model, tokenizer, prompt, temperature=0.8)
    assert distinct_ratio(sampled) > MIN_DISTINCT_RATIO


def test_body_of_a_function_is_indented(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = tokenizer.decode(generate(model, tokenizer, "def read_file(path):\n", max_tokens=8))
    assert text.startswith("    ")


def test_unseen_code_is_predicted_far_better_than_by_random_weights(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    token_ids = tokenizer.encode(UNSEEN_CODE)
    torch.manual_seed(0)
    untrained = LlamaForCausalLM(model.config).eval()
    assert perplexity(model, token_ids) < MAX_PERPLEXITY
    assert perplexity(untrained, token_ids) > 100 * MAX_PERPLEXITY
