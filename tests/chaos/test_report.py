"""docs/reliability.md takes in new runs and keeps the others."""

from __future__ import annotations

import pytest

from tests.chaos import report


def found(name, count, **more):
    nothing = {"wrongs": [], "took": "", "took_s": [], "bound_s": None, "status_s": []}
    about = {"what": "Something.", "command": f"attack {name}", "date": "today", "host": "here"}
    figures = {"requests": 0, "growth_mib_per_h": None, "memory_mib": [1, 2], "seconds": 60}
    return {"scenario": name, "count": count, **nothing, **about, **figures, **more}


def rows(page):
    return [line for line in page.splitlines() if line.startswith(("| old", "| new", "| other"))]


def test_a_run_takes_the_place_of_an_earlier_one_and_the_others_stay():
    before = report.updated("", [found("old", 10), found("other", 20)])
    after = report.updated(before, [found("new", 30), found("old", 40)])
    assert [row.split("|")[1:3] for row in rows(after)] == [
        [" old ", " 40 "],
        [" other ", " 20 "],
        [" new ", " 30 "],
    ]
    assert after.count("**old**") == after.count("**other**") == after.count("**new**") == 1
    assert rows(after)[1] in before


def test_nothing_new_changes_nothing():
    page = report.updated("", [found("old", 10)])
    assert report.updated(page, []) == page


@pytest.mark.parametrize(("count", "below"), [(10, "30 %"), (1_000, "0.3 %"), (10**7, "0.00003 %")])
def test_what_the_failures_are_below_has_no_exponent(count, below):
    [row] = rows(report.updated("", [found("old", count)]))
    assert f" {below} " in row


def test_a_failure_is_counted():
    [row] = rows(report.updated("", [found("old", 10, wrongs=["a job ran twice"])]))
    assert row.split("|")[3:5] == [" 1 ", " - "]
