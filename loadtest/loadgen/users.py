"""locust's users: clients of a closed loop, and the one that keeps an open loop's schedule; and the shape that says how
many of them there are and when it is over."""

from __future__ import annotations

import random

import gevent
from gevent.pool import Pool
from locust import FastHttpUser, LoadTestShape, task
from locust.exception import StopUser

from loadgen.records import Record
from loadgen.session import LoadTest
from loadgen.streams import ask

_IDLE_S = 0.05
_AGAIN_S = 0.25
"""A client whose request failed waits so long: one that is refused at once would otherwise ask as fast as it can."""


class LoadUser(FastHttpUser):
    """What both have: the load test they belong to, which ``bind`` sets, and how it asks."""

    abstract = True
    load: LoadTest
    max_retries = 0
    """A request that was sent twice would be measured once."""

    def ask(self, record: Record) -> None:
        load = self.load
        ask(self.client, record, clock=load.clock, headers=load.headers, timeout_s=load.settings.timeout_s)


class ClosedUser(LoadUser):
    """One client: asks, reads the answer to its end, asks again.

    All clients are there from the start, and sit out while the profile's level is below their number: locust would end
    a user whom its shape takes away in the middle of an answer.
    """

    @task
    def take_turns(self) -> None:
        load = self.load
        number = load.join()
        try:
            while (now := load.clock()) < load.sending_s:
                if number >= load.settings.profile.clients_at(now):
                    gevent.sleep(_IDLE_S)
                    continue
                request = load.next_request()
                if request is None:
                    break
                record = load.record(request, scheduled_s=load.clock())
                self.ask(record)
                if record.failure:
                    # At random, so that clients that failed together do not come back together.
                    gevent.sleep(_AGAIN_S * random.uniform(0.5, 1.5))
        finally:
            load.leave()
        raise StopUser


class OpenUser(LoadUser):
    """Sends every request when it is due, whatever has become of those before."""

    @task
    def keep_schedule(self) -> None:
        load = self.load
        load.join()
        open_requests = Pool(load.settings.max_open)
        try:
            while (request := load.next_request()) is not None:
                gevent.sleep(max(request.at_s - load.clock(), 0.0))
                record = load.record(request, scheduled_s=request.at_s)
                if open_requests.free_count() == 0:
                    load.health.reached_max_open += 1
                open_requests.spawn(self.ask, record)  # waits while the pool is full; the record says how late it is
            open_requests.join(timeout=max(load.end_s - load.clock(), 0.0))
        finally:
            open_requests.kill()
            load.leave()
        raise StopUser


class Shape(LoadTestShape):
    """All users at once, until the run is over."""

    load: LoadTest

    def tick(self) -> tuple[int, float, list[type[LoadUser]]] | None:
        load = self.load
        if load.begun:
            # A tick comes about once a second: waiting here ends the run when it ends, and at ``end_s`` at the latest.
            load.over.wait(timeout=max(load.end_s - load.clock(), 0.0))
            return None
        return load.users, float(load.users), [ClosedUser if load.closed else OpenUser]


def bind(load: LoadTest) -> None:
    """Make ``load`` what users and shape do next. On the classes: locust takes a user's settings from there, and makes
    users and shape by itself."""
    LoadUser.load = Shape.load = load
    LoadUser.host = load.target.url
    LoadUser.network_timeout = load.settings.timeout_s
    LoadUser.connection_timeout = min(load.settings.timeout_s, 30.0)
    OpenUser.concurrency = load.settings.max_open
