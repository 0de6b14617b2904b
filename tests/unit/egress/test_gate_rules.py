"""The packet filter's text, and how much of what it refuses is put on record."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hiverd.egress import guard
from hiverd.egress.gate import MARK, rules

TEXT = rules(tcp_port=15001, dns_port=15053)


def chain(name: str) -> list[str]:
    found = re.search(rf"chain {name} \{{(.*?)\n  \}}", TEXT, re.DOTALL)
    assert found is not None
    return [line.strip() for line in found[1].strip().splitlines()]


def test_what_leaves_is_refused_unless_it_is_the_sandboxs_own_or_comes_to_us() -> None:
    head, *lines = chain("way_out")
    assert head.endswith("policy drop;")
    assert lines[-1] == "goto refuse"
    assert [line for line in lines if "accept" in line] == [
        "ip daddr { 127.0.0.0/8, 11.0.0.2 } accept",
        "ip6 daddr { ::1, fd11::2 } accept",
        "ct status dnat accept",
        "ip daddr 11.0.0.3 ct direction reply accept",
    ]


def test_tcp_and_names_are_turned_to_our_ports_only() -> None:
    targets = re.findall(r"dnat ip to (\S+)", TEXT)
    assert targets == ["11.0.0.3:15053", "11.0.0.3:15001"]
    assert "th dport 53" in chain("way_in")[2], "names come first"


def test_only_marked_sockets_hear_what_was_turned() -> None:
    assert chain("to_us")[1] == f"ip daddr 11.0.0.3 ct direction original socket mark != {MARK} goto refuse"


def test_every_refusal_is_logged_before_it_is_answered() -> None:
    lines = chain("refuse")
    assert lines[0].startswith("log group")
    assert [line.split()[0] for line in lines[1:]] == ["meta", "reject"]
    assert not re.search(r"(?<!policy )\bdrop\b", TEXT), "nothing goes without a trace"


class Clock:
    now = 5.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_flood_is_recorded_up_to_the_budget_of_each_second(clock: Any) -> None:
    budget = guard._Budget(clock)
    taken = [budget.take() for _ in range(guard.RECORDS_PER_SECOND)]
    assert taken == [True] * guard.RECORDS_PER_SECOND
    assert not budget.take()
    assert budget.first_refusal()
    assert not budget.take()
    assert not budget.first_refusal()
    clock.now += 1
    assert budget.take()
