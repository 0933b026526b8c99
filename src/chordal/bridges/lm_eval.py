"""Chordal as a model of lm-evaluation-harness, so that its tasks run with any decoder.

The harness finds models by name in a registry that it fills itself; it looks for no plug-ins. So
`python -m chordal.bridges.lm_eval` is its command line with one more model, `chordal`, and importing this
module adds it to `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from chordal.cli.options import read_config
from chordal.decoders.decoder import Decoder
from chordal.errors import ChordalError, DecodingError, InputError, UnknownNameError
from chordal.generation import Model, Request, load
from chordal.likelihood import LikelihoodConfig, loglikelihoods, max_scored
from chordal.sequence import Sequence

try:
    import lm_eval.models  # noqa: F401  registers the models of the harness; one of ours alone would hide them
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise InputError(
        f"the bridge needs lm-evaluation-harness, of which {error.name} is missing; install it with: "
        f"pip install 'chordal[lm-eval]'."
    ) from None

# Under the name of the harness, whose level it then has.
_logger = logging.getLogger("lm_eval.chordal")

# Rows at once for --batch_size auto.
_AUTO_ROWS = 64
_USUAL_NEW_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LAW = ("top_k", "top_p", "min_p", "repetition_penalty")


@register_model("chordal")
class ChordalLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model of Chordal with a decoder.

    Generation goes through the decoder; likelihoods depend on the model alone, see `chordal.likelihood`.
    Temperature, truncation and stops come from the task and from `--gen_kwargs`.

    Args:
        pretrained: What `chordal.load` takes, or a model that is loaded.
        decoder: Name; None takes the plain one of the model's kind.
        config: Settings of the decoder by name, or a file with both, as `chordal tune` writes it.
        batch_size: Sequences at once; "auto" is 64.
        max_batch_size: Most of them for "auto".
        device: As in `chordal.load`; cuda:0, the harness's own default, takes what `chordal.load` does.
        seed: Of what is sampled; a prompt that is given again, as by `repeats`, takes the next one.
        max_gen_toks: New tokens where neither the task nor `--gen_kwargs` says; None is 256, or half of a
            window that is smaller than 512.
        max_length: Most tokens of a text; None is the model's window.
        prefix_token_id: What stands before a text without context; None is the tokenizer's token for the
            beginning of a text, or for its end.
        add_bos_token: Whether tokenizing adds special tokens; None is the tokenizer's own way.
        likelihood: "chain" or "monte_carlo"; None is what is usual for the kind of model.
        num_samples: As in `LikelihoodConfig`, as the next two.
        cfg_scale: Guidance of the likelihood; that of a decoder is a setting of it.
        check_greedy: Whether the estimate finds out if a text is greedy.
        stats: A file to which the counters of each generated text are appended as a line of JSON.
        **more: Other arguments of `chordal.load`, and settings of the decoder as `decoder.NAME`.

    Raises:
        InputError: An argument is unknown or impossible, or the decoder does not fit the model.
    """

    def __init__(
        self,
        pretrained: str | Model = "tiny-ar",
        *,
        decoder: str | None = None,
        config: str | Mapping[str, Any] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        max_gen_toks: int | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        likelihood: Any = None,
        num_samples: int = 128,
        cfg_scale: float = 0.0,
        check_greedy: bool = True,
        stats: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        settings = {
            name.removeprefix("decoder."): more.pop(name) for name in [*more] if name.startswith("decoder.")
        }
        if isinstance(config, str):
            named, told = read_config(config)
            config, decoder = (told, named) if decoder in (None, named) else ({}, decoder)
        self._batch_size = _num_rows(batch_size, max_batch_size)
        # What the command line of the harness gives if nothing is asked for, also where there is none.
        more["device"] = None if device == "cuda:0" else device
        self.model = _loaded(pretrained, more, self._batch_size)
        request = Request(decoder=decoder, config={**(config or {}), **settings}, seed=seed)
        self.decoder: Decoder = self.model.decoder(request)
        self.likelihood_config = LikelihoodConfig(
            method=likelihood,
            num_samples=num_samples,
            cfg_scale=float(cfg_scale),
            check_greedy=check_greedy,
            seed=seed,
        )
        self.tokenizer = self.model.tokenizer
        self._seed, self._max_gen_toks, self._max_length = seed, max_gen_toks, max_length
        self._prefix_token_id, self._add_bos_token = prefix_token_id, add_bos_token
        self._stats = None if stats is None else Path(stats)
        self._counters: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        token: int | None = self.tokenizer.eos_token_id
        if token is None:
            raise InputError(
                f"{self.model.name} has no token that ends a text; name one with prefix_token_id=ID."
            )
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        for token in (self._prefix_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return self.eot_token_id

    @property
    def max_length(self) -> int:
        """Most tokens of a text, generated ones included."""
        window = self.model.engine.target.window
        return window if self._max_length is None else min(window, self._max_length)

    @property
    def max_gen_toks(self) -> int:
        """New tokens of a text where nobody says."""
        return self._max_gen_toks or min(_USUAL_NEW_TOKENS, self.max_length // 2)

    @property
    def batch_size(self) -> int:
        """Sequences at once."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness caches prompts with a chat template."""
        return self.model.name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Put messages into the model's chat template; without a generation prompt the last goes on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize; text that begins with the prefix token already, as from a template, gets no other."""
        how = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self.tokenizer.bos_token is not None:
            how = False if string.startswith(self.tokenizer.bos_token) else how
        tokens: list[int] = self.tokenizer.encode(
            string, **({} if how is None else {"add_special_tokens": how})
        )
        return tokens

    def generate_until(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until it ends, all in one batch of the engine.

        Raises:
            InputError: A setting of the task is unknown or impossible.
            ChordalError: A text could not be decoded; there is no answer to grade then.
        """
        seen: Counter[str] = Counter()
        seqs = []
        for request in requests:
            context, settings = request.args
            key = json.dumps(request.args, sort_keys=True, default=str)
            seqs.append(self._sequence(context, settings, self._seed + seen[key]))
            seen[key] += 1
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(seqs)), key=lambda index: -len(seqs[index].prompt))
        progress = tqdm(total=len(seqs), disable=disable_tqdm, desc="Running generate_until requests")

        def finished(number: int) -> None:
            request, seq = requests[order[number]], seqs[order[number]]
            if seq.error is not None:
                raise DecodingError(f"a text of task {request.task_name} failed: {seq.error}") from seq.error
            self._count(request, seq)
            self.cache_hook.add_partial("generate_until", request.args, seq.text)
            progress.update()

        with progress:
            self.model.engine.complete([(self.decoder, seqs[index]) for index in order], finished)
        _logger.info(self._summary())
        return [seq.text for seq in seqs]

    def loglikelihood_rolling(self, requests: Seq[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each token once, with as much before it as the window holds."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_scored - 1,
                context_len=1,
            )
            for window in rolling:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def get_model_info(self) -> dict[str, Any]:
        """Describe model, decoder and what generation took; the harness keeps it with its results."""
        target = self.model.engine.target
        return {
            "model_name": self.model.name,
            "model_dtype": str(target.dtype),
            "decoder": self.decoder.name,
            "decoder_settings": dataclasses.asdict(self.decoder.config),
            "decoder_promise": self.decoder.promise,
            "decoder_stats": self._stats_of_all(),
        }

    @property
    def _max_scored(self) -> int:
        return max_scored(self.model.family, self.max_length)

    def _loglikelihood_tokens(
        self,
        requests: Seq[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations; those of one context go together as far as the window holds them."""
        groups: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        num_cut = 0
        for index, (_, context, continuation) in enumerate(requests):
            context = context or [self.prefix_token_id]
            room = self._max_scored - len(continuation)
            num_cut += len(context) > room
            mine = groups[tuple(context[-max(room, 1) :])]
            fits = mine and sum(len(requests[one][2]) for one in (*mine[-1], index)) <= self.max_length
            mine[-1].append(index) if fits else mine.append([index])
        if num_cut:
            _logger.warning("%d contexts were cut from the left to fit the window.", num_cut)
        together = [(context, group) for context, mine in groups.items() for group in mine]
        together.sort(key=lambda pair: -len(pair[0]))
        texts = [
            (np.array(context), [np.array(requests[index][2]) for index in group])
            for context, group in together
        ]
        results: dict[int, tuple[float, bool]] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")

        def finished(number: int, found: Seq[Any]) -> None:
            for index, one in zip(together[number][1], found, strict=True):
                results[index] = one.logprob, one.is_greedy
                if (strings := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, results[index])
            progress.update(len(found))

        with progress:
            loglikelihoods(self.model.engine, texts, self.likelihood_config, on_finish=finished)
        return [results[index] for index in range(len(requests))]

    def _sequence(self, context: str, settings: Mapping[str, Any], seed: int) -> Sequence:
        """Make the sequence of a request, its context cut from the left if it is too long."""
        given = dict(settings)
        until = given.pop("until", None) or []
        lengths = [given.pop(name) for name in _LENGTHS if given.get(name) is not None]
        max_new_tokens = int(lengths[0]) if lengths else self.max_gen_toks
        samples = given.pop("do_sample", None)
        temperature = given.pop("temperature", None)
        if temperature is None:
            temperature = 1.0 if samples else 0.0
        law = {name: given.pop(name) for name in _LAW if given.get(name) is not None}
        if unknown := [name for name, value in given.items() if value is not None]:
            known = ("until", "do_sample", "temperature", *_LENGTHS, *_LAW)
            raise UnknownNameError("generation setting", unknown[0], known)
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"max_gen_toks must leave room for the context in the {self.max_length} tokens of a text; "
                f"got {max_new_tokens}. Use --gen_kwargs max_gen_toks=N."
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            _logger.warning("a context was cut from the left, from %d to %d tokens.", len(tokens), room)
        return self.model.sequence(
            tokens[-room:],
            Request(
                decoder=self.decoder,
                max_new_tokens=max_new_tokens,
                temperature=0.0 if samples is False else float(temperature),
                seed=seed,
                stop_strings=tuple(one for one in ([until] if isinstance(until, str) else until) if one),
                **law,
            ),
        )

    def _count(self, request: Any, seq: Sequence) -> None:
        """Add up the counters of a text, and write them down if asked for."""
        stats = seq.stats.to_dict()
        for name in ("committed_tokens", "forwards", "draft_tokens", "accepted_tokens"):
            self._counters[name] += stats[name]
        self._counters["texts"] += 1
        if self._stats is not None:
            where = {"task": request.task_name, "doc": request.doc_id, "finish_reason": seq.finish_reason}
            with self._stats.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**where, **stats}) + "\n")

    def _stats_of_all(self) -> dict[str, Any]:
        tokens, forwards = self._counters["committed_tokens"], self._counters["forwards"]
        return {**self._counters, "tokens_per_forward": round(tokens / forwards, 4) if forwards else None}

    def _summary(self) -> str:
        stats = self._stats_of_all()
        return (
            f"{self.decoder.name}: {stats['texts']} texts, {stats['committed_tokens']} tokens in "
            f"{stats['forwards']} forward passes, {stats['tokens_per_forward']} tokens per forward."
        )


def _num_rows(batch_size: int | str, most: int | None) -> int:
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        return min(_AUTO_ROWS, most or _AUTO_ROWS)
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"batch_size must be a number of at least 1, or auto; got {batch_size!r}.")
    return int(text)


def _loaded(pretrained: str | Model, more: dict[str, Any], max_rows: int) -> Model:
    """Load a model, or take the one that is loaded."""
    if isinstance(pretrained, Model):
        return pretrained
    known = [name for name in inspect.signature(load).parameters if name not in ("model", "max_rows")]
    for name in more:
        if name not in known:
            ours = [name for name in inspect.signature(ChordalLM).parameters if name != "more"]
            raise UnknownNameError("model argument", name, {*known, *ours, "decoder.NAME"})
    return load(pretrained, **more, max_rows=max_rows)


def main() -> None:
    """Run the command line of the harness."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ChordalError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main()
