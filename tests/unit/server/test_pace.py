"""How long a new request would wait."""

from mlflow_safeflavor.server.pace import Pace


class Clock:
    """Stands where it was put."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


def test_before_any_answer_nothing_is_known():
    assert Pace(Clock()).expected() == 0.0


def test_one_after_the_other_waits_for_all_before_it():
    clock = Clock()
    pace = Pace(clock)
    there = [pace.counted() for _ in range(3)]
    for request in there:
        request.__enter__()
    for request in there[:2]:
        clock.time += 2.0
        request.__exit__(None, None, None)
    assert pace.in_flight == 1
    assert pace.expected() == 4.0  # the one that is there, and the new one


def test_time_without_any_request_does_not_count():
    clock = Clock()
    pace = Pace(clock)
    for _ in range(5):
        clock.time += 1000.0
        with pace.counted():
            clock.time += 0.5
    assert pace.expected() == 0.5


def test_it_follows_a_change_and_forgets_one_that_was_slow():
    clock = Clock()
    pace = Pace(clock)
    for seconds in [40.0] + [0.1] * 200:
        with pace.counted():
            clock.time += seconds
    assert 0.1 <= pace.expected() < 0.2


def test_a_request_that_fails_counts_as_answered():
    pace = Pace(Clock())
    try:
        with pace.counted():
            raise ValueError
    except ValueError:
        pass
    assert pace.in_flight == 0
