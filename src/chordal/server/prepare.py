"""From a request to jobs: which model, which decoder, which tokens, within the server's limits.

Nothing runs yet, and every mistake of the client is found here, with the field it is in. Tokenizing and
compiling schemas take a thread of their own, one, since a tokenizer is not shared between threads: it has
copies of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from chordal import constraint, strict_json
from chordal.decoders.decoder import Decoder
from chordal.errors import InputError, UnknownNameError
from chordal.forward import Ints
from chordal.generation import DEFAULT_MAX_NEW_TOKENS, Job, Model, Request
from chordal.likelihood import PromptLogprobs, PromptLogprobsConfig
from chordal.ops.sampling import Constraint
from chordal.registry import decoder_class, make_decoder
from chordal.sequence import Sequence, StopRules
from chordal.server.encode import EncodedPrompt, Encoder, detokenizer
from chordal.server.errors import APIError
from chordal.server.schema import ChatRequest, CompletionRequest, TokenizeRequest
from chordal.server.settings import ServerSettings
from chordal.server.worker import UnavailableError, Worker

T = TypeVar("T")
GenerationRequest = ChatRequest | CompletionRequest

# Decoders that learn from what they decode, of different users or settings, that are kept.
_MAX_MEMORIES = 16

_NUM_COMPILERS = 2

# Settings that count positions of a text, and so may be as large as a window. Others count what is drafted
# or kept, and are limited as such.
_SPANS = frozenset(
    "block_length sub_block_length active_length window_length answer_start answer_length num_steps "
    "refresh_period start end min_tokens".split()
)

# What errors of the library call fields that clients know by another name.
_PARAMS = {"max_new_tokens": "max_tokens", "num_top": "logprobs", "stop_strings": "stop"}


@dataclass(frozen=True)
class Prepared:
    """What a request asks to be run.

    Attributes:
        name: Name the model is served under.
        model: The model.
        prompts: In order.
        num_choices: Answers to each prompt.
        jobs: Of the answers, prompt by prompt; none if no token is asked for.
        scorings: Of the prompts, one each, if their log-probabilities are asked for.
    """

    name: str
    model: Model
    prompts: list[EncodedPrompt]
    num_choices: int
    jobs: list[Job]
    scorings: list[Job]


class Preparer:
    """Makes jobs of requests.

    Args:
        worker: Has the models.
        settings: The server's limits and defaults.
    """

    def __init__(self, worker: Worker, settings: ServerSettings) -> None:
        self._worker, self._settings = worker, settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chordal-prepare")
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="chordal-compile")
        self._encoders: dict[int, Encoder] = {}  # by id of the model
        self._memories: OrderedDict[tuple[Any, ...], Decoder] = OrderedDict()
        self._num_open = 0

    def models(self) -> Mapping[str, Model]:
        """Give the served models by name.

        Raises:
            UnavailableError: They are not loaded.
        """
        if not self._worker.models:
            raise UnavailableError(f"no model is loaded now: the server is {self._worker.state}.")
        return self._worker.models

    def model(self, name: str | None) -> tuple[str, Model]:
        """Find a served model, and its name; the first if none is named.

        Raises:
            UnavailableError: They are not loaded.
            APIError: There is none of that name.
        """
        models = self.models()
        if name is None:
            name = next(iter(models))
        if name not in models:
            known = UnknownNameError("model", name, models)
            raise APIError(404, str(known), param="model", code="model_not_found")
        return name, models[name]

    def limit(self, model: Model) -> int:
        """Give the most tokens of prompt and answer together."""
        window = model.engine.target.window
        return min(window, self._settings.max_model_len or window)

    def default_decoder(self, model: Model) -> tuple[str, Mapping[str, Any]]:
        """Give name and settings of the decoder for requests that name none."""
        name, settings = self._settings.decoder, self._settings.decoder_settings
        if name is not None:
            cls = decoder_class(name)
            if cls.fits(model.family) and set(cls.needs_models) <= set(model.engine.models):
                return name, settings
            settings = {}
        return model.family.default_decoder, {**model.family.settings, **settings}

    async def prepare(self, request: GenerationRequest, tenant: str) -> Prepared:
        """Make the jobs of a request.

        Args:
            request: Checked by its schema.
            tenant: Who asks: what is learnt or cached is shared with nobody else.

        Raises:
            APIError: Something of the request cannot be used; the error names the field.
            QueueFullError: Too many requests wait already.
            UnavailableError: The models are not loaded.
        """
        name, model = self.model(request.model)
        num = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        self._check_limits(request, num)
        num_jobs = num * (request.n or 1)
        with _about(None):
            self._worker.check_room(model, num_jobs)
        decoder = await self._in_thread(lambda: self._decoder(request, tenant, model))
        limit = await self._constrain(request, decoder, model)
        salt = f"{tenant}/{request.cache_salt or ''}"
        return await self._in_thread(lambda: self._jobs(request, name, model, decoder, limit, salt))

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Answer a request to tokenize."""
        _, model = self.model(request.model)
        return await self._in_thread(lambda: self._tokenize(request, model))

    async def detokenize(self, name: str | None, tokens: Seq[int]) -> str:
        """Turn ids into text, special tokens included."""
        _, model = self.model(name)
        size = model.engine.target.vocab_size
        if wrong := [token for token in tokens if token >= size]:
            raise APIError(400, f"token ids must be below {size}; got {wrong[0]}.", param="tokens")
        return await self._in_thread(lambda: self._encoder(model).decode(tokens))

    async def _in_thread(self, work: Callable[[], T], threads: ThreadPoolExecutor | None = None) -> T:
        # What waits for this thread is in no queue yet; a flood must not pile up here.
        if self._num_open > self._settings.max_queue + self._settings.max_num_seqs:
            raise self._worker.turn_away()
        self._num_open += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(threads or self._thread, work)
        finally:
            self._num_open -= 1

    def _check_limits(self, request: GenerationRequest, num_prompts: int) -> None:
        settings = self._settings
        lengths = [len(stop) for stop in request.stop]
        for param, what, given, limit in (
            ("prompt", "prompts", num_prompts, settings.max_prompts),
            ("n", "answers to a prompt", request.n or 1, settings.max_n),
            ("stop", "stop strings", len(lengths), settings.max_stop),
            ("stop", "characters in a stop string", max(lengths, default=0), settings.max_stop_chars),
            ("stop_token_ids", "stop tokens", len(request.stop_token_ids or ()), 4 * settings.max_stop),
            ("logprobs", "log-probabilities a token", request.num_logprobs or 0, settings.max_logprobs),
        ):
            if given > limit:
                raise APIError(
                    400, f"a request must have at most {limit} {what} here; got {given}.", param=param
                )

    async def _constrain(
        self, request: GenerationRequest, decoder: Decoder, model: Model
    ) -> Constraint | None:
        """Compile what the answer must keep to."""
        form = request.response_format
        if form is None or form.type == "text":
            return None
        with _about("response_format"):
            if not decoder.constrains:
                raise InputError(
                    f"{decoder.name} cannot keep to a response_format; an autoregressive decoder such as "
                    f"autoregressive or prompt_lookup can, on a causal model; this one is "
                    f"{model.family.kind}."
                )
        schema = form.json_schema.schema_ if form.json_schema is not None else None

        def compile_() -> Constraint:
            with _about("response_format" if schema is None else "response_format.json_schema.schema"):
                return (
                    constraint.json_object(model) if schema is None else constraint.json_schema(schema, model)
                )

        # A schema may take seconds; requests without one must not wait for it.
        return await self._in_thread(compile_, self._compilers)

    def _jobs(
        self,
        request: GenerationRequest,
        name: str,
        model: Model,
        decoder: Decoder,
        limit: Constraint | None,
        salt: str,
    ) -> Prepared:
        prompts = self._encode(request, model)
        max_tokens, scores_prompt = request.max_tokens, False
        if isinstance(request, ChatRequest):
            max_tokens = request.max_completion_tokens or max_tokens
        else:
            scores_prompt = bool(request.echo) and request.logprobs is not None
        if scores_prompt and model.family.kind != "causal":
            raise APIError(
                400,
                f"the log-probabilities of a prompt need an autoregressive model; {name} is "
                f"{model.family.kind}. Leave out echo or logprobs.",
                param="logprobs",
            )
        asked = replace(self._request(request, decoder, salt), constraint=limit)
        jobs, scorings = [], []
        for prompt in prompts:
            length = self._length(request, prompt, max_tokens, model)
            for at in range((request.n or 1) if length else 0):
                # The first answer is the one that is given alone.
                mine = replace(asked, max_new_tokens=length, seed=_add(asked.seed, at))
                with _about("chordal.decoder", fields_of=type(request)):
                    job = model.job(prompt.tokens.tolist(), mine)
                job.seq.detokenize = detokenizer(
                    model,
                    prompt,
                    continues_text=isinstance(request, CompletionRequest),
                    skip_special_tokens=request.skip_special_tokens is not False,
                )
                jobs.append(job)
            if scores_prompt:
                scorings.append(_scoring(model, prompt.tokens, request.num_logprobs or 0, salt))
        return Prepared(name, model, prompts, request.n or 1, jobs, scorings)

    def _request(self, request: GenerationRequest, decoder: Decoder, salt: str) -> Request:
        """Translate what does not depend on the prompt."""
        temperature = request.temperature
        if temperature is None:
            temperature = 1.0 if decoder.samples else 0.0
        seed = request.seed
        if seed is None:
            seed = 0 if temperature == 0 else secrets.randbits(63)
        given: dict[str, Any] = {
            "top_p": request.top_p,
            "min_p": request.min_p,
            "repetition_penalty": request.repetition_penalty,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "stop_token_ids": request.stop_token_ids,
            "include_stop": request.include_stop_str_in_output,
            "ignore_eos": request.ignore_eos,
        }
        return Request(
            decoder=decoder,
            temperature=temperature,
            top_k=max(request.top_k or 0, 0),
            logit_bias=request.logit_bias,
            seed=seed,
            stop_strings=request.stop,
            logprobs=request.num_logprobs,
            cache_salt=salt,
            chat=False,
            **{name: value for name, value in given.items() if value is not None},
        )

    def _length(
        self, request: GenerationRequest, prompt: EncodedPrompt, max_tokens: int | None, model: Model
    ) -> int:
        """Give the most new tokens for a prompt; 0 if only the prompt is asked for."""
        num, limit = len(prompt.tokens), self.limit(model)
        room = limit - num
        wanted = 1 if max_tokens is None else max_tokens
        if wanted > room:
            told = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
            raise APIError(
                400,
                f"prompt and answer must fit {limit} tokens; the prompt has {num}{told}. "
                + (f"Use max_tokens={room} or a shorter prompt." if room > 0 else "Shorten the prompt."),
                param="max_tokens" if room > 0 else _prompt_field(request),
                code="context_length_exceeded",
            )
        if max_tokens is not None:
            return max_tokens
        # The canvas of a masked-diffusion model has this length from the start, and costs as much.
        is_open = isinstance(request, ChatRequest) and model.family.kind != "masked"
        return room if is_open else min(DEFAULT_MAX_NEW_TOKENS, room)

    def _decoder(self, request: GenerationRequest, tenant: str, model: Model) -> Decoder:
        options = request.chordal
        base: Mapping[str, Any] = {}
        name = options.decoder
        if name is None:
            name, base = self.default_decoder(model)
        with _about("chordal.decoder"):
            cls = decoder_class(name)
        for setting, value in options.settings.items():
            if base.get(setting, self) != value:
                self._check_setting(cls, setting, value, model)
        settings = {**base, **options.settings}
        with _about("chordal.settings", names=settings):
            decoder = make_decoder(name, settings)
        with _about("chordal.decoder"):
            decoder.check(model.family)
            decoder.check_models(model.engine.models)
        if not decoder.remembers:
            return decoder
        key = (tenant, request.cache_salt, id(model), name, strict_json.dumps(sorted(settings.items())))
        kept = self._memories.setdefault(key, decoder)
        self._memories.move_to_end(key)
        while len(self._memories) > _MAX_MEMORIES:
            self._memories.popitem(last=False)
        return kept

    def _check_setting(self, cls: type[Decoder], name: str, value: Any, model: Model) -> None:
        """Refuse values that would reach into this machine, or take it all."""
        param = f"chordal.settings.{name}"
        if name in cls.local_settings:
            raise APIError(
                400,
                f"{cls.name} setting {name} is the server's own and is not taken from a request.",
                param=param,
            )
        if type(value) is not int:
            return
        limit = self.limit(model) if name in _SPANS else self._settings.max_draft
        own = next((field.default for field in fields(cls.Config) if field.name == name), None)
        limit = max(limit, own) if type(own) is int else limit
        if value > limit:
            raise APIError(
                400, f"{cls.name} setting {name} must be at most {limit} here; got {value}.", param=param
            )

    def _encoder(self, model: Model) -> Encoder:
        """Give the encoder of a model; of the preparing thread only."""
        if id(model) not in self._encoders:
            self._encoders[id(model)] = Encoder(model)
        return self._encoders[id(model)]

    def _encode(self, request: GenerationRequest, model: Model) -> list[EncodedPrompt]:
        encoder, num_kept = self._encoder(model), request.truncate_prompt_tokens
        if isinstance(request, CompletionRequest):
            prompts = []
            for at, prompt in enumerate(request.prompt):
                with _about("prompt" if len(request.prompt) == 1 else f"prompt.{at}"):
                    prompts.append(encoder.text(prompt, num_kept))
            return prompts
        with _about("messages"):
            chat = encoder.chat(
                request.messages,
                add_generation_prompt=request.add_generation_prompt,
                variables=request.chat_template_kwargs,
                num_kept=num_kept,
            )
        return [chat]

    def _tokenize(self, request: TokenizeRequest, model: Model) -> dict[str, Any]:
        encoder = self._encoder(model)
        if request.messages is not None:
            ends_open = request.add_generation_prompt is not False
            with _about("messages"):
                chat = encoder.chat(request.messages, add_generation_prompt=ends_open)
            tokens = chat.tokens.tolist()
        else:
            special = request.add_special_tokens is not False
            tokens = encoder.tokenize(request.prompt or "", add_special_tokens=special)
        found = {"tokens": tokens, "count": len(tokens), "max_model_len": self.limit(model)}
        if request.return_token_strs:
            found["token_strs"] = encoder.token_texts(tokens)
        return found


def _scoring(model: Model, tokens: Ints, num_top: int, salt: str) -> Job:
    """Make a job that reads the log-probabilities of a prompt."""
    seq = Sequence(tokens, model.family, StopRules(max_new_tokens=1), cache_salt=salt)
    return Job(model, tokens.tolist(), PromptLogprobs(PromptLogprobsConfig(num_top=num_top)), seq)


def _add(seed: int, offset: int) -> int:
    """Add to a seed within 64 bits."""
    return (seed + offset + 2**63) % 2**64 - 2**63


def _prompt_field(request: GenerationRequest) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


@contextlib.contextmanager
def _about(
    param: str | None,
    *,
    names: Mapping[str, Any] | None = None,
    fields_of: type[GenerationRequest] | None = None,
) -> Iterator[None]:
    """Say which field an `InputError` is about.

    Args:
        param: The field.
        names: Parts of it by name; the first that the message names is told too.
        fields_of: Take the field from the message's first word, if it is one.
    """
    try:
        yield
    except InputError as error:
        words = re.findall(r"\w+", str(error))
        if names is not None and (part := next((word for word in words if word in names), None)):
            param = f"{param}.{part}"
        if fields_of is not None:
            first = _PARAMS.get(words[0], words[0])
            param = first if first in fields_of.model_fields else param
        code = "context_length_exceeded" if "window" in str(error) else None
        raise APIError(400, str(error), param=param, code=code) from error
