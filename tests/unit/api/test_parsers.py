"""Who is taken for an old client, and who is not."""

from __future__ import annotations

import pytest

from hiverd.api.parsers import ParserWatch

START = b'{"id":1,"type":"system.start"}'
EXEC = b'{"id":2,"type":"exec.request"}'
CHANGED = b'{"id":3,"type":"system.config-changed"}'


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("sent", "left_after", "back_at", "back_after", "old"),
    [
        ([(1, START)], 0.01, 0, 0.2, True),
        ([(1, START), (2, EXEC)], 0.01, 0, 0.8, True),
        ([(2, EXEC), (3, CHANGED)], 0.01, 2, 0.2, True),
        ([(2, EXEC), (3, CHANGED)], 0.01, 3, 0.2, False),  # it has read the new kind
        ([(1, START)], 0.01, 1, 0.2, False),
        ([(1, START)], 10.0, 0, 0.2, False),  # it went on reading
        ([(1, START)], 0.01, 0, 0.01, False),  # at once: another reader, not a second try
        ([(1, START)], 0.01, 0, 60.0, False),
        ([(2, EXEC)], 0.01, 2, 0.2, False),
        ([], 0.01, 0, 0.2, False),
    ],
)
def test_an_old_client_comes_back_for_what_follows_the_last_it_could_read(sent, left_after, back_at, back_after, old):
    time = Time()
    watch = ParserWatch(time)
    trial = watch.connection("s", 0)
    for event_id, body in sent:
        trial.sent(event_id, body)
    time.now += left_after
    trial.client_left()
    time.now += back_after
    assert watch.is_old("other", back_at) is False
    assert watch.is_old("s", back_at) is old


def test_memory_is_bounded():
    watch = ParserWatch()
    for number in range(5000):
        watch.failed(str(number), 0)
    assert len(watch._failures) == 1000
