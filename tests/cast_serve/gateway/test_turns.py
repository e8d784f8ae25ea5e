"""Requests that wait for a place at a variant: who is asked when, and what is held meanwhile."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cast_serve.gateway.stack import num_requests, running, url_of, wait_until


@pytest.mark.parametrize("fallback", ["sparse=dense", ""])
def test_who_queues_for_a_variant_that_dies_does_not_wait_for_the_deadline(fallback: str) -> None:
    with running(max_running=1, fallback=fallback, health_interval_s=30) as stack:
        with ThreadPoolExecutor(3) as pool:
            stack.workers["sparse"].state.gate.clear()
            users = {name: pool.submit(stack.complete, model="sparse", user=name) for name in "abc"}
            admission = stack.gateway.places.admissions["sparse"]
            wait_until(lambda: admission.num_queued == 2)
            wait_until(lambda: bool(stack.workers["sparse"].state.bodies))
            (running_now,) = (body["user"] for body in stack.workers["sparse"].state.bodies)
            stack.servers.stop(url_of(stack, "sparse"))
            found = {name: future.result(timeout=15) for name, future in users.items()}
        del found[running_now]  # whose connection may be lost
        if fallback:
            assert [answer.status_code for answer in found.values()] == [200] * 2
            assert {answer.headers["X-Cast-Fallback"] for answer in found.values()} == {"sparse"}
        else:
            assert [answer.status_code for answer in found.values()] == [503] * 2
        assert (admission.num_running, admission.num_queued) == (0, 0)


def test_comparisons_queue_for_places_like_other_requests() -> None:
    with running(max_running=1, max_queued=8) as stack, ThreadPoolExecutor(8) as pool:
        for worker in stack.workers.values():
            worker.state.gate.clear()
        body = {"prompt": "x", "max_tokens": 3}
        asked = [pool.submit(stack.client.post, "/v1/compare", json=body) for _ in range(8)]
        admissions = stack.gateway.places.admissions.values()
        wait_until(lambda: sum(a.num_running + a.num_queued for a in admissions) == 8)
        for worker in stack.workers.values():
            worker.state.gate.set()
        assert [found.result().status_code for found in asked] == [200] * 8
        assert [worker.state.most_at_once for worker in stack.workers.values()] == [1, 1]
        assert num_requests(stack, "", 200, "/v1/compare") == 8


def test_who_was_at_a_replica_that_failed_is_asked_next_at_the_other_one() -> None:
    """However many wait, and it had a place already."""
    with (
        running(num_replicas=2, max_running=1, max_queued=2, health_interval_s=30) as stack,
        ThreadPoolExecutor(4) as pool,
    ):
        workers = (stack.workers["sparse"], stack.others["sparse"])
        for worker in workers:
            worker.state.gate.clear()
        admission = stack.gateway.places.admissions["sparse"]
        running_now = [pool.submit(stack.complete, model="sparse", user="first") for _ in range(2)]
        wait_until(lambda: all(worker.state.bodies for worker in workers))
        waiting = [pool.submit(stack.complete, model="sparse", user="later") for _ in range(2)]
        wait_until(lambda: admission.num_queued == 2)
        stack.servers.stop(url_of(stack, "sparse"))
        wait_until(lambda: len(workers[1].state.bodies) > 1 or admission.num_queued == 3)
        workers[1].state.gate.set()
        assert [each.result(timeout=15).status_code for each in running_now + waiting] == [200] * 4
        users = [body["user"] for body in workers[1].state.bodies]
        assert users == ["first", "first", "later", "later"]
        metrics = stack.metrics()
        up = [metrics["cast_replica_up", (("replica", r), ("variant", "sparse"))] for r in "01"]
        assert up == [0, 1]


def test_requests_that_only_queued_are_no_failures_of_a_worker() -> None:
    with (
        running(max_running=1, fallback="sparse=dense", health_interval_s=30) as stack,
        ThreadPoolExecutor(3) as pool,
    ):
        stack.workers["sparse"].state.gate.clear()
        asked = [pool.submit(stack.complete, model="sparse") for _ in range(3)]
        wait_until(lambda: stack.gateway.places.admissions["sparse"].num_queued == 2)
        stack.servers.stop(url_of(stack, "sparse"))
        statuses = [each.result(timeout=15).status_code for each in asked]
        assert statuses.count(200) >= 2  # the connection of the one that ran may be lost
        labels = {"from_variant": "sparse", "to_variant": "dense"}
        found = {
            reason: stack.metrics()[
                "cast_fallbacks_total", tuple(sorted({**labels, "reason": reason}.items()))
            ]
            for reason in ("broken", "down")
        }
        assert sum(found.values()) == statuses.count(200)
        assert found["down"] > 0  # of two, one may have had a place just before the last was down


def test_who_was_given_up_by_a_replica_keeps_its_turn() -> None:
    """Where the replica stays up, its place is free at once, and others wait for it."""
    with (
        running(num_replicas=2, max_running=1, health_interval_s=30) as stack,
        ThreadPoolExecutor(4) as pool,
    ):
        workers = (stack.workers["sparse"], stack.others["sparse"])
        for worker in workers:
            worker.state.gate.clear()
        workers[0].state.reason = "abort"
        admission = stack.gateway.places.admissions["sparse"]
        asked = [pool.submit(stack.complete, model="sparse", user="first") for _ in range(2)]
        wait_until(lambda: all(worker.state.bodies for worker in workers))
        asked += [pool.submit(stack.complete, model="sparse", user="later") for _ in range(2)]
        wait_until(lambda: admission.num_queued == 2)
        workers[0].state.gate.set()
        wait_until(lambda: len(workers[1].state.bodies) > 1 or admission.num_queued == 3)
        workers[1].state.gate.set()
        assert [each.result(timeout=15).status_code for each in asked] == [200] * 4
        assert [body["user"] for body in workers[1].state.bodies][:2] == ["first", "first"]


def test_bodies_are_bounded_in_sum() -> None:
    with (
        running(max_body_bytes=3000, max_held_body_bytes=3000) as stack,
        ThreadPoolExecutor(1) as pool,
    ):
        stack.workers["dense"].state.gate.clear()
        held = pool.submit(stack.complete, model="dense", prompt="x" * 2000)
        wait_until(lambda: bool(stack.workers["dense"].state.bodies))
        refused = stack.complete(model="sparse", prompt="x" * 2000)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_bytes")
        assert refused.headers["Retry-After"] == "1"
        assert stack.metrics()["cast_requests_shed_total", (("reason", "too_many_bytes"),)] == 1
        stack.workers["dense"].state.gate.set()
        assert held.result(timeout=15).status_code == 200
        assert stack.complete(model="sparse", prompt="x" * 2000).status_code == 200
        assert stack.gateway.bodies.num_held_bytes == 0
