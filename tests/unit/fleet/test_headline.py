from gpuctl.protocol import Load
from gpuctld.fleet import events, report
from gpuctld.messages import Progress


def headline(bench):
    return report.headline(bench.fleet.state)


def test_it_counts_workers_and_names_models(bench):
    assert headline(bench) == "2 workers, models: none"


def test_it_tells_how_far_a_move_is(bench):
    bench.ask(Load(model="flux"))
    assert headline(bench) == "loading flux on gpu 0, 1, 0 %"
    task = bench.sent[-1][1].task
    bench.say(bench.sent[-1][0], Progress(task=task, done=3, total=4))
    assert headline(bench) == "loading flux on gpu 0, 1, 38 %"


def test_it_says_that_it_stops(bench):
    bench.apply(events.Stopping())
    assert headline(bench) == "stopping"
