"""From results to OpenAI's objects: whole answers, and the chunks of streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from chordal import __version__
from chordal.bench import metrics
from chordal.generation import Generation
from chordal.likelihood import PromptLogprobs
from chordal.sequence import Event, TokenLogprob
from chordal.server.errors import api_error
from chordal.server.mailbox import Ticket, Update
from chordal.server.prepare import Prepared
from chordal.server.schema import ChatRequest, CompletionRequest
from chordal.server.tokens import Offset, TokenTexts, chat_logprobs, completion_logprobs
from chordal.server.worker import UnavailableError


@dataclass
class _Choice:
    """What has been told of one answer."""

    num_tokens: int = 0
    offset: Offset = field(default_factory=Offset)


class Answer:
    """Writes the answer to one request.

    Args:
        request: The request.
        prepared: What it runs.
        texts: Shows tokens of the model.
    """

    def __init__(
        self, request: ChatRequest | CompletionRequest, prepared: Prepared, texts: TokenTexts
    ) -> None:
        self._request, self._prepared, self._texts = request, prepared, texts
        self._is_chat = isinstance(request, ChatRequest)
        self._echo = isinstance(request, CompletionRequest) and bool(request.echo)
        self._object = "chat.completion" if self._is_chat else "text_completion"
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        self._id = f"{prefix}-{request.request_id or uuid.uuid4().hex}"
        self._created = int(time.time())
        num = len(prepared.prompts) * prepared.num_choices
        self._choices = [_Choice(offset=self._first_offset(index)) for index in range(num)]
        # Updates of answers whose prompt must be told first, with log-probabilities that are not known yet.
        self._held: list[list[Update] | None] = [[] if prepared.scorings else None for _ in range(num)]
        self._results: dict[int, Generation] = {}

    async def whole(self, ticket: Ticket | None) -> dict[str, Any]:
        """Wait for all results and write them.

        Raises:
            APIError: One of them is an error.
        """
        queue_s = dict.fromkeys(range(len(self._choices)), 0.0)
        async for update in _updates(ticket):
            if update.result is not None:
                _raise(update.result)
                if (index := self._index(update)) is not None:
                    queue_s[index] = update.queue_s
                    self._take_result(index, update.result)
        choices = [self._whole_choice(index, queue_s[index]) for index in range(len(self._choices))]
        answer = {**self._head(self._object), "choices": choices, "usage": self._usage()}
        if self._is_chat and self._request.return_token_ids:
            answer["prompt_token_ids"] = self._prepared.prompts[0].tokens.tolist()
        return answer

    async def chunks(self, updates: AsyncIterator[Update]) -> AsyncIterator[dict[str, Any]]:
        """Write what becomes known as it does; an error is the last chunk.

        Yields:
            The document of each event.
        """
        try:
            for index in range(len(self._choices)):
                for choice in self._first_chunks(index):
                    yield self._chunk(choice)
            async for update in updates:
                if update.result is not None:
                    _raise(update.result)
                for choice in self._update_chunks(update):
                    yield self._chunk(choice)
        except Exception as error:
            yield api_error(error, request_id=self._id).to_dict()
            return
        if self._request.include_usage:
            yield {**self._head(self._chunk_object), "choices": [], "usage": self._usage()}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._prepared.name,
            "system_fingerprint": f"chordal-{__version__}",
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self._chunk_object), "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = self._usage() if self._request.continuous_usage else None
        return chunk

    def _index(self, update: Update) -> int | None:
        """Give the choice an update is of; None for the scores of a prompt."""
        at = update.index - len(self._prepared.scorings)
        return at if at >= 0 else None

    def _prompt_of(self, index: int) -> int:
        return index // self._prepared.num_choices

    def _first_offset(self, index: int) -> Offset:
        """Say where the first token begins: tokenizers may put a space before a text that is not shown."""
        prompt = self._prepared.prompts[self._prompt_of(index)]
        is_cut = (
            self._echo and self._texts.bytes_of(int(prompt.tokens[0]))[:1] == b" " != prompt.text[:1].encode()
        )
        return Offset(-1 if is_cut else 0)

    def _take_result(self, index: int, result: Generation) -> None:
        self._results[index] = result
        self._choices[index].num_tokens = len(result.tokens)

    def _usage(self) -> dict[str, Any]:
        prompt = sum(len(one.tokens) for one in self._prepared.prompts)
        completion = sum(choice.num_tokens for choice in self._choices)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        cached: dict[int, int] = {}
        for index, result in self._results.items():
            if (num := result.stats.get("cached_tokens")) is not None:
                # What one answer to a prompt computed is not cached for the prompt.
                at = self._prompt_of(index)
                cached[at] = min(num, cached.get(at, num))
        if cached:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(cached.values())}
        return usage

    def _whole_choice(self, index: int, queue_s: float) -> dict[str, Any]:
        result = self._results.get(index)
        text = result.text if result is not None else ""
        logprobs = None
        if self._request.num_logprobs is not None:
            tokens, scores = self._prompt_scores(index)
            if result is not None:
                tokens, scores = tokens + result.tokens, scores + result.logprobs
            logprobs = self._logprobs(index, tokens, scores)
        choice: dict[str, Any] = {"index": index}
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = (
                self._prepared.prompts[self._prompt_of(index)].text if self._echo else ""
            ) + text
        choice["logprobs"] = logprobs
        choice |= self._finish(result)
        if self._request.return_token_ids:
            choice["token_ids"] = result.tokens if result is not None else []
            if not self._is_chat:
                choice["prompt_token_ids"] = self._prepared.prompts[self._prompt_of(index)].tokens.tolist()
        if self._request.chordal.counts and result is not None:
            choice["chordal"] = self._counts(index, result, queue_s)
        return choice

    def _first_chunks(self, index: int) -> Iterable[dict[str, Any]]:
        """Tell the role, or the prompt of an echo; its log-probabilities come once they are known."""
        prompt = self._prepared.prompts[self._prompt_of(index)]
        extra = {"prompt_token_ids": prompt.tokens.tolist()} if self._request.return_token_ids else {}
        if self._is_chat:
            yield {**self._piece(index, ""), **extra, "delta": {"role": "assistant", "content": ""}}
        elif self._echo and not self._prepared.scorings:
            yield {**self._piece(index, prompt.text), **extra}
        elif extra:
            yield {**self._piece(index, ""), **extra}
        if not self._prepared.jobs and not self._prepared.scorings:
            yield {**self._piece(index, ""), **self._finish(None)}

    def _update_chunks(self, update: Update) -> Iterable[dict[str, Any]]:
        index = self._index(update)
        if index is None:
            if update.result is not None:
                yield from self._scored_chunks(update.index)
            return
        if (held := self._held[index]) is not None:
            held.append(update)
        else:
            yield from self._news(index, update)

    def _scored_chunks(self, prompt: int) -> Iterable[dict[str, Any]]:
        """Tell the prompt with its log-probabilities, and then what waited for it."""
        num = self._prepared.num_choices
        for index in range(prompt * num, (prompt + 1) * num):
            piece = self._piece(index, self._prepared.prompts[prompt].text)
            piece["logprobs"] = self._logprobs(index, *self._prompt_scores(index))
            yield piece
            held, self._held[index] = self._held[index], None
            for update in held or ():
                yield from self._news(index, update)
            if not self._prepared.jobs:
                yield {**self._piece(index, ""), **self._finish(None)}

    def _news(self, index: int, update: Update) -> Iterable[dict[str, Any]]:
        choice, request = self._choices[index], self._request
        choice.num_tokens += len(update.tokens)
        piece = self._piece(index, update.text)
        has_news = bool(update.text)
        if request.num_logprobs is not None and len(update.tokens):
            piece["logprobs"] = self._logprobs(index, update.tokens.tolist(), update.logprobs)
            has_news = True
        if request.return_token_ids and len(update.tokens):
            piece["token_ids"] = update.tokens.tolist()
            has_news = True
        if update.events:
            piece["chordal"] = {"events": [self._event(index, event) for event in update.events]}
            has_news = True
        result = update.result
        if result is None:
            if has_news or (request.continuous_usage and len(update.tokens)):
                yield piece
            return
        self._take_result(index, result)
        last = self._finish(result)
        told = {"chordal": self._counts(index, result, update.queue_s)} if request.chordal.counts else {}
        if self._is_chat and has_news:
            yield piece
            yield {**self._piece(index, None), **last, **told}
        elif self._is_chat:
            yield {**self._piece(index, None), **last, **told}
        else:
            told = {"chordal": piece.get("chordal", {}) | told.get("chordal", {})} if told else {}
            yield {**piece, **last, **told}

    def _piece(self, index: int, text: str | None) -> dict[str, Any]:
        """Write a choice of a chunk; no text at all where a chat says only why it ended."""
        content = {"delta": {} if text is None else {"content": text}} if self._is_chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": None}

    def _finish(self, result: Generation | None) -> dict[str, Any]:
        """Say why an answer ended; one that asked for no token is as long as it may be."""
        if result is None:
            return {"finish_reason": "length", "stop_reason": None}
        reason = result.stop_reason
        if isinstance(reason, int) and reason not in (self._request.stop_token_ids or ()):
            reason = None  # the model's own end
        return {"finish_reason": result.finish_reason, "stop_reason": reason}

    def _counts(self, index: int, result: Generation, queue_s: float) -> dict[str, Any]:
        stats = dict(result.stats)
        drafted, accepted, forwards = stats["draft_tokens"], stats["accepted_tokens"], stats["forwards"]
        stats["acceptance_rate"] = metrics.acceptance_rate(drafted, accepted)
        stats["acceptance_length"] = metrics.acceptance_length(drafted, accepted, forwards)
        stats["queue_s"] = round(queue_s, 6)
        stats["seed"] = self._prepared.jobs[index].seq.seed
        return {"decoder": result.decoder, "promise": result.promise, "counts": stats}

    def _event(self, index: int, event: Event) -> dict[str, Any]:
        start = self._prepared.jobs[index].seq.num_prompt
        tokens = event.tokens.tolist()
        return {
            "kind": event.kind,
            "forward": event.forward,
            "positions": (event.positions - start).tolist(),
            "tokens": tokens,
            "texts": [self._texts.bytes_of(token).decode(errors="replace") for token in tokens],
            "confidence": None
            if event.confidence is None
            else [
                None if probability != probability else probability
                for probability in event.confidence.tolist()
            ],
            "kept": None if event.kept is None else event.kept.tolist(),
            "parents": None if event.parents is None else event.parents.tolist(),
        }

    def _prompt_scores(self, index: int) -> tuple[list[int], list[TokenLogprob | None]]:
        """Give the tokens of a prompt and what was read of them, if that was asked for."""
        if not self._prepared.scorings:
            return [], []
        at = self._prompt_of(index)
        decoder = self._prepared.scorings[at].decoder
        assert isinstance(decoder, PromptLogprobs)
        return self._prepared.prompts[at].tokens.tolist(), list(decoder.found)

    def _logprobs(self, index: int, tokens: Seq[int], scores: Seq[TokenLogprob | None]) -> dict[str, Any]:
        num = self._request.num_logprobs or 0
        if self._is_chat:
            return chat_logprobs(self._texts, tokens, scores, num)
        return completion_logprobs(self._texts, tokens, scores, num, self._choices[index].offset)


def _raise(result: Generation) -> None:
    """Raise what ended an answer before its time."""
    if result.error is not None:
        raise result.error
    if result.finish_reason not in ("stop", "length"):
        raise UnavailableError("the request was cut off.")


async def _updates(ticket: Ticket | None) -> AsyncIterator[Update]:
    if ticket is not None:
        async for update in ticket:
            yield update
