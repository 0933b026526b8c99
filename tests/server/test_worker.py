from __future__ import annotations

import asyncio
import gc
import logging
import random
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest

from chordal.engine import Engine
from chordal.errors import DecodingError, InputError
from chordal.generation import Model, Request
from chordal.server.worker import QueueFullError, UnavailableError, Worker
from chordal.testing.toys import TableModel


class Letters:
    """A tokenizer whose token i is the i-th letter."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(ord("a") + token) for token in np.asarray(tokens).tolist())


class Toy(TableModel):
    """A table model that can be held up before each pass, and whose passes can fail."""

    tokenizer = Letters()

    def __init__(self, *, window=64, max_rows=4):
        super().__init__(20, seed=1, window=window, max_rows=max_rows)
        self.is_open = threading.Event()
        self.is_open.set()
        self.passes = threading.Semaphore(0)  # that may run while it is not open
        self.rows = []
        self.fault = lambda: None
        self.free_fault = lambda: None

    def run(self, requests):
        while not self.is_open.is_set() and not self.passes.acquire(timeout=0.005):
            pass
        self.rows.append(len(requests))
        self.fault()
        return super().run(requests)

    def free_row(self, row, *, clear=False):
        self.free_fault()
        super().free_row(row, clear=clear)


class Log:
    """An observer that counts, and checks that it is told things in their order."""

    def __init__(self):
        self.count = Counter()
        self.running = self.waiting = 0
        self.steps = {}

    def _step(self, job, name, after):
        assert self.steps.get(id(job)) in after, (name, self.steps.get(id(job)))
        self.steps[id(job)] = name
        self.count[name] += 1

    def admitted(self, job):
        self._step(job, "admitted", [None])

    def rejected(self, reason):
        self.count[reason] += 1

    def started(self, job, queue_s):
        assert queue_s >= 0
        self._step(job, "started", ["admitted"])

    def first_token(self, job, seconds):
        self._step(job, "first_token", ["started"])

    def tokens(self, job, num, seconds_since_last):
        assert num > 0
        assert seconds_since_last >= 0
        self._step(job, "tokens", ["first_token", "tokens"])

    def drafted(self, job, event):
        self.count["drafted"] += 1

    def finished(self, job, result, seconds):
        self._step(job, "finished", ["admitted", "started", "first_token", "tokens"])
        del self.steps[id(job)]
        self.count[result.finish_reason] += 1
        self.count["committed"] += result.stats["committed_tokens"]

    def ticked(self, num_running, num_waiting):
        self.running, self.waiting = num_running, num_waiting


def serve(use, *toys, max_queue=64, max_running=4, **more):
    """Run a coroutine function `use(worker, *models)` beside a worker that serves toys."""
    models = [Model(Engine(toy)) for toy in toys]
    worker = Worker(
        lambda: {f"toy-{number}": model for number, model in enumerate(models)},
        max_queue=max_queue,
        max_running=max_running,
        **{"watchdog_s": None, **more},
    )
    worker.start()

    async def main():
        await until(lambda: worker.state != "loading")
        return await asyncio.wait_for(use(worker, *models), 60)

    try:
        return asyncio.run(main())
    finally:
        for toy in toys:
            toy.is_open.set()
        worker.stop(0)
        assert not worker.is_alive()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def job(model, prompt=(1, 2), **settings):
    return model.job(list(prompt), Request(**{"max_new_tokens": 12, **settings}))


async def read(ticket):
    """Take all updates and put them together by job: text, tokens, result."""
    whole = {}
    async for update in ticket:
        text, tokens, result = whole.get(update.index, ("", [], None))
        assert update.start == len(tokens)
        assert result is None, "the result comes last"
        whole[update.index] = text + update.text, tokens + update.tokens.tolist(), update.result
    return [whole[index] for index in sorted(whole)]


def test_updates_put_together_are_the_result():
    async def use(worker, model):
        [(text, tokens, result)] = await read(worker.submit([job(model)], timeout_s=None))
        [alone] = Model(Engine(Toy())).generate([[1, 2]], max_new_tokens=12)
        assert (text, tokens) == (result.text, result.tokens) == (alone.text, alone.tokens)
        assert result.finish_reason == "length"

    serve(use, Toy())


def test_without_streaming_there_is_one_update_a_job():
    async def use(worker, model):
        jobs = [job(model, seed=seed, temperature=1.0) for seed in range(3)]
        updates = [update async for update in worker.submit(jobs, timeout_s=None, stream=False)]
        assert sorted(update.index for update in updates) == [0, 1, 2]
        for update in updates:
            assert update.text == update.result.text
            assert update.tokens.tolist() == update.result.tokens

    serve(use, Toy())


def test_requests_that_join_and_leave_at_any_time_get_the_text_they_get_alone():
    rng = random.Random(0)
    log = Log()
    decoders = ["autoregressive", "prompt_lookup", "jacobi"]
    asked = [
        {
            "prompt": [rng.randrange(20) for _ in range(rng.randint(1, 8))],
            "decoder": rng.choice(decoders),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
            "max_new_tokens": rng.randint(1, 30),
        }
        for number in range(120)
    ]
    asked = [{**one, "temperature": 0.0} if one["decoder"] == "jacobi" else one for one in asked]

    async def use(worker, model, other):
        async def ask(number):
            await asyncio.sleep(rng.random() * 0.3)
            one = dict(asked[number])
            chosen = other if number % 3 == 0 else model
            jobs = [chosen.job(one.pop("prompt"), Request(**one))]
            [(text, _, result)] = await read(worker.submit(jobs, timeout_s=None, stream=number % 2 == 0))
            assert result.error is None
            return text

        texts = await asyncio.gather(*(ask(number) for number in range(len(asked))))
        assert model.engine.num_live == other.engine.num_live == 0
        return texts

    texts = serve(use, Toy(), Toy(), max_queue=1000, observer=log)
    alone = Model(Engine(Toy()))
    for one, text in zip(asked, texts, strict=True):
        settings = dict(one)
        assert alone.generate([settings.pop("prompt")], **settings)[0].text == text
    assert log.count["admitted"] == log.count["started"] == log.count["finished"] == len(asked)
    assert log.count["drafted"] > 0
    assert (log.running, log.waiting, log.steps) == (0, 0, {})


def test_a_random_third_that_leaves_takes_nothing_from_the_others():
    rng = random.Random(1)
    log = Log()
    kept = weakref.WeakSet()

    async def use(worker, model):
        async def ask(number):
            await asyncio.sleep(rng.random())
            work = job(model, temperature=1.0, seed=number, max_new_tokens=40)
            kept.add(work)
            kept.add(work.seq)
            ticket = worker.submit([work], timeout_s=None, events=number % 2 == 0)
            del work
            how = rng.choice(["cancel", "drop", "close", *["stay"] * 6])
            if how == "stay":
                return await read(ticket)
            if how == "close":
                task = asyncio.ensure_future(read(ticket))
                await asyncio.sleep(rng.random() * 0.02)
                del ticket
                task.cancel()
                return None
            await asyncio.sleep(rng.random() * 0.02)
            if how == "cancel":
                ticket.cancel()
                [(_, _, result)] = await read(ticket)
                assert result.finish_reason in ("cancelled", "length")
            return None

        results = await asyncio.gather(*(ask(number) for number in range(400)))
        await until(lambda: not worker.num_unfinished and not model.engine.has_work)
        assert model.engine.num_live == 0
        alone = Model(Engine(Toy()))
        for number, result in list(enumerate(results))[::20]:
            if result is not None:
                settings = {"temperature": 1.0, "seed": number, "max_new_tokens": 40}
                assert result[0][0] == alone.generate([[1, 2]], **settings)[0].text
        await until(lambda: log.running == 0)
        gc.collect()
        assert len(kept) == 0, "a reference to a finished job was kept"

    serve(use, Toy(max_rows=8), max_running=8, max_queue=1000, observer=log)
    assert log.count["admitted"] == log.count["finished"] == 400
    assert log.count["length"] + log.count["cancelled"] == 400
    assert log.count["cancelled"] > 20
    assert log.steps == {}


def test_a_cancelled_job_takes_part_in_no_further_tick():
    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()
        first, second = (worker.submit([job(model, max_new_tokens=60)], timeout_s=None) for _ in range(2))
        toy.rows.clear()
        toy.passes.release(3)
        await until(lambda: len(toy.rows) == 3)
        first.cancel()
        toy.is_open.set()  # the pass that is under way has both
        await read(second)
        assert toy.rows[4:] == [1] * len(toy.rows[4:])
        assert len(toy.rows) > 10
        [(_, _, result)] = await read(first)
        assert (result.finish_reason, result.error) == ("cancelled", None)

    serve(use, Toy())


@pytest.mark.parametrize("how", ["cancel", "drop"])
def test_a_job_cancelled_in_the_queue_never_starts(how):
    log = Log()
    most_running = []
    finished = log.finished

    async def use(worker, model):
        # While the end of one is delivered, too, it counts as what it was.
        log.finished = lambda *told: (most_running.append(worker.num_running), finished(*told))
        toy = model.engine.target
        toy.is_open.clear()
        running = worker.submit([job(model)], timeout_s=None)
        await until(lambda: worker.num_running == 1)
        waiting = worker.submit([job(model)], timeout_s=None)
        assert (worker.num_running, worker.num_waiting) == (1, 1)
        if how == "cancel":
            waiting.cancel()
        else:
            del waiting
        toy.passes.release(2)
        await until(lambda: worker.num_waiting == 0)
        toy.is_open.set()
        await read(running)

    serve(use, Toy(), max_running=1, observer=log)
    assert log.count["started"] == 1
    assert most_running == [1, 1]


def test_a_full_queue_refuses_at_once_and_takes_all_jobs_of_a_request_or_none():
    log = Log()

    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()
        tickets = [worker.submit([job(model) for _ in range(2)], timeout_s=None) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            worker.submit([job(model), job(model)], timeout_s=None)
        assert refused.value.retry_after_s >= 1
        tickets.append(worker.submit([job(model)], timeout_s=None))
        for check in (
            lambda: worker.check_room(model),
            lambda: worker.submit([job(model)], timeout_s=None),
        ):
            with pytest.raises(QueueFullError):
                check()
        with pytest.raises(InputError, match="1 too many"):
            worker.check_room(model, 6)
        toy.is_open.set()
        for ticket in tickets:
            await read(ticket)
        worker.check_room(model, 5)
        await read(worker.submit([job(model) for _ in range(5)], timeout_s=None))

    serve(use, Toy(), max_running=2, max_queue=3, observer=log)
    assert log.count["admitted"] == log.count["finished"] == 10
    assert log.count["queue_full"] == 3


def test_a_full_model_keeps_nobody_of_another_waiting():
    async def use(worker, model, other):
        model.engine.target.is_open.clear()  # which holds up the tick, not the queue
        busy = [worker.submit([job(model)], timeout_s=None) for _ in range(3)]
        with pytest.raises(QueueFullError):
            worker.submit([job(model)], timeout_s=None)
        free = worker.submit([job(other)], timeout_s=None)
        model.engine.target.is_open.set()
        for ticket in (free, *busy):
            await read(ticket)

    serve(use, Toy(), Toy(), max_running=1, max_queue=2)


def test_retry_after_follows_how_fast_requests_are_done(monkeypatch):
    worker = Worker(dict, max_queue=1, max_running=1, watchdog_s=None)
    assert worker._retry_after_s(5) == 1
    monkeypatch.setattr("chordal.server.worker.time.monotonic", lambda: 112.0)
    worker._finish_times.extend([100.0, 104.0, 108.0])
    assert worker._retry_after_s(1) == 6
    assert worker._retry_after_s(3) == 18
    assert worker._retry_after_s(1000) == 60


def test_jobs_start_in_the_order_they_came():
    order = []

    class Order(Log):
        def started(self, job, queue_s):
            order.append(job.seq.seed)

    async def use(worker, model):
        model.engine.target.is_open.clear()
        tickets = [
            worker.submit([job(model, seed=seed) for seed in (2 * number, 2 * number + 1)], timeout_s=None)
            for number in range(5)
        ]
        model.engine.target.is_open.set()
        for ticket in tickets:
            await read(ticket)

    serve(use, Toy(), max_running=3, observer=Order())
    assert order == list(range(10))


def test_a_deadline_ends_what_runs_and_what_waits():
    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()
        toy.fault = lambda: time.sleep(0.01)
        forever = {"max_new_tokens": 60}
        long = worker.submit([job(model, **forever)], timeout_s=None)
        await until(lambda: worker.num_running == 1)
        running = worker.submit([job(model, **forever)], timeout_s=0.05)
        waiting = worker.submit([job(model)], timeout_s=0.05)
        toy.passes.release(1)
        await until(lambda: worker.num_running == 2)
        await asyncio.sleep(0.06)
        toy.passes.release(2)
        for ticket, started in ((running, True), (waiting, False)):
            [(_, tokens, result)] = await read(ticket)
            assert result.finish_reason == "cancelled"
            assert isinstance(result.error, TimeoutError)
            assert "0.05 s" in str(result.error)
            assert bool(tokens) == started
        toy.is_open.set()
        [(_, _, result)] = await read(long)
        assert result.finish_reason == "length"

    serve(use, Toy(), max_running=2)


def test_queue_time_is_told():
    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()
        first = worker.submit([job(model)], timeout_s=None)
        second = worker.submit([job(model)], timeout_s=None)
        await asyncio.sleep(0.05)
        toy.is_open.set()
        assert [update.queue_s async for update in first][-1] < 0.05
        assert [update.queue_s async for update in second][-1] >= 0.05

    serve(use, Toy(), max_running=1)


def test_what_nobody_reads_is_merged():
    async def use(worker, model):
        slow = worker.submit([job(model, max_new_tokens=50)], timeout_s=None, events=True)
        await read(worker.submit([job(model, max_new_tokens=60)], timeout_s=None))
        assert len(slow._mailbox._news) == 1
        updates = [update async for update in slow]
        assert len(updates) == 1
        [update] = updates
        assert update.text == update.result.text
        assert len(update.events) == 50

    serve(use, Toy())


def test_of_guesses_nobody_took_the_last_is_kept():
    def guess(seq, event):
        if event.kind == "commit":
            seq.guess(event.positions, event.tokens)

    async def use(worker, model):
        work = model.job([1, 2], Request(max_new_tokens=20), [guess])
        ticket = worker.submit([work], timeout_s=None, events=True)
        await until(lambda: not worker.num_unfinished)
        [update] = [update async for update in ticket]
        kinds = Counter(event.kind for event in update.events)
        assert kinds == {"commit": 20, "guess": 1}
        last = max(event.forward for event in update.events if event.kind == "commit")
        assert next(event for event in update.events if event.kind == "guess").forward == last - 1

    serve(use, Toy())


def test_a_loop_is_woken_once_a_tick_at_most():
    async def use(worker, model):
        loop, calls = asyncio.get_running_loop(), []
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given: (calls.append(given), real(*given))[1]
        model.engine.target.rows.clear()
        tickets = [worker.submit([job(model), job(model)], timeout_s=None) for _ in range(2)]
        await asyncio.gather(*(read(ticket) for ticket in tickets))
        assert 0 < len(calls) <= len(model.engine.target.rows)

    serve(use, Toy())


def test_a_loop_that_is_closed_cancels_its_requests():
    left = []

    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()

        async def leave():
            left.append(worker.submit([job(model, max_new_tokens=60)], timeout_s=None))

        await asyncio.to_thread(asyncio.run, leave())
        toy.is_open.set()
        await until(lambda: not worker.num_unfinished)
        [(_, _, result)] = await read(worker.submit([job(model)], timeout_s=None))
        assert result.finish_reason == "length"
        assert left[0]._mailbox.is_cancelled

    serve(use, Toy())


def test_events_and_logprobs_come_with_their_tokens():
    async def use(worker, model):
        ticket = worker.submit([job(model, logprobs=2)], timeout_s=None, events=True)
        tokens, logprobs, committed = [], [], []
        async for update in ticket:
            tokens += update.tokens.tolist()
            logprobs += update.logprobs
            assert len(update.logprobs) == len(update.tokens)
            committed += [token for event in update.events for token in event.tokens.tolist()]
            result = update.result
        assert committed == tokens == result.tokens
        assert logprobs == result.logprobs
        assert [one.token for one in logprobs] == tokens
        assert all(len(one.top) == 2 for one in logprobs)

    serve(use, Toy())


@pytest.mark.parametrize("fault", ["raises", "memory", "nan"])
def test_a_pass_that_fails_ends_its_requests_alone(fault):
    async def use(worker, model):
        toy = model.engine.target

        def fail():
            raise MemoryError if fault == "memory" else RuntimeError("broken")

        if fault == "nan":
            table, toy.table_VVV = toy.table_VVV, np.full_like(toy.table_VVV, np.nan)
        else:
            toy.fault = fail
        [(_, _, result)] = await read(worker.submit([job(model)], timeout_s=None))
        assert result.finish_reason == "error"
        expected = {"raises": RuntimeError, "memory": MemoryError, "nan": DecodingError}
        assert isinstance(result.error, expected[fault])
        toy.fault = lambda: None
        if fault == "nan":
            toy.table_VVV = table
        [(text, _, result)] = await read(worker.submit([job(model)], timeout_s=None))
        assert text == Model(Engine(Toy())).generate([[1, 2]], max_new_tokens=12)[0].text
        assert worker.state == "ready"

    serve(use, Toy())


def test_a_job_that_cannot_start_ends_alone(monkeypatch):
    async def use(worker, model):
        bad = job(model)
        monkeypatch.setattr(bad, "start", lambda: (_ for _ in ()).throw(InputError("does not fit")))
        results = await read(worker.submit([bad, job(model)], timeout_s=None))
        assert [result.finish_reason for _, _, result in results] == ["error", "length"]
        assert str(results[0][2].error) == "does not fit"

    serve(use, Toy())


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_that_cannot_be_made_ends_alone(stream):
    async def use(worker, model):
        bad = job(model, max_new_tokens=5)

        def fail(tokens):
            raise ValueError("no such token")

        bad.seq.detokenize = fail
        results = await read(worker.submit([bad, job(model)], timeout_s=None, stream=stream))
        assert [result.finish_reason for _, _, result in results] == ["error", "length"]
        assert str(results[0][2].error) == "no such token"
        assert model.engine.num_live == 0

    serve(use, Toy())


def test_errors_of_an_observer_change_nothing_and_are_logged_once(caplog):
    class Broken:
        def __getattr__(self, name):
            raise RuntimeError("observer")

    async def use(worker, model):
        results = await read(worker.submit([job(model), job(model)], timeout_s=None))
        assert [result.finish_reason for _, _, result in results] == ["length", "length"]
        assert worker.state == "ready"

    with caplog.at_level(logging.ERROR, "chordal.server"):
        serve(use, Toy(), observer=Broken())
    assert len(caplog.records) == 1


def test_a_dead_thread_answers_everybody_at_once_and_takes_nothing_more(caplog):
    log, deaths = Log(), []

    async def use(worker, model):
        toy = model.engine.target
        toy.is_open.clear()
        running = worker.submit([job(model, max_new_tokens=60)], timeout_s=None)
        toy.passes.release(5)
        await until(lambda: toy.passes._value == 0)
        waiting = worker.submit([job(model), job(model)], timeout_s=None, stream=False)

        def fail():
            raise MemoryError("rows")

        toy.free_fault = fail
        running.cancel()
        toy.is_open.set()
        for ticket in (running, waiting):
            for _, _, result in await read(ticket):
                assert result.finish_reason == "cancelled"
                if ticket is waiting:
                    assert isinstance(result.error, UnavailableError)
                    assert "MemoryError" in str(result.error)
        await until(lambda: deaths)
        assert worker.state == "dead"
        assert isinstance(worker.error, MemoryError)
        worker.drain()
        assert worker.state == "dead"
        with pytest.raises(UnavailableError, match="died"):
            worker.submit([job(model)], timeout_s=None)
        with pytest.raises(UnavailableError):
            worker.check_room(model)

    serve(use, Toy(), max_running=1, observer=log, on_death=deaths.append)
    assert [str(error) for error in deaths] == ["rows"]
    assert log.count["admitted"] == log.count["finished"] == 3
    assert "the engine thread died" in caplog.text


def test_models_that_cannot_be_loaded_are_death_without_a_log(caplog):
    deaths = []

    def load():
        raise InputError("no such model")

    worker = Worker(load, max_queue=1, max_running=1, watchdog_s=None, on_death=deaths.append)
    worker.start()
    worker.join(10)
    assert worker.state == "dead"
    assert [str(error) for error in deaths] == ["no such model"]
    assert not caplog.records


def test_a_model_that_fails_when_it_is_warmed_up_is_not_served():
    toy = Toy()
    toy.table_VVV[:] = np.nan
    worker = Worker(lambda: {"toy": Model(Engine(toy))}, max_queue=1, max_running=1, watchdog_s=None)
    worker.start()
    worker.join(10)
    assert worker.state == "dead"
    assert isinstance(worker.error, DecodingError)
    assert worker.models == {}


def test_while_models_load_nothing_is_taken():
    loaded = threading.Event()
    model = Model(Engine(Toy()))

    def load():
        loaded.wait(10)
        return {"toy": model, "alias": model}

    worker = Worker(load, max_queue=1, max_running=1, watchdog_s=None)
    worker.start()

    async def use():
        assert worker.state == "loading"
        assert worker.models == {}
        with pytest.raises(UnavailableError, match="loading"):
            worker.submit([job(model)], timeout_s=None)
        loaded.set()
        await until(lambda: worker.state == "ready")
        [(_, _, result)] = await read(worker.submit([job(model)], timeout_s=None))
        assert result.finish_reason == "length"

    try:
        asyncio.run(use())
    finally:
        loaded.set()
        worker.stop(0)


def test_draining_finishes_what_runs_and_waits_and_takes_nothing_new():
    async def use(worker, model):
        model.engine.target.is_open.clear()
        tickets = [worker.submit([job(model)], timeout_s=None) for _ in range(3)]
        worker.drain()
        assert worker.state == "draining"
        with pytest.raises(UnavailableError, match="shutting down"):
            worker.submit([job(model)], timeout_s=None)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop, 30))
        model.engine.target.is_open.set()
        for ticket in tickets:
            [(_, _, result)] = await read(ticket)
            assert result.finish_reason == "length"
        await stopping
        assert not worker.is_alive()

    serve(use, Toy(), max_running=1)


def test_stopping_cuts_off_what_is_not_done_in_time():
    async def use(worker, model):
        toy = model.engine.target
        toy.fault = lambda: time.sleep(0.02)
        tickets = [worker.submit([job(model, max_new_tokens=60)], timeout_s=None) for _ in range(2)]
        await until(lambda: worker.num_running == 1)
        await asyncio.to_thread(worker.stop, 0.05)
        for ticket in tickets:
            [(_, _, result)] = await read(ticket)
            assert result.finish_reason == "cancelled"
            assert isinstance(result.error, UnavailableError)
        assert model.engine.num_live == 0

    serve(use, Toy(), max_running=1)


def test_a_tick_that_hangs_calls_the_watchdog():
    hung = threading.Event()

    async def use(worker, model):
        toy = model.engine.target
        await read(worker.submit([job(model)], timeout_s=None))
        await asyncio.sleep(0.3)  # idleness is no hang
        assert not hung.is_set()
        toy.is_open.clear()
        ticket = worker.submit([job(model)], timeout_s=None)
        assert await asyncio.to_thread(hung.wait, 30)
        toy.is_open.set()
        await read(ticket)

    serve(use, Toy(), watchdog_s=0.1, on_hang=hung.set)


def test_an_idle_engine_releases_what_it_keeps(monkeypatch):
    monkeypatch.setattr("chordal.server.worker._RELEASE_AFTER_S", 0.05)
    released = []

    async def use(worker, model):
        monkeypatch.setattr(model.engine, "release", lambda: released.append(1), raising=False)
        await read(worker.submit([job(model)], timeout_s=None))
        released.clear()
        await until(lambda: released)
        await asyncio.sleep(0.2)
        assert len(released) == 1, "once is enough"
        await read(worker.submit([job(model)], timeout_s=None))
        released.clear()
        await until(lambda: released)

    serve(use, Toy())


def test_an_idle_thread_sleeps():
    async def use(worker, model):
        await read(worker.submit([job(model)], timeout_s=60))
        await asyncio.sleep(0.05)
        before = time.process_time()
        ticks = []
        real = worker._tick
        worker._tick = lambda: (ticks.append(1), real())
        await asyncio.sleep(0.3)
        assert ticks == []
        assert time.process_time() - before < 0.2

    serve(use, Toy())


def test_what_comes_and_is_given_up_in_the_middle_of_a_tick_is_told_in_order_and_ends(caplog):
    tickets = []

    class Meddler(Log):
        def admitted(self, job):
            super().admitted(job)
            if not tickets:
                asyncio.run_coroutine_threadsafe(meddle(job.model), loop).result()

    async def meddle(model):
        for _ in range(2):
            tickets.append(worker.submit([job(model, max_new_tokens=60)], timeout_s=None))
        tickets[0].cancel()

    async def use(own, model):
        nonlocal loop, worker
        loop, worker = asyncio.get_running_loop(), own
        await read(worker.submit([job(model)], timeout_s=None))
        return [(await read(ticket))[0][2].finish_reason for ticket in tickets]

    log, loop, worker = Meddler(), None, None
    assert serve(use, Toy(), observer=log) == ["cancelled", "length"]
    assert caplog.messages == []  # an observer that is told in another order fails
    assert log.count["admitted"] == log.count["finished"] == 3
    assert (log.running, log.waiting, log.steps) == (0, 0, {})
