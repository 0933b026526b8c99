"""Reduce the logits of a batch to what each request asked for, with one transfer to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from chordal.forward import Ints, Logits, Logprobs, Reading, Sample, TopK
from chordal.ops import sampling

LogitsRead: TypeAlias = Sample | TopK | Logits


def read_logits(logits_NV: Tensor, reads: Sequence[LogitsRead]) -> list[Reading]:
    """Read every request of a batch.

    Args:
        logits_NV: Float32, the rows of all reads in order.
        reads: What they ask for; the lengths of their `rows` add up to N.

    Returns:
        One reading for each read, with `max_logit` set always: it tells non-finite logits.
    """
    spans, start = [], 0
    for read in reads:
        spans.append(slice(start, start + len(read.rows)))
        start += len(read.rows)

    max_N, argmax_N = logits_NV.max(1)
    if all(isinstance(read, Sample) and _is_argmax(read) for read in reads):
        host_2N = torch.stack([max_N.double(), argmax_N.double()]).cpu().numpy()
        tokens_N = host_2N[1].astype(np.int64)
        return [Reading(tokens=tokens_N[rows], max_logit=host_2N[0, rows]) for rows in spans]

    columns = {"max_logit": max_N[:, None]}
    if any(isinstance(read, Sample) for read in reads):
        columns |= _sample(logits_NV, reads, spans)
    if any(isinstance(read, Sample) and read.logprobs is not None for read in reads):
        columns |= _logprobs(logits_NV, columns["tokens"][:, 0], reads, spans)
    num_candidates = max((read.candidates for read in reads if isinstance(read, Sample)), default=0)
    if num_candidates:
        k = min(num_candidates, logits_NV.shape[1])
        columns["candidates"] = logits_NV.topk(k, dim=1).indices
    k = max((read.k for read in reads if isinstance(read, TopK)), default=0)
    if k:
        probs_NV = logits_NV.softmax(1)
        top = probs_NV.topk(min(k, probs_NV.shape[1]), dim=1)
        columns |= {
            "top_tokens": top.indices,
            "top_probs": top.values,
            "row_entropy": sampling.entropy(probs_NV)[:, None],
        }

    # Float64 holds token ids and float32 scores alike without loss.
    host = torch.cat([column.double() for column in columns.values()], 1).cpu().numpy()
    edges = np.cumsum([column.shape[1] for column in columns.values()])[:-1]
    table = dict(zip(columns, np.split(host, edges, axis=1), strict=True))

    readings = []
    for read, rows in zip(reads, spans, strict=True):
        max_logit = table["max_logit"][rows, 0]
        if isinstance(read, Sample):
            scores: dict[str, Any] = {name: table[name][rows, 0] for name in read.scores}
            tokens = table["tokens"][rows, 0].astype(np.int64)
            if read.candidates:
                scores["candidates"] = table["candidates"][rows, : read.candidates].astype(np.int64)
            if read.logprobs is not None:
                scores["logprobs"] = Logprobs(
                    table["logprobs"][rows, 0],
                    table["likeliest"][rows, : read.logprobs].astype(np.int64),
                    table["likeliest_logprobs"][rows, : read.logprobs],
                )
            readings.append(Reading(tokens=tokens, max_logit=max_logit, **scores))
        elif isinstance(read, TopK):
            tokens = table["top_tokens"][rows, : read.k].astype(np.int64)
            probs, entropy = table["top_probs"][rows, : read.k], table["row_entropy"][rows, 0]
            readings.append(Reading(tokens=tokens, probs=probs, entropy=entropy, max_logit=max_logit))
        else:
            readings.append(Reading(logits=logits_NV[rows], max_logit=max_logit))
    return readings


def _is_argmax(read: Sample) -> bool:
    is_plain = read.law.is_greedy and not read.law.adjusts
    return is_plain and not (read.scores or read.banned or read.candidates) and read.logprobs is None


def _sample(logits_NV: Tensor, reads: Sequence[LogitsRead], spans: Sequence[slice]) -> dict[str, Tensor]:
    """Choose a token for every row and compute the scores that some read wants.

    Rows of other reads go along as greedy ones.
    """
    samples = [(read, rows) for read, rows in zip(reads, spans, strict=True) if isinstance(read, Sample)]
    wanted = {name for read, _ in samples for name in read.scores}
    z_NV = _adjusted(logits_NV, samples)

    laws = [sampling.Law()] * len(logits_NV)
    uniforms_N = np.zeros(len(logits_NV))
    for read, rows in samples:
        laws[rows] = [read.law] * len(read.rows)
        if not read.law.is_greedy:
            if read.uniforms is None:
                raise ValueError("a sampled read needs one uniform number for each row; got none")
            uniforms_N[rows] = read.uniforms
    law_NV = sampling.transform(z_NV, laws)
    tokens_N = law_NV.argmax(1)
    if not all(law.is_greedy for law in laws):
        is_greedy_N = torch.tensor([law.is_greedy for law in laws], device=z_NV.device)
        drawn_N = sampling.draw(law_NV, torch.from_numpy(uniforms_N).to(z_NV.device))
        tokens_N = torch.where(is_greedy_N, tokens_N, drawn_N)

    columns = {"tokens": tokens_N[:, None]}
    if wanted:
        probs_NV = _scored(logits_NV, z_NV, law_NV, samples).softmax(1)
        if "probs" in wanted:
            columns["probs"] = probs_NV.gather(1, tokens_N[:, None])
        if "margin" in wanted:
            columns["margin"] = sampling.margin(probs_NV)[:, None]
        if "entropy" in wanted:
            columns["entropy"] = sampling.entropy(probs_NV)[:, None]
        if "gap" in wanted:
            columns["gap"] = sampling.margin(z_NV)[:, None]
    return columns


def _adjusted(logits_NV: Tensor, samples: Sequence[tuple[Sample, slice]]) -> Tensor:
    """Apply what the laws adjust, and bans, in a copy if there are any."""
    if not any(read.banned or read.law.adjusts for read, _ in samples):
        return logits_NV
    z_NV = logits_NV.clone()
    for read, rows in samples:
        z_NV[rows] = sampling.adjust(z_NV[rows], read.law, read.contexts or (), read.num_prompt)
        if read.banned:
            z_NV[rows, list(read.banned)] = float("-inf")
    return z_NV


def _logprobs(
    logits_NV: Tensor, tokens_N: Tensor, reads: Sequence[LogitsRead], spans: Sequence[slice]
) -> dict[str, Tensor]:
    """Give log-probabilities of the rows that ask for them, NaN for the others."""
    asking = [(read, rows) for read, rows in zip(reads, spans, strict=True) if isinstance(read, Sample)]
    asking = [(read, rows) for read, rows in asking if read.logprobs is not None]
    rows_A = torch.cat([torch.arange(rows.start, rows.stop) for _, rows in asking]).to(logits_NV.device)
    most = max(read.logprobs or 0 for read, _ in asking)
    found = logprobs_of(logits_NV[rows_A], tokens_N[rows_A], most)
    nan = logits_NV.new_full((len(logits_NV), 1), float("nan"), dtype=torch.float64)
    return {
        name: nan.expand(-1, column.shape[1]).index_copy(0, rows_A, column.double())
        for name, column in zip(("logprobs", "likeliest", "likeliest_logprobs"), found, strict=True)
    }


def logprobs_of(logits_NV: Tensor, tokens_N: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give log-probabilities of logits as they are, in float32 or wider.

    Args:
        logits_NV: Raw logits.
        tokens_N: A token of each row.
        num: How many of the most likely tokens, at most the vocabulary.

    Returns:
        Of the tokens, `[N, 1]`; the most likely tokens and theirs, `[N, num]`.
    """
    logprobs_NV = logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
    logprobs_NV = logprobs_NV.log_softmax(1)
    top = logprobs_NV.topk(min(num, logprobs_NV.shape[1]), dim=1)
    return logprobs_NV.gather(1, tokens_N[:, None]), top.indices, top.values


def read_logprobs(logits_NV: Tensor, tokens: Ints, num: int) -> Logprobs:
    """Give `Logprobs` of raw logits on the device and a token of each row, with one transfer."""
    found = logprobs_of(logits_NV, torch.from_numpy(tokens).to(logits_NV.device), num)
    host = torch.cat([column.double() for column in found], 1).cpu().numpy()
    width = found[1].shape[1]
    return Logprobs(host[:, 0], host[:, 1 : 1 + width].astype(np.int64), host[:, 1 + width :])


def _scored(
    logits_NV: Tensor, z_NV: Tensor, law_NV: Tensor, samples: Sequence[tuple[Sample, slice]]
) -> Tensor:
    """Take each row's scores from what they are to be of, without the tokens that must not score."""
    if law_NV is z_NV is logits_NV and not any(read.unscored for read, _ in samples):
        return z_NV
    scored_NV = z_NV.clone()
    for read, rows in samples:
        if read.of == "law":
            scored_NV[rows] = law_NV[rows]
        elif read.of == "raw":
            scored_NV[rows] = logits_NV[rows]
        if read.unscored:
            scored_NV[rows, list(read.unscored)] = float("-inf")
    return scored_NV
