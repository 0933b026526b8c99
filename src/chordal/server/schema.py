"""What clients send: OpenAI's request bodies, with the fields that open engines add.

Every field is honoured or refused by name; nothing is ignored. Types are strict: "1" is not 1, true is no
number, numbers are finite. What depends on the server's limits or on a model is checked in `prepare`.
"""

# No `from __future__ import annotations`: FastAPI reads the types of these fields.

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from chordal.server.strict import MESSAGE_UNSUPPORTED, UNSUPPORTED, Strict, refuse

# OpenAI has 4; evaluation tools send a task's own, five or more, and the end of the text.
MAX_STOPS = 16
MAX_LOGPROBS = 20
_INT64 = 2**63

# Parameters of transformers' `apply_chat_template`: what a request may not reach through its template.
_TEMPLATE_OWN = frozenset(
    "conversation messages chat_template tokenizer tokenize tools documents add_generation_prompt "
    "continue_final_message padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs processor_kwargs load_audio_from_video".split()
)

Int64 = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]


def _texts_of_stop(value: Any) -> Any:
    """Make `stop` a list of texts."""
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refuse("", f"must be text, or a list of at most {MAX_STOPS} texts")
    if len(stops) > MAX_STOPS:
        raise refuse("", f"must be at most {MAX_STOPS} texts; got {len(stops)}")
    if "" in stops:
        raise refuse("", "must not hold an empty text")
    return stops


def _list_of_prompts(value: Any) -> Any:
    """Make `prompt` a list of prompts, each a text or a list of token ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if prompts == [] or prompts == [[]]:
        raise refuse("", "must not be empty")
    if not isinstance(prompts, list) or not all(isinstance(one, str) or _is_ids(one) for one in prompts):
        raise refuse("", "must be text, a list of texts, a list of token ids, or a list of those")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(token) is int for token in value)


def _pairs_of_bias(value: Any) -> Any:
    """Make the keys of `logit_bias` numbers."""
    if not isinstance(value, dict):
        return {} if value is None else value
    for token in value:
        # One way to write each: int() would also take "1_0", " 1", "01" and other scripts.
        if not (isinstance(token, str) and re.fullmatch("0|[1-9][0-9]{0,17}", token)):
            raise refuse("", f"must have token ids as keys; got {str(token)[:32]!r}")
    return {int(token): bias for token, bias in value.items()}


class StreamOptions(Strict):
    """What a stream tells besides text."""

    include_usage: bool | None = Field(False, description="One more chunk at the end, with the usage.")
    continuous_usage_stats: bool | None = Field(
        False, description="The usage so far in every chunk; needs include_usage."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise refuse("continuous_usage_stats", "continuous_usage_stats needs include_usage.")
        return self


class JSONSchema(Strict):
    """A schema that the answer keeps to."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: str | None = Field(None, description="What it is for. Only OpenAI's models read it.")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="The answer always keeps to the schema; false is refused.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.description is not None:
            raise refuse("description", "the field `description` is not supported here; leave it out.")
        if self.strict is False:
            raise refuse("strict", "strict must be true: the answer always keeps to the schema.")
        return self


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse("json_schema", "json_schema goes with type json_schema, and with no other.")
        return self


class ChordalOptions(Strict):
    """How to decode, and what to tell of it."""

    decoder: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Name of a decoder, with its own defaults; null is the server's, with its settings."
    )
    settings: dict[str, Any] = Field({}, description="Settings of the decoder by name.")
    counts: bool = Field(False, description="Give each choice its counters.")
    events: bool = Field(False, description="Stream commits, drafts and guesses as they happen.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Seconds until the request is given up; the server's own limit still holds."
    )


class _Generation(Strict):
    """What both endpoints take."""

    unsupported: ClassVar = UNSUPPORTED

    model: str | None = Field(
        None, max_length=256, description="A served model; the first if it is left out."
    )
    max_tokens: Annotated[int, Field(ge=0, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = Field(
        None, description="1 if it is left out, 0 for a decoder that draws no tokens; 0 is greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] | None = Field(None, description="0 and -1 keep all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_pairs_of_bias)
    ] = Field({}, description="Added to the logits of tokens, by id.")
    n: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    stop: Annotated[
        list[str], BeforeValidator(_texts_of_stop, json_schema_input_type=str | list[str] | None)
    ] = Field([], description=f"The text ends before the first of these, at most {MAX_STOPS}.")
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: Int64 | None = Field(None, description="The same seed gives the same answer, whatever else runs.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Goes to the access log.")
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="Keep so many of the prompt's last tokens."
    )
    return_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="Becomes part of the answer's id."
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Share cached prompts only with requests of the same salt."
    )
    chordal: ChordalOptions = ChordalOptions.model_validate({})

    @model_validator(mode="before")
    @classmethod
    def _drop_best_of(cls, given: Any) -> Any:
        # Of as many as are asked for, the best are all of them.
        if isinstance(given, dict) and type(best := given.get("best_of")) is int:
            n = given.get("n")
            if best == (1 if n is None else n):
                return {name: value for name, value in given.items() if name != "best_of"}
        return given

    @model_validator(mode="before")
    @classmethod
    def _fill_vendor(cls, given: Any) -> Any:
        if isinstance(given, dict) and "chordal" in given and given["chordal"] is None:
            return {name: value for name, value in given.items() if name != "chordal"}
        return given

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", "stream_options needs stream=true.")
        if self.chordal.events and not self.stream:
            raise refuse("chordal.events", "chordal.events needs stream=true.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk tells the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(_Generation):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        list[str | list[TokenId]],
        BeforeValidator(
            _list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="Log-probabilities of each token, and of so many likely ones."
    )
    echo: bool | None = Field(None, description="Put the prompt before the text, with its log-probabilities.")

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        for at, prompt in enumerate(self.prompt):
            if isinstance(prompt, str) and not prompt.strip():
                raise refuse(_item("prompt", at, self.prompt), "the prompt must not be empty.")
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "max_tokens must be at least 1, or 0 with echo; got 0.")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are told beside each token; None tells nothing."""
        return self.logprobs


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise refuse("type", f"content parts must be of type text; got {kind[:32]!r}.")
        return given


def _kind_of_content(content: Any) -> str | None:
    """Say which kind of content it is, so that an error is about that kind alone."""
    if isinstance(content, str):
        return "str"
    return "list[TextPart]" if isinstance(content, list) else None


class Message(Strict):
    """One turn of a chat."""

    unsupported: ClassVar = MESSAGE_UNSUPPORTED

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("str")] | Annotated[list[TextPart], Tag("list[TextPart]")],
        Discriminator(
            _kind_of_content,
            custom_error_type="refused",
            custom_error_message="{message}",
            custom_error_context={"message": "must be text or a list of text parts", "param": ""},
        ),
    ]

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        # An answer may have been empty; programs send it back with the rest of the chat.
        if self.role != "assistant" and not self.text.strip():
            raise refuse("content", "the content of a message must not be empty.")
        return self

    @property
    def text(self) -> str:
        """The content as one text; parts stand on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(_Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="How many likely tokens are told beside each; needs logprobs."
    )
    add_generation_prompt: bool = Field(True, description="End the prompt where an answer begins.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template."
    )

    unsupported: ClassVar = {**UNSUPPORTED, "echo": (False,)}

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        limits = self.max_tokens, self.max_completion_tokens
        if None not in limits and limits[0] != limits[1]:
            raise refuse(
                "max_completion_tokens",
                f"max_tokens and max_completion_tokens are two names of one limit; got {limits[0]} and "
                f"{limits[1]}. Give one.",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", "top_logprobs needs logprobs=true.")
        for name in self.chat_template_kwargs or ():
            if name in _TEMPLATE_OWN or not name.isidentifier():
                raise refuse(
                    "chat_template_kwargs", f"chat_template_kwargs must not hold `{name[:64]}`: the template "
                    "and how it is used belong to the model."
                )  # fmt: skip
        return self

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are told beside each token; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a text, or messages for the model's chat template."""

    model: str | None = Field(None, max_length=256)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(None, description="Of a text; true if it is left out.")
    add_generation_prompt: bool | None = Field(None, description="Of messages; true if it is left out.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", "give prompt or messages, one of them.")
        for name, goes_with in (("add_special_tokens", "prompt"), ("add_generation_prompt", "messages")):
            if getattr(self, name) is not None and getattr(self, goes_with) is None:
                raise refuse(name, f"{name} goes with {goes_with}.")
        return self


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = Field(None, max_length=256)
    tokens: list[TokenId]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is an error."""

    error: Error


def _item(name: str, at: int, items: list[Any]) -> str:
    return name if len(items) == 1 else f"{name}.{at}"
