"""Giving CUDA contexts back, and taking them again, as histories of events."""

from __future__ import annotations

from gpuctl.protocol import LeaseAcquire, LeaseRelease, Load, Reload, Unload
from gpuctl.residency import Tier
from gpuctld.fleet import events
from gpuctld.fleet.snapshot import Snapshot
from gpuctld.messages import Done, Failed, ReloadModel, Suspend, Suspended, UnloadModel, Woken

GIB = 2**30
CONTEXT_BYTES = GIB // 2


def parked(bench):
    bench.ask(Load(model="flux"))
    bench.work()
    bench.ask(Unload())
    bench.work()
    return bench


def suspend(bench, gpu, command):
    bench.say(gpu, Suspended(context_bytes=CONTEXT_BYTES))
    bench.say(gpu, Done(task=command.task, result={"freed_bytes": CONTEXT_BYTES}))


def suspended(bench):
    parked(bench)
    bench.ask(Unload(suspend=True))
    go_to_sleep(bench)
    return bench


def go_to_sleep(bench):
    """Whoever is told to."""
    commands = bench.take(Suspend)
    for gpu, command in commands:
        suspend(bench, gpu, command)
    return [gpu for gpu, _ in commands]


def replace(bench, gpu):
    """Its process dies and the next one says hello."""
    bench.die(gpu)
    bench.wait(2)
    bench.hello(gpu)
    assert not bench.take(Suspend), "its models come first"
    bench.work()


def worker_states(bench):
    return [str(worker.state) for worker in bench.fleet.state.workers.values()]


def test_the_context_goes_after_the_models(bench):
    bench.ask(Load(model="flux"))
    bench.work()
    id_ = bench.ask(Unload(suspend=True))
    unloads = bench.take(UnloadModel)
    assert not bench.take(Suspend)
    for gpu, command in unloads:
        bench.finish(gpu, command)
    go_to_sleep(bench)
    reply = bench.reply(id_)
    assert reply["ok"]
    contexts = [row for row in reply["workers"] if not row["model"]]
    assert [(row["state"], row["tier"]) for row in contexts] == [("suspended", "host")] * 2
    assert [row["freed_bytes"] for row in contexts] == [CONTEXT_BYTES] * 2
    assert worker_states(bench) == ["suspended"] * 2


def test_a_device_with_another_model_on_it_keeps_its_context(bench):
    bench.ask(Load(model="flux"))
    bench.ask(Load(model="sd"))
    bench.work()
    id_ = bench.ask(Unload(model="flux", suspend=True))
    bench.work()
    reply = bench.reply(id_)
    assert not bench.take(Suspend)
    assert reply["error"]["code"] == "partial"
    assert bench.states("flux") == ["parked"] * 2
    assert "sd is loaded" in reply["error"]["message"]


def test_a_refusal_leaves_the_models_parked_and_says_so(bench):
    parked(bench)
    id_ = bench.ask(Unload(suspend=True))
    refused = {"code": "suspend_refused", "message": "the driver is too old", "hint": ""}
    for gpu, command in bench.take(Suspend):
        bench.say(gpu, Failed(task=command.task, error=refused))
    reply = bench.reply(id_)
    assert not reply["ok"]
    assert bench.states() == ["parked"] * 2
    assert worker_states(bench) == ["ready"] * 2
    assert [row["error"] for row in reply["workers"] if not row["model"]] == [refused] * 2


def test_suspending_twice_does_nothing_the_second_time(bench):
    suspended(bench)
    id_ = bench.ask(Unload(suspend=True))
    assert bench.reply(id_)["ok"]
    assert not bench.take(Suspend)


def test_a_reload_wakes_the_worker(bench):
    suspended(bench)
    id_ = bench.ask(Reload())
    bench.answer_probes()
    for gpu, command in bench.take(ReloadModel):
        bench.say(gpu, Woken())
        bench.finish(gpu, command)
    assert bench.reply(id_)["ok"]
    assert worker_states(bench) == ["ready"] * 2
    assert bench.states() == ["loaded"] * 2


def test_the_context_counts_as_memory_that_a_reload_needs(bench):
    suspended(bench)
    bench.free[1] = 4 * GIB + CONTEXT_BYTES // 2  # the model alone would fit
    id_ = bench.ask(Reload())
    bench.answer_probes()
    assert bench.reply(id_)["error"]["code"] == "device_memory"
    assert bench.states() == ["parked"] * 2


def test_a_suspended_worker_that_falls_silent_is_killed(bench):
    suspended(bench)
    bench.tick(11.0)
    bench.die(0)
    assert worker_states(bench)[0] == "backoff"


def test_a_worker_that_dies_while_it_suspends_has_freed_everything(bench):
    parked(bench)
    id_ = bench.ask(Unload(suspend=True))
    [(first, command), (second, _)] = bench.take(Suspend)
    suspend(bench, first, command)
    bench.die(second)
    assert bench.reply(id_)["ok"]


def test_a_worker_that_dies_suspended_is_suspended_again(bench):
    suspended(bench)
    replace(bench, 1)
    assert go_to_sleep(bench) == [1]
    assert bench.states() == ["parked"] * 2
    assert worker_states(bench) == ["suspended"] * 2


def test_a_worker_without_a_model_is_suspended_again_as_well(bench):
    bench.ask(Unload(suspend=True))
    go_to_sleep(bench)
    bench.die(0)
    bench.wait(2)
    bench.hello(0)
    assert go_to_sleep(bench) == [0]


def test_a_worker_that_is_away_is_suspended_when_it_is_back(bench):
    parked(bench)
    bench.die(0)
    assert bench.ask(Unload(suspend=True))
    assert go_to_sleep(bench) == [1]
    bench.wait(2)
    bench.hello(0)
    bench.work()
    assert go_to_sleep(bench) == [0]


def test_a_worker_that_was_woken_stays_awake(bench):
    suspended(bench)
    bench.ask(Reload())
    bench.work()
    bench.ask(Unload())
    bench.work()
    replace(bench, 0)
    assert go_to_sleep(bench) == []


def test_a_reload_that_waits_for_a_worker_finds_it_awake(bench):
    suspended(bench)
    bench.die(0)
    id_ = bench.ask(Reload(gpus=[0]))
    bench.wait(2)
    bench.hello(0)
    bench.work()
    assert go_to_sleep(bench) == []
    assert bench.reply(id_)["ok"]
    assert bench.states() == ["loaded", "parked"]


def test_workers_are_suspended_again_after_a_restart_of_the_daemon(bench, make_bench):
    suspended(bench)
    bench.ask(Load(model="flux", gpus=[1]))
    bench.work()
    kept = bench.fleet.snapshot
    assert kept == Snapshot(
        wanted={0: {"flux": Tier.HOST}, 1: {"flux": Tier.DEVICE}}, suspended=[0]
    )
    after = make_bench()
    after.apply(events.Booted(kept))
    after.all_up()
    after.work()
    assert go_to_sleep(after) == [0]
    assert after.states() == ["parked", "loaded"]


def test_a_lease_suspends_and_its_end_wakes(bench):
    bench.ask(Load(model="flux"))
    bench.work()
    lease = bench.ask(LeaseAcquire(suspend=True))
    bench.work()
    go_to_sleep(bench)
    assert bench.reply(lease)["ok"]
    bench.ask(LeaseRelease(lease=lease))
    bench.answer_probes()
    for gpu, command in bench.take(ReloadModel):
        bench.say(gpu, Woken())
        bench.finish(gpu, command)
    assert bench.states() == ["loaded"] * 2
    assert worker_states(bench) == ["ready"] * 2
