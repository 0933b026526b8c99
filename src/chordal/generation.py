"""What users call: load a model, generate, stream."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from chordal.decoders.decoder import Decoder
from chordal.engine import Engine
from chordal.errors import InputError, PromptError, UnknownNameError
from chordal.fields import take_field
from chordal.forward import Ints
from chordal.models.language_model import LanguageModel
from chordal.models.load import load_model
from chordal.models.quantization import Quantization
from chordal.ops.sampling import Constraint, Law
from chordal.prefix.groups import PrefixGroup, group_prompts
from chordal.registry import make_decoder
from chordal.sequence import (
    Alternative,
    Event,
    FinishReason,
    Listener,
    Sequence,
    StopRules,
    TokenLogprob,
)
from chordal.stats import TARGET
from chordal.text import TextStream

Prompt = str | Seq[int] | Seq[Mapping[str, str]]

DEFAULT_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    Attributes:
        prompt: As given.
        text: Generated text, without stop token or stop string.
        tokens: Generated token ids, the stop token included.
        finish_reason: "stop", "length", "cancelled" or "error".
        stop_reason: The stop string or token id that ended it, if one did.
        model: Name of the model.
        decoder: Name of the decoder.
        promise: The decoder's promise.
        stats: Counters, as docs/metrics.md defines them.
        trace: Events in order if a trace was asked for, else None.
        error: What ended it, if it ended with an error; the other prompts are not affected.
        alternatives: All texts that were found, the best first, which is this result; empty for decoders
            that look for one.
        num_prompt: Tokens of the prompt.
        logprobs: Log-probability of each of `tokens` if it was asked for, else empty; None for a token
            whose decoder did not read it.
    """

    prompt: Prompt
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    model: str
    decoder: str
    promise: str
    stats: dict[str, Any]
    trace: list[Event] | None = None
    error: Exception | None = None
    alternatives: list[Alternative] = field(default_factory=list)
    num_prompt: int = 0
    logprobs: list[TokenLogprob | None] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream: the new text, and the result once it is done (else None)."""

    text: str
    result: Generation | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to decode: decoder, sampling law, stops. Names as in transformers' `generate`.

    Attributes:
        decoder: Name, or a decoder with its config; None takes the default of the model's kind, with the
            settings the model was published with.
        config: Settings of the decoder by name.
        max_new_tokens: Most new tokens, at least 1; a masked-diffusion model's canvas has this length.
            None takes 64, or what the window leaves.
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens up to this probability.
        min_p: Keep tokens at least this fraction as likely as the best.
        repetition_penalty: Above 1 makes tokens that occurred less likely, in the prompt too.
        presence_penalty: Taken off the logits of tokens that were generated.
        frequency_penalty: Taken off them for each time they were.
        logit_bias: Added to the logits of tokens, by id.
        constraint: What the text must keep to, e.g. `chordal.constraint.json_schema`.
        seed: Same seed, same output, whatever else runs; a 64-bit integer.
        stop_strings: The text ends before the first of these.
        stop_token_ids: Tokens that end it besides the model's own.
        include_stop: Leave the stop string in the text.
        ignore_eos: Do not stop at the model's stop tokens.
        logprobs: Give the log-probability of each token and of so many of the most likely ones beside it:
            what the model gave where the token was decided, before penalties, temperature and truncation.
            None gives none.
        cache_salt: Requests share cached prefixes of their prompts only with requests of the same salt.
        chat: Put text prompts into the model's chat template; None does so if it has one.
        trace: Keep every event in the result, with confidences.

    Raises:
        InputError: A value is of the wrong type.
    """

    decoder: str | Decoder | None = None
    config: Mapping[str, Any] | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    constraint: Constraint | None = None
    seed: int = 0
    stop_strings: str | Seq[str] = ()
    stop_token_ids: Seq[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    cache_salt: str = ""
    chat: bool | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        for one in fields(self):
            if (value := getattr(self, one.name)) is not one.default:
                object.__setattr__(self, one.name, take_field(Request, one.name, value, one.name))

    @property
    def law(self) -> Law:
        """Distribution the tokens are drawn from; checked when it is made."""
        return Law(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((self.logit_bias or {}).items()),
            constraint=self.constraint,
        )


class Job:
    """One prompt on its way: what is decoded and how, and what came of it.

    All but making it and `result` belong to the thread that runs the engine.

    Attributes:
        model: The model.
        prompt: As given.
        decoder: The decoder.
        seq: The sequence it decodes.
    """

    def __init__(self, model: Model, prompt: Prompt, decoder: Decoder, seq: Sequence) -> None:
        self.model, self.prompt, self.decoder, self.seq = model, prompt, decoder, seq

    def start(self) -> None:
        """Queue it in the engine.

        Raises:
            InputError: The settings do not fit the prompt.
        """
        self.model.engine.submit(self.decoder, self.seq)

    def cancel(self, error: Exception | None = None) -> None:
        """End it now and free what it holds; harmless if it is done.

        Args:
            error: Why, for the result.
        """
        self.model.engine.cancel(self.seq, error)

    def result(self, trace: list[Event] | None = None) -> Generation:
        """Give the result, of a job that is done or as far as it is."""
        seq = self.seq
        tokens = seq.output.tolist()
        positions = range(seq.num_prompt, seq.num_prompt + len(tokens))
        return Generation(
            prompt=self.prompt,
            text=seq.text,
            tokens=tokens,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            model=self.model.name,
            decoder=self.decoder.name,
            promise=self.decoder.promise,
            stats=seq.stats.to_dict(),
            trace=trace,
            error=seq.error,
            alternatives=list(seq.alternatives),
            num_prompt=seq.num_prompt,
            logprobs=[] if seq.num_logprobs is None else [seq.logprobs.get(at) for at in positions],
        )


class Model:
    """A loaded model, ready to generate.

    Args:
        engine: Its engine; the target's tokenizer reads and writes the text.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokenizer = engine.target.tokenizer
        self.family = engine.target.family
        self.name = engine.target.name

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        *,
        on_finish: Callable[[int, Generation], None] | None = None,
        group_prefixes: bool = True,
        **settings: Any,
    ) -> list[Generation]:
        """Generate for one or many prompts, batched.

        Args:
            prompts: Text, token ids or chat messages; one, or a list of them.
            on_finish: Called with index and result as each prompt is done, in the order they finish.
            group_prefixes: Run prompts that begin alike side by side, so that the beginning is computed
                once and kept no longer than it is needed; False runs them as they come.
            **settings: Fields of `Request`.

        Returns:
            One result for each prompt, in order. A prompt whose decoding fails has `error` set.

        Raises:
            InputError: A prompt or a setting cannot be used; nothing has run then.
        """
        request = make_request(settings)
        request = replace(request, decoder=self.decoder(request), config=None)  # one for all of them
        given = _as_list(prompts)
        # All prompts are checked before any is decoded.
        traces: list[list[Event]] = [[] for _ in given]
        jobs = [
            self.job(prompt, request, [_Recorder(trace)] if request.trace else [])
            for prompt, trace in zip(given, traces, strict=True)
        ]
        results: dict[int, Generation] = {}

        def finished(index: int) -> None:
            results[index] = jobs[index].result(traces[index] if request.trace else None)
            if on_finish is not None:
                on_finish(index, results[index])

        groups = _group([job.seq for job in jobs], self.engine.prefix_unit) if group_prefixes else None
        self.engine.complete([(job.decoder, job.seq) for job in jobs], finished, groups=groups)
        return [results[index] for index in range(len(given))]

    def stream(self, prompt: Prompt, *, listeners: Seq[Listener] = (), **settings: Any) -> Iterator[Chunk]:
        """Generate for one prompt and yield its text as it becomes certain.

        Closing the iterator early frees what the sequence holds.

        Args:
            prompt: Text, token ids or chat messages.
            listeners: Called with every event of the sequence.
            **settings: Fields of `Request`.

        Yields:
            Pieces of text; the last one carries the result.

        Raises:
            InputError: The prompt or a setting cannot be used.
        """
        request = make_request(settings)
        trace: list[Event] | None = [] if request.trace else None
        own = [_Recorder(trace)] if trace is not None else []
        return self._stream(self.job(prompt, request, [*own, *listeners]), trace)

    def _stream(self, job: Job, trace: list[Event] | None) -> Iterator[Chunk]:
        stream = TextStream(job.seq)
        try:
            job.start()
            while not job.seq.done:
                self.engine.step()
                if not job.seq.done and (text := stream.take()):
                    yield Chunk(text)
            yield Chunk(stream.take(), job.result(trace))
        finally:
            job.cancel()

    def job(self, prompt: Prompt, request: Request, listeners: Seq[Listener] = ()) -> Job:
        """Check a prompt and a request and make a job of them; nothing runs yet.

        Args:
            prompt: Text, token ids or chat messages.
            request: How to decode it.
            listeners: Called with every event of its sequence.

        Raises:
            InputError: The prompt or a setting cannot be used.
        """
        decoder, seq = self.decoder(request), self.sequence(prompt, request, listeners)
        for name in decoder.needs_models:
            other = self.engine.models[name]
            if (limit := getattr(other, "num_positions", None)) is not None and seq.limit > limit:
                raise PromptError(
                    f"prompt and new tokens must fit the {limit} positions of {other.name}, the {name} "
                    f"model; got {seq.num_prompt} and {seq.limit - seq.num_prompt}. Shorten them, or use a "
                    f"decoder that does not ask it."
                )
        return Job(self, prompt, decoder, seq)

    def decoder(self, request: Request) -> Decoder:
        """Make the decoder of a request and check that it fits the model and the law."""
        if request.decoder is None:
            settings = {**self.family.settings, **(request.config or {})}
            decoder = make_decoder(self.family.default_decoder, settings)
        else:
            decoder = make_decoder(request.decoder, request.config)
        decoder.check(self.family)
        decoder.check_law(request.law)
        decoder.check_models(self.engine.models)
        if request.logprobs is not None and not decoder.tells_logprobs:
            raise InputError(
                f"{decoder.name} does not read the log-probabilities of its tokens; got logprobs="
                f"{request.logprobs}. Leave it out or use --decoder {self.family.default_decoder}."
            )
        return decoder

    def sequence(self, prompt: Prompt, request: Request, listeners: Seq[Listener] = ()) -> Sequence:
        """Make the sequence of a prompt.

        Raises:
            PromptError: The prompt is empty, too long, or holds ids the model cannot take.
            InputError: A setting is out of range.
        """
        tokens = self.encode(prompt, chat=request.chat)
        window = self.engine.target.window
        if len(tokens) >= window:
            raise PromptError(
                f"the prompt must leave room for an answer in the model's window of {window} tokens; "
                f"it has {len(tokens)}. Shorten it."
            )
        length = request.max_new_tokens
        if length is None:
            length = min(DEFAULT_MAX_NEW_TOKENS, window - len(tokens))
        if length < 1:
            raise InputError(f"max_new_tokens must be at least 1; got {length}.")
        if request.constraint is not None and request.ignore_eos:
            raise InputError("ignore_eos cannot go with a constraint, which says itself where the text ends.")
        if not -(2**63) <= request.seed < 2**63:
            raise InputError(f"seed must be a 64-bit integer; got {request.seed}.")
        if request.logprobs is not None and request.logprobs < 0:
            raise InputError(f"logprobs must be at least 0; got {request.logprobs}.")
        self._check_ids("logit_bias", request.logit_bias or ())
        self._check_ids("stop_token_ids", request.stop_token_ids)
        if len(tokens) + length > window:
            raise PromptError(
                f"prompt and new tokens must fit the model's window of {window}; got {len(tokens)} and "
                f"{length}. Use max_new_tokens={window - len(tokens)} or a shorter prompt."
            )
        stop_strings = (
            (request.stop_strings,) if isinstance(request.stop_strings, str) else tuple(request.stop_strings)
        )
        if "" in stop_strings:
            raise InputError("stop strings must not be empty.")
        stop = StopRules(
            max_new_tokens=length,
            eos_ids=(*(() if request.ignore_eos else self.family.eos_ids), *request.stop_token_ids),
            stop_strings=stop_strings,
            include_stop=request.include_stop,
        )
        return Sequence(
            prompt=tokens,
            family=self.family,
            stop=stop,
            law=request.law,
            seed=request.seed,
            detokenize=self.decode,
            listeners=list(listeners),
            num_logprobs=request.logprobs,
            cache_salt=request.cache_salt,
        )

    def _check_ids(self, name: str, tokens: Iterable[int]) -> None:
        vocab_size = self.engine.target.vocab_size
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise InputError(f"{name} must hold token ids from 0 to {vocab_size - 1}; got {token}.")

    def encode(self, prompt: Prompt, *, chat: bool | None = None) -> Ints:
        """Turn a prompt into token ids.

        Args:
            prompt: Text, token ids or chat messages.
            chat: Whether text goes into the chat template; None: if there is one.

        Raises:
            PromptError: Nothing to encode, ids outside the vocabulary, or the mask token inside.
        """
        template = getattr(self.tokenizer, "chat_template", None)
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("the prompt must not be empty.")
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise PromptError("the prompt must be Unicode text; it holds a surrogate.")
            if chat and not template:
                raise InputError(f"{self.name} has no chat template; use chat=False.")
            if chat is not False and template:
                prompt = [{"role": "user", "content": prompt}]
            else:
                prompt = self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt, bytes) or not (isinstance(prompt, Seq) or getattr(prompt, "ndim", 0)):
            raise _not_a_prompt(prompt)
        if len(prompt) == 0:
            raise PromptError("the prompt must not be empty.")
        if isinstance(prompt[0], Mapping):
            if not template:
                raise InputError(f"{self.name} has no chat template; give text instead of messages.")
            try:
                messages = list(prompt)
                prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            except Exception as error:  # templates raise what they like
                raise PromptError(
                    f"the chat template of {self.name} refuses the messages: {error}"
                ) from error
        try:
            tokens = np.asarray(prompt)
        except ValueError:  # lists of unlike lengths
            tokens = np.empty(0)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise _not_a_prompt(prompt)
        tokens = tokens.astype(np.int64)
        vocab_size = self.engine.target.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise PromptError(
                f"token ids must be from 0 to {vocab_size - 1}; got {tokens.min()} to {tokens.max()}."
            )
        if self.family.mask_id is not None and (tokens == self.family.mask_id).any():
            raise PromptError(f"a prompt must not contain the mask token (id {self.family.mask_id}).")
        return tokens

    def decode(self, tokens: Ints) -> str:
        """Turn token ids into text, special tokens left out."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def load(
    model: str | os.PathLike[str],
    *,
    draft: str | os.PathLike[str] | None = None,
    middle: str | os.PathLike[str] | None = None,
    draft_quantization: Quantization | None = None,
    middle_quantization: Quantization | None = None,
    concurrent: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Quantization | None = None,
    tensor_parallel: bool = False,
    block_length: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    max_rows: int = 64,
    prefix_cache_mib: int = 256,
) -> Model:
    """Load a bundled model, a checkpoint folder or a hub repository; nothing in it is executed.

    Args:
        model: Bundled name, e.g. "tiny-ar", a folder, or a hub id (owner/name).
        draft: A second model with the same tokenizer, for decoders that ask for one named "draft".
        middle: A third one, for decoders that ask for one named "middle".
        draft_quantization: As `quantization`, for the draft model.
        middle_quantization: As `quantization`, for the middle model; it may be the target in fewer bits.
        concurrent: Run the models at the same time where a decoder allows it, each in its own thread.
        device: As torch names it; None takes "cuda" if there is one, else "cpu".
        dtype: "float32", "bfloat16", "float16" or "float64"; None takes the checkpoint's own, but
            float32 for small models on a CPU.
        device_map: Spread the layers over devices, as accelerate has it, e.g. "auto"; instead of `device`.
        quantization: "int8" or "int4" keeps the weights of linear layers in that many bits (torchao);
            "int8-dynamic" also multiplies in 8 bits.
        tensor_parallel: Split every layer over the processes that torchrun started.
        block_length: Of a block-diffusion model whose files do not say it.
        revision: Branch, tag or commit of the model's hub repository.
        token: Access token of the hub.
        local_files_only: Take hub repositories from the local cache only.
        max_rows: Sequences decoded at once, at most.
        prefix_cache_mib: Memory, in MiB, that keeps what models computed of prompts, so that prompts that
            begin alike share it; see docs/prefix.md. 0 shares nothing, and so does `tensor_parallel`.

    Raises:
        CheckpointError: A checkpoint is missing, damaged or of a kind that is not supported.
        InputError: No such device or type, or settings that exclude each other.
    """
    both: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "tensor_parallel": tensor_parallel,
        "token": token,
        "local_files_only": local_files_only,
        "max_rows": max_rows,
    }
    target = load_model(
        model, quantization=quantization, block_length=block_length, revision=revision, **both
    )
    models = {TARGET: target}
    for name, other, bits in (("draft", draft, draft_quantization), ("middle", middle, middle_quantization)):
        if other is not None:
            models[name] = load_model(other, quantization=bits, **both)
            _share_vocabulary(target, models[name])
        elif bits is not None:
            raise InputError(
                f"{name}_quantization needs a {name} model; give {name}=... too, or leave it out."
            )
    # Processes that run one model together must agree on what they feed; each would go by its own memory.
    prefix_cache_bytes = 0 if tensor_parallel else prefix_cache_mib * 2**20
    return Model(Engine(models, concurrent=concurrent, prefix_cache_bytes=prefix_cache_bytes))


def _share_vocabulary(target: LanguageModel, other: LanguageModel) -> None:
    """Let a model speak of the target's tokens.

    Raises:
        InputError: The models have different tokenizers.
    """
    if target.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(
            f"models that work together need one tokenizer; {target.name} and {other.name} have vocabularies "
            f"of {target.vocab_size} and {other.vocab_size} tokens that differ. Use a smaller model of the "
            f"target's family."
        )
    other.share_vocabulary(target.vocab_size)


def make_request(settings: Mapping[str, Any]) -> Request:
    """Make a request from keyword arguments, with near matches for unknown ones."""
    names = [setting.name for setting in fields(Request)]
    for name in settings:
        if name not in names:
            raise UnknownNameError("argument", name, names)
    return Request(**settings)


class _Recorder:
    """Keeps every event."""

    wants_confidence = True

    def __init__(self, trace: list[Event]) -> None:
        self._trace = trace

    def __call__(self, seq: Sequence, event: Event) -> None:
        self._trace.append(event)


def _group(seqs: Seq[Sequence], unit: int | None) -> list[PrefixGroup] | None:
    """Group sequences by the prefixes that they share in multiples of a unit; None if they share none."""
    if unit is None or len(seqs) < 2:
        return None
    groups = group_prompts(
        # The last token is always fed: what follows it is read.
        [seq.prompt[:-1] for seq in seqs],
        [seq.stop.max_new_tokens for seq in seqs],
        unit=unit,
    )
    return groups if any(group.num_spared for group in groups) else None


def _as_list(prompts: Any) -> list[Prompt]:
    is_many = not isinstance(prompts, (str, bytes, Mapping)) and hasattr(prompts, "__getitem__")
    if not is_many or (len(prompts) and isinstance(prompts[0], (int, np.integer, Mapping))):
        return [prompts]
    return list(prompts)


def _not_a_prompt(given: object) -> PromptError:
    return PromptError(f"a prompt must be text, token ids or chat messages; got {reprlib.repr(given)}.")
