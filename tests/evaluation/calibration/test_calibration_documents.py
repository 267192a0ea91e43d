"""Calibration documents: what counts in them, what comes first, and which are held out."""

import re
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sa_patch.errors import UserError
from sa_patch.evaluation.calibration.documents import Document, file_documents, generated_documents
from tests.tiny_checkpoint import tiny_tokenizer

TOKENS = 400


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def framing() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before every text, and one after it."""
    framed = tiny_tokenizer()
    special = [(token, framed.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    framed.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", None, special)
    assert len(framed.encode("a")) == 3
    return framed


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(str(number) for number in range(600)), encoding="utf-8")
    return path


def test_the_answers_of_recall_documents_count(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = generated_documents(tokenizer, TOKENS, 3, held_out=False)
    recall = [document for document in documents if document.kind == "recall"]
    assert [document.kind for document in documents] == 3 * ["recall"] + 3 * ["source"]
    for document in recall:
        shown = tokenizer.decode(document.tokens)
        body, _, questions = shown.partition("\nQuestion:")
        hidden = dict(re.findall(r"The pass word of the (\w+) is (\w+)\.", body))
        asked = re.findall(r"The pass word of the (\w+) is (\w+)", questions)
        assert len(hidden) == 4 and dict(asked) == hidden
        counted = [tokenizer.decode([document.tokens[place]]) for place in document.counted]
        assert [word.strip() for word in counted] == [word for _, word in asked]
        # Here every word is one token.
        assert document.asked == document.counted
        assert {document.tokens[place] for place in document.asked} < set(document.choices)
        assert len(document.choices) == 20
        # As long as it can be without another sentence of filler.
        assert TOKENS - 30 < len(document.tokens) <= TOKENS


def test_one_question_stands_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    depths = set()
    for held_out in (False, True):
        documents = generated_documents(tokenizer, TOKENS, 4, held_out, one_question=True)
        for index, document in enumerate(documents[:4]):
            body, _, question = tokenizer.decode(document.tokens).partition("\nQuestion:")
            hidden = dict(re.findall(r"The pass word of the (\w+) is (\w+)\.", body))
            assert len(hidden) == (1 if index % 2 == 0 else 4)
            ((owner, word),) = re.findall(r"The pass word of the (\w+) is (\w+)$", question)
            assert hidden[owner] == word
            assert document.asked == document.counted == (len(document.tokens) - 1,)
            if len(hidden) == 1:
                depths.add(body.index("pass word") * 10 // len(body))
    assert len(depths) > 1


def test_the_last_quarter_of_sources_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = generated_documents(tokenizer, TOKENS, 2, held_out=False)
    for document in documents[2:]:
        assert len(document.tokens) == TOKENS
        assert document.counted == tuple(range(300, 400))
    assert "argparse" in tokenizer.decode(documents[2].tokens)


def parts(document: Document, length: int = 60) -> set[tuple[int, ...]]:
    """All runs of as many tokens."""
    return {document.tokens[i : i + length] for i in range(len(document.tokens) - length)}


def test_held_out_documents_share_no_text(tokenizer: PreTrainedTokenizerFast, text: Path) -> None:
    for make in (
        lambda held_out: generated_documents(tokenizer, TOKENS, 2, held_out),
        lambda held_out: file_documents(tokenizer, text, 100, 2, held_out),
    ):
        here, there = make(False), make(True)
        assert len(here) == len(there) and not set(here) & set(there)
        for one in here:
            assert not any(parts(one) & parts(other) for other in there)
        assert make(False) == here, "the same every time"


@pytest.mark.parametrize("held_out", [False, True])
def test_the_tokenizers_first_token_stands_first_and_its_last_nowhere(
    framing: PreTrainedTokenizerFast, text: Path, held_out: bool
) -> None:
    bos, eos = framing.convert_tokens_to_ids(["<bos>", "<eos>"])
    documents = generated_documents(framing, TOKENS, 1, held_out)
    documents += file_documents(framing, text, 100, 1, held_out)
    for document in documents:
        assert document.tokens[0] == bos and bos not in document.tokens[1:]
        assert eos not in document.tokens
        assert len(document.tokens) <= TOKENS and min(document.counted) > 0


def test_a_tokenizer_without_a_first_token_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    for document in generated_documents(tokenizer, TOKENS, 1, held_out=False):
        assert not set(document.tokens) & set(tokenizer.all_special_ids)


def test_a_file_is_read_in_windows(
    tokenizer: PreTrainedTokenizerFast, framing: PreTrainedTokenizerFast, text: Path
) -> None:
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)
    for held_out in (False, True):
        start = 200 if held_out else 0
        plain = file_documents(tokenizer, text, 100, 2, held_out)
        assert [list(document.tokens) for document in plain] == [
            ids[start : start + 100],
            ids[start + 100 : start + 200],
        ]
        assert plain[0].counted == tuple(range(75, 100))
    framed = file_documents(framing, text, 100, 2, False)
    assert [list(document.tokens[1:]) for document in framed] == [ids[:99], ids[99:198]]


def test_what_there_is_not_enough_of_is_said(
    tokenizer: PreTrainedTokenizerFast, text: Path
) -> None:
    with pytest.raises(UserError, match="30 of 31 source files of 400 tokens"):
        generated_documents(tokenizer, TOKENS, 31, held_out=False)
    with pytest.raises(UserError, match=r"--n 60 has no room .* take (\d+) tokens") as caught:
        generated_documents(tokenizer, 60, 1, held_out=False)
    needed = int(re.findall(r"take (\d+) tokens", str(caught.value))[0])
    generated_documents(tokenizer, needed, 1, held_out=False)
    with pytest.raises(UserError, match="has no room"):
        generated_documents(tokenizer, needed - 1, 1, held_out=False)
    with pytest.raises(UserError, match="holds 9 windows of 200 tokens, and 12 are needed"):
        file_documents(tokenizer, text, 200, 6, held_out=True)


def test_a_file_that_is_no_text_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="mine.txt cannot be read as UTF-8 text"):
        file_documents(tokenizer, tmp_path / "mine.txt", 100, 1, held_out=False)
