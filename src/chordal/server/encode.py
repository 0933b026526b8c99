"""From texts and messages to tokens, and from an answer's tokens to text."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import numpy as np

from chordal.errors import InputError, PromptError
from chordal.forward import Ints
from chordal.generation import Model
from chordal.server.errors import APIError
from chordal.server.schema import Message
from chordal.server.tokens import TokenTexts


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model gets it, int `[n]`, and as text."""

    tokens: Ints
    text: str


class Encoder:
    """Encodes for one model, with a copy of its tokenizer; belongs to one thread.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokenizer = copy.deepcopy(model.tokenizer)
        self._texts = TokenTexts(self._tokenizer)
        self._variables = _template_variables(self._tokenizer)

    def text(self, prompt: str | Seq[int], num_kept: int | None) -> EncodedPrompt:
        """Encode a prompt.

        Args:
            prompt: A text or token ids.
            num_kept: How many of its last tokens are kept; None keeps all.

        Raises:
            PromptError: It has no tokens, or tokens that the model cannot take.
        """
        tokens = self._model.encode(
            self._tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        )
        kept = _keep(tokens, num_kept)
        is_whole = isinstance(prompt, str) and len(kept) == len(tokens)
        return EncodedPrompt(kept, str(prompt) if is_whole else self.decode(kept))

    def chat(
        self,
        messages: Seq[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        num_kept: int | None = None,
    ) -> EncodedPrompt:
        """Put messages into the chat template.

        Args:
            messages: The turns of the chat.
            add_generation_prompt: Whether the prompt ends where an answer begins.
            variables: Of the template.
            num_kept: As for `text`.

        Raises:
            InputError: There is no template, or it refuses the messages.
            APIError: The template has no such variable.
        """
        name = self._model.name
        if not self._tokenizer.chat_template:
            raise InputError(f"{name} has no chat template; use /v1/completions.")
        for variable in variables or ():
            if self._variables is not None and variable not in self._variables:
                raise APIError(
                    400,
                    f"the chat template of {name} has no variable {variable!r}.",
                    param="chat_template_kwargs",
                )
        # What OpenAI calls developer is what templates know as system.
        given = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in messages
        ]
        try:
            tokens = self._tokenizer.apply_chat_template(
                given,
                add_generation_prompt=add_generation_prompt,
                # Special tokens that a user writes are text: they must not pass for a turn of the chat.
                sanitize_control_tokens=True,
                **(variables or {}),
            )["input_ids"]
        except Exception as error:  # templates raise what they like
            raise PromptError(f"the chat template of {name} refuses the messages: {error}") from error
        return EncodedPrompt(_keep(self._model.encode(tokens), num_kept), "")

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Give the token ids of a text, which may have none."""
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, tokens: Seq[int] | Ints) -> str:
        """Give the text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens)))

    def token_texts(self, tokens: Seq[int]) -> list[str]:
        """Show each token alone."""
        return [self._texts.text(token) for token in tokens]


def detokenizer(
    model: Model, prompt: EncodedPrompt, *, continues_text: bool, skip_special_tokens: bool
) -> Callable[[Ints], str]:
    """Give what turns the tokens of an answer into text; it belongs to the engine's thread.

    Args:
        model: The model.
        prompt: What is answered.
        continues_text: Read the answer behind the last token of the prompt: a tokenizer may drop a space at
            the start of a text, and this is none.
        skip_special_tokens: Leave special tokens out.
    """

    def decode(tokens: Ints) -> str:
        return str(model.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    before = prompt.tokens[-1:]
    # Half a character would become another one with what follows.
    if not continues_text or (text_before := decode(before)).endswith("\ufffd"):
        return decode
    return lambda tokens: decode(np.concatenate([before, tokens]))[len(text_before) :]


def _keep(tokens: Ints, num: int | None) -> Ints:
    return tokens if num is None else tokens[max(0, len(tokens) - num) :]


def _template_variables(tokenizer: Any) -> set[str] | None:
    """List what the chat template reads; None if that cannot be told."""
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
    try:
        template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.get_chat_template())
        return jinja2.meta.find_undeclared_variables(environment.parse(template))
    except (jinja2.TemplateError, ValueError):
        return None
