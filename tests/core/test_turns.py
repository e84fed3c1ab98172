import threading
import time

import pytest

from qwen3vl_disagg.core.turns import Turns


def test_it_goes_to_whoever_waited_longest():
    turns, order, started = Turns(), [], threading.Barrier(2)

    def eager():
        started.wait(5)
        for _ in range(5):
            with turns:
                order.append("eager")
                time.sleep(0.02)

    def other():
        started.wait(5)
        for _ in range(3):
            time.sleep(0.005)  # asks while the other one has it
            with turns:
                order.append("other")
                time.sleep(0.02)

    threads = [threading.Thread(target=body) for body in (eager, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order[:6].count("other") == 3, order


def test_one_at_a_time_and_nobody_is_forgotten():
    turns, inside, done = Turns(), 0, []

    def body(number: int) -> None:
        nonlocal inside
        for _ in range(50):
            with turns:
                inside += 1
                assert inside == 1
                inside -= 1
        done.append(number)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(done) == list(range(8))


def test_given_back_when_the_body_fails():
    turns = Turns()
    for _ in range(2):
        with pytest.raises(KeyError), turns:
            raise KeyError
