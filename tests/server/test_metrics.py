from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

import chordal
from chordal.generation import Generation, Request
from chordal.sequence import Event
from chordal.server.metrics import (
    CONTENT_TYPE,
    FINISHED_REASONS,
    MAX_POSITIONS,
    REJECTION_REASONS,
    Metrics,
)
from chordal.server.worker import Worker

STATS = {
    "forwards": 4,
    "positions_fed": 30,
    "committed_tokens": 6,
    "draft_tokens": 8,
    "accepted_tokens": 3,
    "draft_forwards": {},
    "cached_tokens": 0,
}


class Reading:
    """What a scrape says: values by name and labels."""

    def __init__(self, metrics):
        self.text = metrics.scrape().decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}
        samples = [sample for family in self.families.values() for sample in family.samples]
        self.samples = {(one.name, frozenset(one.labels.items())): one.value for one in samples}
        assert len(self.samples) == len(samples)

    def __call__(self, name, **labels):
        return self.samples[name, frozenset({"model_name": "m", **labels}.items())]

    def total(self, name, **labels):
        wanted = set(labels.items())
        return sum(value for (own, given), value in self.samples.items() if own == name and wanted <= given)


def make_job(*, model="m", decoder="autoregressive", family="autoregressive", max_rows=4):
    engine = SimpleNamespace(max_rows=max_rows, passes={"target": 0})
    return SimpleNamespace(
        model=SimpleNamespace(name=model, engine=engine),
        decoder=SimpleNamespace(name=decoder, family=family),
    )


def make_result(job, *, reason="stop", error=None, num_prompt=10, **stats):
    return Generation(
        prompt="private prompt",
        text="private text",
        tokens=[],
        finish_reason=reason,
        stop_reason=None,
        model=job.model.name,
        decoder=job.decoder.name,
        promise="exact",
        stats={**STATS, **stats},
        error=error,
        num_prompt=num_prompt,
    )


def make_draft(num, num_kept):
    positions = np.arange(10, 10 + num)
    return Event("draft", 1, positions, positions, kept=np.arange(num_kept))


def run(metrics, job, *, seconds=1.0, **result):
    metrics.admitted(job)
    metrics.started(job, 0.25)
    metrics.first_token(job, 0.5)
    metrics.tokens(job, 1, 0.0)
    metrics.tokens(job, 5, 0.125)
    metrics.finished(job, make_result(job, **result), seconds)


def check_sums(reading):
    """Check what must add up in every reading."""
    total = reading.total
    ended = total("chordal:request_success_total")
    open_ = total("chordal:num_requests_running") + total("chordal:num_requests_waiting")
    assert total("chordal:requests_admitted_total") == ended + open_
    assert total("chordal:requests_finished_total") == ended
    assert total("chordal:e2e_request_latency_seconds_count") == ended
    assert total("chordal:committed_tokens_total") == total("chordal:generation_tokens_total")
    assert total("chordal:diffusion_num_committed_tokens_total") <= total("chordal:generation_tokens_total")
    assert total("chordal:accepted_tokens_total") <= total("chordal:draft_tokens_total")
    assert total("chordal:spec_decode_num_accepted_tokens_total") == total("chordal:accepted_tokens_total")
    assert total("chordal:spec_decode_num_draft_tokens_total") == total("chordal:draft_tokens_total")
    assert total("chordal:prefix_cache_hits_total") <= total("chordal:prefix_cache_queries_total")


def test_what_has_not_happened_is_zero():
    reading = Reading(Metrics(["m", "other model"]))
    check_sums(reading)
    assert set(reading.samples.values()) == {0.0}
    for reason in FINISHED_REASONS:
        assert reading("chordal:request_success_total", finished_reason=reason) == 0
    for reason in REJECTION_REASONS:
        assert reading.total("chordal:admission_rejections_total", reason=reason) == 0
    assert reading("chordal:generation_tokens_total", model_name="other model") == 0


def test_a_request_is_counted_from_its_own_counters():
    metrics = Metrics(["m"])
    run(metrics, make_job(), cached_tokens=7, draft_forwards={"draft": 9})
    reading = Reading(metrics)
    assert {
        name: reading(f"chordal:{name}_total")
        for name in (
            "prompt_tokens",
            "generation_tokens",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "spec_decode_num_draft_tokens",
            "spec_decode_num_accepted_tokens",
            "diffusion_num_denoising_steps",
        )
    } == {
        "prompt_tokens": 10,
        "generation_tokens": 6,
        "prefix_cache_queries": 10,
        "prefix_cache_hits": 7,
        "spec_decode_num_draft_tokens": 8,
        "spec_decode_num_accepted_tokens": 3,
        "diffusion_num_denoising_steps": 0,
    }
    forwards = "chordal:forward_passes_total"
    assert reading(forwards, decoder="autoregressive", engine_model="target") == 4
    assert reading(forwards, decoder="autoregressive", engine_model="draft") == 9
    check_sums(reading)


def test_times_are_observed_once_each():
    metrics = Metrics(["m"])
    run(metrics, make_job(), seconds=3.0)
    reading = Reading(metrics)
    sums = {
        "time_to_first_token_seconds": 0.5,
        "inter_token_latency_seconds": 0.125,  # nothing was before the first tokens
        "request_time_per_output_token_seconds": (3.0 - 0.5) / (6 - 1),
        "e2e_request_latency_seconds": 3.0,
        "request_queue_time_seconds": 0.25,
    }
    for name, seconds in sums.items():
        assert reading(f"chordal:{name}_sum") == seconds
        assert reading(f"chordal:{name}_count") == 1
        assert reading(f"chordal:{name}_bucket", le="+Inf") == 1


def test_one_token_has_no_time_per_token():
    metrics = Metrics(["m"])
    run(metrics, make_job(), committed_tokens=1)
    assert Reading(metrics)("chordal:request_time_per_output_token_seconds_count") == 0


def test_gauges_follow_requests_from_queue_to_end():
    metrics = Metrics(["m"])
    jobs = [make_job() for _ in range(3)]

    def gauges():
        reading = Reading(metrics)
        check_sums(reading)
        names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")
        return tuple(reading(f"chordal:{name}") for name in names)

    for job in jobs:
        metrics.admitted(job)
    assert gauges() == (3, 0, 0)
    metrics.started(jobs[0], 0.0)
    metrics.started(jobs[1], 0.0)
    assert gauges() == (1, 2, 0.5)
    metrics.finished(jobs[0], make_result(jobs[0]), 1.0)
    assert gauges() == (1, 1, 0.25)
    metrics.finished(jobs[2], make_result(jobs[2], reason="cancelled"), 1.0)  # it never started
    metrics.finished(jobs[1], make_result(jobs[1], reason="error"), 1.0)
    assert gauges() == (0, 0, 0)


@pytest.mark.parametrize(
    ("reason", "error", "counted"),
    [
        ("stop", None, "stop"),
        ("length", None, "length"),
        ("cancelled", None, "cancelled"),
        ("cancelled", TimeoutError("late"), "timeout"),
        ("cancelled", RuntimeError("dead"), "cancelled"),
        ("error", RuntimeError("broken"), "error"),
        ("private", None, "error"),
        (None, None, "error"),
    ],
)
def test_ends_are_counted_by_a_closed_set_of_reasons(reason, error, counted):
    metrics = Metrics(["m"])
    run(metrics, make_job(), reason=reason, error=error)
    reading = Reading(metrics)
    for name in FINISHED_REASONS:
        assert reading("chordal:request_success_total", finished_reason=name) == (name == counted)


def test_drafts_are_counted_by_position_when_their_request_ends():
    metrics, job = Metrics(["m"]), make_job()
    metrics.admitted(job)
    metrics.started(job, 0.0)
    for num_kept in (3, 1, 0):
        metrics.drafted(job, make_draft(4, num_kept))
    assert Reading(metrics)("chordal:spec_decode_num_drafts_total") == 0
    metrics.finished(job, make_result(job, draft_tokens=12, accepted_tokens=4), 1.0)
    reading = Reading(metrics)
    name = "chordal:spec_decode_num_accepted_tokens_per_pos_total"
    assert reading("chordal:spec_decode_num_drafts_total") == 3
    assert [reading(name, position=str(at)) for at in range(3)] == [2, 1, 1]
    assert reading.total(name) == reading("chordal:spec_decode_num_accepted_tokens_total") == 4


def test_positions_are_bounded_and_none_is_lost():
    metrics, job = Metrics(["m"]), make_job()
    metrics.admitted(job)
    metrics.started(job, 0.0)
    metrics.drafted(job, make_draft(500, 400))
    metrics.finished(job, make_result(job, draft_tokens=500, accepted_tokens=400), 1.0)
    reading = Reading(metrics)
    name = "chordal:spec_decode_num_accepted_tokens_per_pos_total"
    assert sum(sample == name for sample, _ in reading.samples) == MAX_POSITIONS
    assert reading(name, position=str(MAX_POSITIONS - 1)) == 400 - (MAX_POSITIONS - 1)
    assert reading.total(name) == 400


def test_diffusion_decoders_have_counters_of_their_own():
    metrics = Metrics(["m"])
    run(metrics, make_job(decoder="threshold", family="diffusion"))
    run(metrics, make_job())
    reading = Reading(metrics)
    assert reading("chordal:diffusion_num_denoising_steps_total") == 4
    assert reading("chordal:diffusion_num_canvas_positions_total") == 30
    assert reading("chordal:diffusion_num_committed_tokens_total") == 6
    assert reading("chordal:committed_tokens_total", decoder="threshold") == 6
    assert reading("chordal:committed_tokens_total", decoder="autoregressive") == 6


def test_vllm_names_have_the_same_values_and_only_on_request():
    for vllm_names in (False, True):
        metrics = Metrics(["m", "chordal:x"], vllm_names=vllm_names)
        run(metrics, make_job())
        run(metrics, make_job(model="chordal:x"))
        reading = Reading(metrics)
        vllm = {key: value for key, value in reading.samples.items() if key[0].startswith("vllm:")}
        assert bool(vllm) == vllm_names
        for (name, labels), value in vllm.items():
            assert reading.samples[name.replace("vllm:", "chordal:", 1), labels] == value
    assert reading("vllm:generation_tokens_total", model_name="chordal:x") == 6
    assert "vllm:spec_decode_num_drafts_total" in reading.text
    assert "vllm:forward_passes" not in reading.text
    assert {name.split(":")[0] for name in reading.families} == {"chordal", "vllm"}


def test_every_metric_says_what_it_counts():
    reading = Reading(Metrics(["m"], vllm_names=True))
    for family in reading.families.values():
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        assert all(sample.name.endswith("_total") for sample in family.samples) == (family.type == "counter")
    assert "_created" not in reading.text
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_labels_hold_nothing_of_a_request():
    metrics = Metrics(["m"])
    run(metrics, make_job(model="private model"))
    metrics.rejected("private reason")
    metrics.rejected("queue_full")
    reading = Reading(metrics)
    assert "private" not in reading.text
    assert reading("chordal:generation_tokens_total", model_name="other") == 6
    assert reading.total("chordal:admission_rejections_total", reason="other") == 1
    assert reading.total("chordal:admission_rejections_total", reason="queue_full") == 1


def test_a_model_is_labelled_with_the_name_it_is_served_under():
    metrics = Metrics(["served", "m"])
    job = make_job(model="m")
    metrics.attach({"served": job.model, "not announced": make_job().model})
    run(metrics, job)
    reading = Reading(metrics)
    assert reading("chordal:generation_tokens_total", model_name="served") == 6
    assert "not announced" not in reading.text


def test_passes_of_the_engine_are_taken_over_at_each_tick():
    metrics, job = Metrics(["m"]), make_job()
    metrics.attach({"m": job.model})
    for passes in (3, 3, 8):
        job.model.engine.passes["target"] = passes
        metrics.ticked(0, 0)
    assert Reading(metrics)("chordal:engine_passes_total", engine_model="target") == 8


def test_instances_share_nothing_with_each_other_or_the_process():
    before = prometheus_client.generate_latest()
    first, second = Metrics(["m"]), Metrics(["m"])
    run(first, make_job())
    assert Reading(second)("chordal:generation_tokens_total") == 0
    assert b"generation_tokens" not in before + prometheus_client.generate_latest()


def test_nothing_is_kept_of_requests_that_ended():
    metrics = Metrics(["m"])
    for _ in range(10):
        run(metrics, make_job())
    assert not metrics._open
    assert len(Reading(metrics).samples) == len(Reading(metrics).samples)


def test_every_reading_adds_up_while_requests_come_and_go():
    metrics = Metrics(["m"])

    def serve():
        for _ in range(300):
            run(metrics, make_job(decoder="threshold", family="diffusion"))

    thread = threading.Thread(target=serve)
    thread.start()
    while thread.is_alive():
        check_sums(Reading(metrics))
    thread.join()
    assert Reading(metrics).total("chordal:requests_finished_total") == 300


def test_a_worker_with_an_autoregressive_and_a_diffusion_model_adds_up():
    """Real jobs: plain, drafting with a model, prompt lookup, diffusion, cancelled, late, n of one prompt."""
    names = ["ar", "mdm"]
    metrics = Metrics(names, vllm_names=True)
    prompt = "one two three one two three one two"
    wanted = [
        ("ar", {"decoder": "autoregressive"}),
        ("ar", {"decoder": "draft_model"}),
        ("ar", {"decoder": "prompt_lookup"}),
        ("ar", {"decoder": "autoregressive", "temperature": 1.0}),
        ("ar", {"decoder": "autoregressive", "temperature": 1.0, "seed": 1}),
        ("mdm", {"decoder": "threshold"}),
        ("mdm", {}),
    ]

    def load():
        models = {"ar": chordal.load("tiny-ar", draft="tiny-draft"), "mdm": chordal.load("tiny-mdm")}
        metrics.attach(models)
        return models

    worker = Worker(load, max_queue=16, max_running=2, watchdog_s=None, observer=metrics)
    worker.start()

    async def serve():
        while worker.state == "loading":
            await asyncio.sleep(0.01)
        jobs = [
            worker.models[name].job(prompt, Request(max_new_tokens=16, ignore_eos=True, chat=False, **more))
            for name, more in wanted
        ]
        ticket = worker.submit(jobs, timeout_s=60.0)
        late = worker.submit([worker.models["ar"].job(prompt, Request(chat=False))], timeout_s=0.0)
        results = [update.result async for update in ticket if update.result is not None]
        results += [update.result async for update in late if update.result is not None]
        gone = worker.submit([worker.models["mdm"].job(prompt, Request(chat=False))], timeout_s=None)
        gone.cancel()
        results += [update.result async for update in gone if update.result is not None]
        return results

    results = asyncio.run(serve())
    worker.stop(10)
    reading = Reading(metrics)
    check_sums(reading)
    assert len(results) == len(wanted) + 2
    assert reading.total("chordal:requests_admitted_total") == len(results)
    assert reading("chordal:request_success_total", model_name="ar", finished_reason="length") == 5
    assert reading("chordal:request_success_total", model_name="ar", finished_reason="timeout") == 1
    assert reading("chordal:request_success_total", model_name="mdm", finished_reason="cancelled") == 1

    def total(key):
        return sum(result.stats[key] for result in results)

    assert reading.total("chordal:generation_tokens_total") == total("committed_tokens") >= 7 * 16
    assert reading.total("chordal:forward_passes_total", engine_model="target") == total("forwards")
    assert reading.total("chordal:forward_passes_total", engine_model="draft") > 0
    assert reading.total("vllm:spec_decode_num_draft_tokens_total") == total("draft_tokens") > 0
    accepted = total("accepted_tokens")
    assert reading.total("vllm:spec_decode_num_accepted_tokens_total") == accepted
    assert reading.total("vllm:spec_decode_num_accepted_tokens_per_pos_total") == accepted
    assert 0 < reading.total("chordal:spec_decode_num_drafts_total") <= total("draft_tokens")
    assert reading.total("chordal:prompt_tokens_total") == sum(result.num_prompt for result in results)
    diffusion = sum(result.stats["forwards"] for result in results if result.decoder != "autoregressive")
    assert 0 < reading("chordal:diffusion_num_denoising_steps_total", model_name="mdm") <= diffusion
    assert reading("chordal:diffusion_num_denoising_steps_total", model_name="ar") == 0
    passes = {name: worker.models[name].engine.passes["target"] for name in names}
    for name in names:
        assert reading("chordal:engine_passes_total", model_name=name, engine_model="target") == passes[name]
    # Batched: the requests' forward passes are more than the engine ran.
    assert (
        reading.total("chordal:forward_passes_total", model_name="ar", engine_model="target") > passes["ar"]
    )
