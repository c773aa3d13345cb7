"""A tokenizer's chat template around one question and its answer, as an instruction-tuned model knows them.

Templates are Jinja, which transformers runs in a sandbox without access to the process. One that asks for the date is
told the same on every day: documents, and questions asked later, are then those of any other preparation.
"""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING, Any

from cggr_ray.data.sources import Document
from cggr_ray.data.tokenizer import first_token

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# Stand for what is said, to see what a template puts around it.
QUESTION, ANSWER = "QUESTION", "ANSWER"
# What Llama 3's templates say where nobody knows the date, and what stands before a template in place of the function
# that says today's.
TODAY = date(2024, 7, 26)
REPLACED = "".join(f"|replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "dmyYbBaAjHMS")
DATED = f"{{% macro strftime_now(form) %}}{{{{ form{REPLACED} }}}}{{% endmacro %}}\n"


class Turns:
    """What a template puts before a question, between it and its answer, and behind that; `end` ends an answer.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not hold a question and an answer as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise ValueError(f"chat = true, and tokenizer {name!r} has no chat template; accepted: chat = false, or "
                             "the tokenizer of an instruction-tuned model")  # fmt: skip
        asked = self._rendered(tokenizer, {"user": QUESTION}, add_generation_prompt=True)
        whole = self._rendered(tokenizer, {"user": QUESTION, "assistant": ANSWER})
        before, found, between = asked.partition(QUESTION)
        opening, given, behind = whole.removeprefix(asked).partition(ANSWER)
        if not (found and given and whole.startswith(asked) and behind.strip()):
            raise ValueError(f"chat = true, and the chat template of {name!r} is not one turn behind another; "
                             "accepted: chat = false")  # fmt: skip
        # Documents that begin with that token have it already; of others it is a part of the turn.
        begins = first_token(tokenizer) == tokenizer.bos_token_id
        self._before, self._between = before.removeprefix(tokenizer.bos_token) if begins else before, between
        self._opening, self._behind, self.end = opening, behind, behind.strip()

    def prompt(self, text: str) -> str:
        """All that a model reads before it answers."""
        return self._before + text.strip() + self._between

    def document(self, document: Document) -> Document:
        """The two turns.

        Raises:
            ValueError: a document without a prompt, which nobody has asked for.
        """
        if not document.prompt.strip():
            raise ValueError(f"chat = true, and the document {document.completion[:40]!r} has no prompt; "
                             "accepted: chat = false, or sources with prompts")  # fmt: skip
        return Document(self.prompt(document.prompt), self._opening + document.completion.strip() + self._behind)

    @staticmethod
    def _rendered(tokenizer: PreTrainedTokenizerBase, said: dict[str, str], **keywords: Any) -> str:
        turns = [{"role": role, "content": content} for role, content in said.items()]
        template = DATED + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **keywords)
        assert isinstance(text, str)
        return text
