"""What a model wrote is read again as the tokens that it wrote, whatever its tokenizer does to spaces."""

import pytest
from transformers import LlamaTokenizer

from axolotl_asft.tokens import first_words, turn_tokens, written


@pytest.fixture(scope="module")
def sentence_piece() -> LlamaTokenizer:
    """As Llama 2's: a space is a letter of the word after it, and one is put before every text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    merges = []
    for letter in "abcdefghijklmnopqrstuvwxyzI[]/:\nST":
        vocab.setdefault(letter, len(vocab))
    for word in ("I", "cannot", "help"):
        for i in range(1, len(word)):
            merges.append((word[:i], word[i]))
            vocab.setdefault(word[: i + 1], len(vocab))
        merges.append(("▁", word))
        vocab["▁" + word] = len(vocab)
    return LlamaTokenizer(vocab=vocab, merges=merges)


def ids_of(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.mark.parametrize(
    ("request_text", "wrote"),
    [
        ("[INST] help [/INST]", ["▁I", "▁cannot", "▁help"]),  # Llama 2, Mistral
        ("user:\nhelp\nassistant:\n", ["I", "▁cannot", "▁help"]),  # Zephyr and its like
        ("user:\nhelp\nassistant:\n", ["▁I", "▁cannot"]),
    ],
)
def test_an_answer_is_read_as_it_was_written(sentence_piece, request_text, wrote):
    asked = sentence_piece(request_text, add_special_tokens=False)["input_ids"]
    tokens = ids_of(sentence_piece, *wrote)
    text = written(sentence_piece, [*tokens, sentence_piece.eos_token_id])
    ids, start = turn_tokens(sentence_piece, request_text, text)
    assert ids[:start] == asked
    assert sentence_piece.convert_ids_to_tokens(ids[start:]) == wrote


def test_a_space_is_kept_where_the_model_wrote_it(sentence_piece):
    assert written(sentence_piece, ids_of(sentence_piece, "▁I", "▁cannot")) == " I cannot"
    assert written(sentence_piece, ids_of(sentence_piece, "I", "▁cannot")) == "I cannot"
    assert sentence_piece.decode(ids_of(sentence_piece, "▁I", "▁cannot")) == "I cannot", "by itself it is lost"


def test_where_the_seam_is_one_token(sentence_piece):
    """The answer begins where the two readings part."""
    ids, start = turn_tokens(sentence_piece, "[INST] ", "I cannot")
    assert sentence_piece.convert_ids_to_tokens(ids[start:]) == ["▁I", "▁cannot"]


def test_an_empty_answer_has_no_tokens(sentence_piece):
    ids, start = turn_tokens(sentence_piece, "help:", "")
    assert 0 < start == len(ids)


def test_first_words_keep_the_space(sentence_piece):
    assert first_words(sentence_piece, " I cannot help", 2) == " I cannot"
