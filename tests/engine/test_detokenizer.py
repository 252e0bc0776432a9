"""Text given out in pieces is the text of the whole, in whole characters."""

from __future__ import annotations

import random

import pytest
from phasewise.engine.detokenizer import StopStrings, TokenText
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "hello world, this is ünïcode 日本語 text 😀👩‍👩‍👧 and more. "


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with a mark for the space, and bytes for what is not a word."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for word in ("▁", "▁Hello", "▁world", "lo", "é", "."):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    text = TokenText(tokenizer, frozenset([0, 1]), prompt or [])
    return [text.push(i) for i in ids] + [text.flush()]


def test_pieces_of_random_ids_join_to_the_whole_decoding(byte_level: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(byte_level.get_vocab_size()) for _ in range(100)]
        whole = byte_level.decode(ids, skip_special_tokens=True)
        assert "".join(stream(byte_level, ids)) == whole


def test_no_piece_holds_part_of_a_character(byte_level: Tokenizer) -> None:
    ids = [
        i
        for word, _ in byte_level.pre_tokenizer.pre_tokenize_str(TEXT)
        for i in (byte_level.token_to_id(c) for c in word)
    ]
    pieces = stream(byte_level, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_characters_made_of_fallback_bytes_come_out_whole(byte_fallback: Tokenizer) -> None:
    ids = [260] + [3 + b for b in "é日😀".encode()] + [261, 264]
    assert "".join(stream(byte_fallback, ids)) == "Helloé日😀 world."
    assert not any("\ufffd" in piece for piece in stream(byte_fallback, ids))


def test_first_word_is_joined_to_the_prompt_as_the_tokenizer_would(
    byte_fallback: Tokenizer,
) -> None:
    assert "".join(stream(byte_fallback, [261], prompt=[260])) == " world"
    assert "".join(stream(byte_fallback, [261])) == "world"


def test_a_lone_byte_is_given_out_at_the_end_at_the_latest(byte_fallback: Tokenizer) -> None:
    assert stream(byte_fallback, [260, 3 + 0xE3]) == ["Hello", "", "\ufffd"]


def test_bytes_that_never_become_text_do_not_grow_without_bound(byte_level: Tokenizer) -> None:
    lone = byte_level.token_to_id("ÿ")  # byte 0xFF
    assert "".join(stream(byte_level, [lone] * 500)) == "\ufffd" * 500


@pytest.mark.parametrize("cuts", [[], [3], [5], [6], [7], [5, 6, 7]])
def test_stop_string_is_found_wherever_pieces_are_cut(cuts: list[int]) -> None:
    text, borders = "say STOP now", [0, *cuts, 12]
    stops = StopStrings(["STOP", "TOPS"])
    pieces = [stops.push(text[a:b]) for a, b in zip(borders, borders[1:], strict=False)]
    assert "".join(pieces) + stops.flush() == "say "
    assert stops.found == "STOP"


def test_text_that_only_looked_like_a_stop_string_is_given_out() -> None:
    stops = StopStrings(["abc", "bd"])
    assert [stops.push("xab"), stops.push("b"), stops.push("q")] == ["x", "ab", "bq"]
    assert stops.push("ab") + stops.flush() == "ab" and stops.found is None


def test_earliest_stop_string_wins() -> None:
    stops = StopStrings(["late", "ear"])
    assert stops.push("an early, late one") == "an " and stops.found == "ear"
