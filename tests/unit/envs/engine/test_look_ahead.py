"""Work done ahead is the work asked for, in order, and bounded."""

import threading

import pytest

from envs.engine.look_ahead import LookAhead


def test_what_is_expected_is_done_ahead_within_the_bound():
    done, gate = [], threading.Event()

    def work(item):
        done.append(item)
        if item == 1:
            gate.set()
        return item * 10

    ahead = LookAhead(work, ahead=4, threads=1)
    ahead.expect([(f"k{i}", i, 2) for i in range(6)])
    assert gate.wait(10)
    # Two items of size 2 fit; the third starts when one is taken.
    assert ahead.take("k0", 0) == 0
    assert ahead.take("k1", 1) == 10
    assert done[:2] == [0, 1]
    assert [ahead.take(f"k{i}", i) for i in range(2, 6)] == [20, 30, 40, 50]
    assert sorted(done) == list(range(6))


def test_anything_else_is_done_when_taken_and_errors_come_with_it():
    def work(item):
        if item < 0:
            raise ValueError(f"bad {item}")
        return -item

    ahead = LookAhead(work, ahead=8, threads=2)
    ahead.expect([("a", -1, 1), ("huge", 3, 99), ("b", 4, 1)])
    with pytest.raises(ValueError, match="bad -1"):
        ahead.take("a", -1)
    assert ahead.take("other", 7) == -7
    assert ahead.take("huge", 3) == -3
    ahead.expect([])
    assert ahead.take("b", 4) == -4
    assert LookAhead(work, 8, threads=0).take("c", 5) == -5
