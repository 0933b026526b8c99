"""Compare a decoder with plain decoding, greedy and sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from chordal.decoders.decoder import Decoder
from chordal.errors import InputError
from chordal.generation import Model, Prompt, make_request
from chordal.ops.homogeneity import MIN_EXPECTED
from chordal.verification.greedy import GreedyReport, compare_greedy
from chordal.verification.runs import Runs
from chordal.verification.sampled import SampledReport, compare_sampled


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes:
        model: Name of the model.
        decoder: Name of the decoder.
        settings: All of its settings.
        promise: "exact" or "approximate".
        plain: Name of the plain decoder of the model's kind, which it is compared with.
        plain_settings: All of its settings.
        errors: Message of each prompt the decoder failed on, by index of the prompt.
        greedy: At temperature 0.
        sampled: At a temperature above 0; None if not asked for, or if the decoder draws no tokens.
    """

    model: str
    decoder: str
    settings: dict[str, Any]
    promise: str
    plain: str
    plain_settings: dict[str, Any]
    errors: dict[int, str]
    greedy: GreedyReport
    sampled: SampledReport | None

    @property
    def is_exact(self) -> bool:
        """Whether nothing but ties tells the decoder from plain decoding."""
        sampled_failed = self.sampled is not None and self.sampled.failed
        return not (self.errors or self.greedy.num_bugs or sampled_failed)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain values, with what follows from it: the JSON report."""
        plain = {"is_exact": self.is_exact, **dataclasses.asdict(self)}
        plain["errors"] = [{"prompt": prompt, "error": error} for prompt, error in self.errors.items()]
        plain["greedy"] |= {"num_ties": self.greedy.num_ties, "num_bugs": self.greedy.num_bugs}
        if self.sampled is not None:
            plain["sampled"] |= {"failed": list(self.sampled.failed)}
        return plain


def verify(
    model: Model,
    decoder: str | Decoder,
    prompts: Seq[Prompt],
    *,
    config: Mapping[str, Any] | None = None,
    plain_config: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    temperature: float = 1.0,
    false_alarm: float = 1e-3,
    on_text: Callable[[int, int, str], None] | None = None,
    **settings: Any,
) -> Verification:
    """Compare a decoder with plain decoding, greedy and sampled.

    Cost: the texts of both decoders, `len(prompts) * (1 + num_samples)` of each, and for a causal model
    one more forward pass a sampled text, all as many at once as the engine has rows.

    Args:
        model: The model; nothing else may be running on it.
        decoder: Name, or a decoder with its config.
        prompts: Text, token ids or chat messages; at least one.
        config: Settings of the decoder.
        plain_config: Settings of the plain decoder, where they are not its usual ones.
        num_samples: Sampled texts of each prompt and decoder, at least 20; 0 leaves sampling out.
        temperature: Of the sampled texts; 0 leaves them out.
        false_alarm: Chance of calling sampled texts different if they are not, between 0 and 1.
        on_text: Called as texts are done with how many are, of how many, and what is being done.
        **settings: Other fields of `Request` for every prompt.

    Raises:
        InputError: The decoder does not fit the model, or a prompt or a setting cannot be used.
        DecodingError: Plain decoding failed.
    """
    if num_samples != 0 and num_samples < 4 * MIN_EXPECTED:
        raise InputError(f"num_samples must be 0 or at least {4 * MIN_EXPECTED}; got {num_samples}.")
    if not 0 < false_alarm < 1:
        raise InputError(f"false_alarm must be between 0 and 1; got {false_alarm}.")
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts must be a list of at least one; got {prompts!r}.")
    if model.engine.has_work:
        raise InputError("the model must be idle; some other text is being decoded. Finish or close it.")
    request = make_request({**settings, "temperature": temperature})
    greedy_request = dataclasses.replace(request, temperature=0.0)
    family = model.family
    plain_config = {**family.plain_settings, **(plain_config or {})}
    plain = model.decoder(dataclasses.replace(request, decoder=family.default_decoder, config=plain_config))
    judged = model.decoder(dataclasses.replace(greedy_request, decoder=decoder, config=config))
    samples = num_samples > 0 and request.temperature != 0 and judged.samples
    num_texts = 2 * len(prompts) * (1 + (num_samples if samples else 0))
    runs = Runs(model, num_texts, on_text or (lambda done, total, words: None))
    greedy = compare_greedy(runs, judged, plain, prompts, greedy_request)
    sampled = None
    if samples:
        sampled = compare_sampled(runs, judged, plain, prompts, request, num_samples, false_alarm)
    return Verification(
        model=model.name,
        decoder=judged.name,
        settings=dataclasses.asdict(judged.config),
        promise=judged.promise,
        plain=plain.name,
        plain_settings=dataclasses.asdict(plain.config),
        errors=runs.errors,
        greedy=greedy,
        sampled=sampled,
    )
