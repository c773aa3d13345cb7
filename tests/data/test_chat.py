"""Documents and prompts as turns of a chat: token by token what the tokenizer's own template makes of them."""

from __future__ import annotations

from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from cggr_ray.data.chat import Turns
from cggr_ray.data.dataset import DataSpec
from cggr_ray.data.sources import Document
from cggr_ray.data.store import TokenStore, write_store
from cggr_ray.data.tokenizer import first_token
from cggr_ray.evaluation.generate import prompt_tokens, stopping
from cggr_ray.evaluation.task import Question, Task

SPECIAL = ["<eos>", "<bos>", "<turn>", "</turn>"]
LETTERS = [chr(c) for c in range(ord(" "), ord("~"))] + ["\n"]
# Gemma's, ChatML with a thought that is left empty, and one that shortens what is said.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role if m.role == 'user' else 'model' }}\n{{ m.content | trim }}"
    "</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}(thought)\n{% endif %}{{ m.content }}"
    "</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# ChatML whose turns begin and end with the tokenizer's own bos and eos, as SmolLM2's do.
MARKED = (
    "<bos>system\nBe kind.<eos>\n{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
# Tells the model the date, as Llama 3.2's does.
DATED = (
    "<turn>system\nToday is {% if date_string is defined %}{{ date_string }}{% else %}{{ strftime_now('%d %b %Y') }}"
    "{% endif %}.</turn>\n" + THINKS
)
REWORDS = "{% for m in messages %}<turn>{{ m.content | lower }}</turn>{% endfor %}"


def tokenizer_of(template: str | None, bos: bool = True, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """A token a letter."""
    core = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate([*SPECIAL, *LETTERS])}, "<eos>"))
    core.add_special_tokens(SPECIAL)
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>" if bos else None, name_or_path="mine"
    )
    tokenizer.chat_template = template
    return tokenizer


def turns(**said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said.items()]


def ids(tokenizer: PreTrainedTokenizerFast, said: list[dict[str, str]], **keywords: Any) -> list[int]:
    found = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False, **keywords)
    assert isinstance(found, list)
    return found if found[0] == 1 else [0, *found]


DOCUMENTS = [Document("What is 1 + 1?", "It is 2.\n#### 2"), Document("b\nc", "d")]


@pytest.mark.parametrize(("template", "bos"), [(GEMMA, True), (THINKS, False)])
def test_a_document_is_its_two_turns_and_an_end(template: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(template, bos, adds_bos=bos)
    write_store(tmp_path, DOCUMENTS, tokenizer, chat=True)
    store = TokenStore.open(tmp_path)
    for number, document in enumerate(DOCUMENTS):
        found = store.tokens[store.offsets[number] : store.offsets[number + 1]].tolist()
        said = turns(user=document.prompt, assistant=document.completion)
        assert found == [*ids(tokenizer, said), 0]
        asked = ids(tokenizer, turns(user=document.prompt), add_generation_prompt=True)
        assert found[: store.prompts[number]] == asked


@pytest.mark.parametrize(("template", "bos"), [(GEMMA, True), (THINKS, False)])
def test_a_question_is_asked_as_documents_begin(template: str, bos: bool) -> None:
    tokenizer, task = tokenizer_of(template, bos, adds_bos=bos), Task("asked", chat=True, stop=("Q:",))
    (found,) = prompt_tokens(tokenizer, [Question("0", "What?\n", "")], task)
    assert found == ids(tokenizer, turns(user="What?"), add_generation_prompt=True)
    assert stopping(tokenizer, task).stop == ("Q:", "</turn>")


def test_a_first_turn_keeps_the_token_that_marks_it(tmp_path: Path) -> None:
    """It is the tokenizer's bos, which the tokenizer does not put before a text."""
    tokenizer, task = tokenizer_of(MARKED, adds_bos=False), Task("asked", chat=True)
    asked = "<eos><bos>system\nBe kind.<eos>\n<bos>user\nWhat?<eos>\n<bos>assistant\n"
    assert tokenizer.decode(prompt_tokens(tokenizer, [Question("0", "What?", "")], task)[0]) == asked
    write_store(tmp_path, [Document("What?", "It.")], tokenizer, chat=True)
    assert tokenizer.decode(TokenStore.open(tmp_path).tokens.tolist()) == f"{asked}It.<eos>\n<eos>"


def test_documents_and_questions_do_not_depend_on_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race goes on, and is reproduced, on another one than that of its preparation."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Later:
            return cls(2031, 5, 17, tzinfo=tz)

    tokenizer, task = tokenizer_of(DATED), Task("asked", chat=True)

    def spelled(folder: Path) -> list[list[int]]:
        write_store(folder, DOCUMENTS, tokenizer, chat=True)
        return [TokenStore.open(folder).tokens.tolist(), *prompt_tokens(tokenizer, [Question("0", "What?", "")], task)]

    before = spelled(tmp_path / "a")
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert "17 May 2031" in tokenizer.apply_chat_template(turns(user="What?"), tokenize=False)
    assert spelled(tmp_path / "b") == before


def test_what_is_not_asked_for_stays_plain(tmp_path: Path) -> None:
    tokenizer, task = tokenizer_of(GEMMA), Task("asked")
    write_store(tmp_path, [Document("a", "b")], tokenizer)
    assert tokenizer.decode(TokenStore.open(tmp_path).tokens.tolist()) == "<bos>a\nb<eos>"
    assert tokenizer.decode(prompt_tokens(tokenizer, [Question("0", "a\n", "")], task)[0]) == "<bos>a\n"
    assert stopping(tokenizer, task) == task


@pytest.mark.parametrize(("bos", "adds_bos", "first"), [(True, True, 1), (True, False, 0), (False, False, 0)])
def test_documents_begin_as_the_tokenizer_begins_a_text(bos: bool, adds_bos: bool, first: int) -> None:
    assert first_token(tokenizer_of(None, bos, adds_bos)) == first


@pytest.mark.parametrize(
    ("template", "message"), [(None, "'mine' has no chat template; accepted"), (REWORDS, "is not one turn behind")]
)
def test_a_template_that_cannot_serve_is_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Turns(tokenizer_of(template))


def test_what_has_no_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="the document 'alone' has no prompt; accepted"):
        Turns(tokenizer_of(GEMMA)).document(Document("", "alone"))
    with pytest.raises(ValueError, match="chat = true with tokenizer 'shipped', which has no chat template; accepted"):
        DataSpec(chat=True)
