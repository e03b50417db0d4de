"""The life of a lease as histories of events: who gets the GPUs, when, and how they come back."""

from __future__ import annotations

import pytest

from gpuctl.protocol import Cancel, LeaseAcquire, LeaseRelease, LeaseRenew, Load, Reload, Unload
from gpuctld.fleet import effects, events
from gpuctld.fleet.events import Peer
from gpuctld.fleet.leases import PROBE_ANSWER_S, REMOTE_TTL_S
from gpuctld.fleet.workers import AWAITS_GPU, MAX_FUTILE_STARTS
from gpuctld.messages import LoadModel, Probe, ReloadModel, UnloadModel

GIB = 2**30


@pytest.fixture
def loaded(bench):
    bench.ask(Load(model="flux"))
    bench.work()
    return bench


def acquire(bench, pid=7, **options):
    """Ask for a lease; its id."""
    return bench.ask(LeaseAcquire(**options), client=str(pid).encode(), pid=pid)


def held(bench, **options):
    """A lease that is in force."""
    lease = acquire(bench, **options)
    bench.work()
    assert bench.reply(lease)["ok"]
    return lease


def state(bench, lease):
    found = bench.fleet.state.leases.get(lease)
    return None if found is None else str(found.state)


def died(bench, lease):
    bench.apply(events.HolderDied(lease))


def code(bench, request):
    return bench.reply(request)["error"]["code"]


# --- standing in line -------------------------------------------------------------------------


def test_clients_get_the_gpus_in_the_order_in_which_they_asked(loaded):
    first = held(loaded, pid=1)
    others = [acquire(loaded, pid=pid, wait_s=60) for pid in (2, 3, 4)]
    order = []
    current = first
    for _ in others:
        assert [state(loaded, lease) for lease in others if lease not in order].count("held") == 0
        died(loaded, current)
        loaded.work()
        current = next(lease for lease in others if state(loaded, lease) == "held")
        order.append(current)
    assert order == others


def test_a_lease_on_other_gpus_does_not_wait(loaded):
    held(loaded, pid=1, gpus=[0])
    second = acquire(loaded, pid=2, gpus=[1])
    loaded.work()
    assert state(loaded, second) == "held"


def test_overlapping_sets_keep_their_order(make_bench):
    bench = make_bench(3).all_up()
    first = held(bench, pid=1, gpus=[0, 1])
    second = acquire(bench, pid=2, gpus=[1, 2], wait_s=60)
    third = acquire(bench, pid=3, gpus=[2], wait_s=60)
    bench.work()
    assert [state(bench, each) for each in (second, third)] == ["waiting"] * 2
    died(bench, first)
    bench.work()
    assert [state(bench, each) for each in (second, third)] == ["held", "waiting"]


def test_who_does_not_wait_is_told_who_has_it(loaded):
    held(loaded, pid=1, command="python score.py")
    second = acquire(loaded, pid=2)
    assert code(loaded, second) == "leased"
    assert "python score.py" in loaded.reply(second)["error"]["message"]


def test_who_waited_long_enough_is_told(loaded):
    held(loaded, pid=1)
    second = acquire(loaded, pid=2, wait_s=5)
    loaded.wait(6)
    assert code(loaded, second) == "timeout"
    assert state(loaded, second) is None


def test_a_load_stands_in_line_behind_the_end_of_a_lease(loaded):
    lease = held(loaded, pid=1)
    died(loaded, lease)
    assert state(loaded, lease) == "reloading"
    load = loaded.ask(Load(model="sd"))
    done = loaded.work()
    assert loaded.reply(load)["ok"]
    assert [type(command) for _, command in done] == [ReloadModel] * 2 + [LoadModel] * 2


def test_more_than_the_card_has_is_refused_and_nothing_moves(loaded):
    lease = acquire(loaded, need_bytes=81 * GIB)
    assert code(loaded, lease) == "device_memory"
    assert not loaded.take(UnloadModel)
    assert loaded.states() == ["loaded"] * 2


@pytest.mark.parametrize("gpus", [[7], [0, 7]])
def test_an_unknown_gpu_is_refused_and_nothing_moves(loaded, gpus):
    lease = acquire(loaded, gpus=gpus)
    assert code(loaded, lease) == "unknown_gpu"
    assert not loaded.take(UnloadModel)


@pytest.mark.parametrize("sent", [1, 0])
def test_what_is_being_loaded_leaves_first_and_comes_back_after_it(bench, sent):
    """A load in sequence is under way, or has not sent anything yet."""
    load = bench.ask(Load(model="flux"))
    if sent:
        bench.answer_probes()
    lease = held(bench)
    assert bench.reply(load)["ok"]
    assert bench.states() == ["parked"] * 2
    bench.ask(LeaseRelease(lease=lease))
    bench.work()
    assert bench.states() == ["loaded"] * 2


def test_what_is_being_unloaded_does_not_come_back(loaded):
    loaded.ask(Unload())
    lease = held(loaded)
    loaded.ask(LeaseRelease(lease=lease))
    loaded.work()
    assert loaded.states() == ["parked"] * 2


# --- memory that must be free -----------------------------------------------------------------


def test_it_begins_when_the_driver_shows_the_memory(loaded):
    loaded.free = {0: 30 * GIB, 1: 80 * GIB}
    lease = acquire(loaded, need_bytes=40 * GIB, wait_s=10)
    loaded.work()
    assert state(loaded, lease) == "probing"
    loaded.free[0] = 50 * GIB
    loaded.wait(1)
    loaded.work()
    assert state(loaded, lease) == "held"


def test_memory_that_never_gets_free_ends_it_with_who_holds_it(loaded):
    loaded.free[0] = 30 * GIB
    loaded.foreign[0] = [{"pid": 99, "name": "trainer", "bytes": 50 * GIB}]
    lease = acquire(loaded, need_bytes=40 * GIB)
    loaded.work()
    assert code(loaded, lease) == "device_memory"
    assert "pid 99 trainer" in loaded.reply(lease)["error"]["message"]
    loaded.work()
    assert loaded.states() == ["loaded"] * 2


def test_who_holds_the_memory_is_said_also_when_the_wait_ends_before_the_answer(loaded):
    loaded.free[0] = 30 * GIB
    loaded.foreign[0] = [{"pid": 99, "name": "trainer", "bytes": 50 * GIB}]
    lease = acquire(loaded, need_bytes=40 * GIB, wait_s=10)
    loaded.work()
    for _ in range(12):
        loaded.wait(1)
        loaded.answer_probes()
    assert code(loaded, lease) == "device_memory"
    assert "pid 99 trainer" in loaded.reply(lease)["error"]["message"]


def test_a_worker_that_does_not_come_back_does_not_hold_it_for_ever(loaded):
    lease = acquire(loaded, need_bytes=GIB)
    for gpu, command in loaded.take(UnloadModel):
        loaded.finish(gpu, command)
    loaded.die(1)
    loaded.answer_probes()
    loaded.wait(PROBE_ANSWER_S + 1)
    assert code(loaded, lease) == "timeout"
    assert "gpu 1" in loaded.reply(lease)["error"]["message"]


def test_a_worker_that_comes_back_in_time_is_asked(loaded):
    lease = acquire(loaded, need_bytes=GIB, wait_s=60)
    for gpu, command in loaded.take(UnloadModel):
        loaded.finish(gpu, command)
    loaded.die(1)
    loaded.answer_probes()
    loaded.wait(2)
    loaded.take(Probe)
    loaded.hello(1)
    loaded.wait(1)
    loaded.work()
    assert state(loaded, lease) == "held"


# --- letting go -------------------------------------------------------------------------------


def test_a_release_brings_back_what_was_loaded(loaded):
    lease = held(loaded)
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.work()
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2
    assert state(loaded, lease) is None


def test_a_release_while_the_gpus_are_emptied_takes_effect_after_it(loaded):
    lease = acquire(loaded)
    unloads = loaded.take(UnloadModel)
    released = loaded.ask(LeaseRelease(lease=lease))
    assert code(loaded, lease) == "busy"
    for gpu, command in unloads:
        loaded.finish(gpu, command)
    loaded.work()
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2


def test_a_release_while_it_waits_for_memory(loaded):
    loaded.free[0] = 30 * GIB
    lease = acquire(loaded, need_bytes=40 * GIB, wait_s=60)
    loaded.work()
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.work()
    assert code(loaded, lease) == "busy"
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2


def test_a_second_release_is_told_that_it_ends_already(loaded):
    lease = held(loaded)
    loaded.ask(LeaseRelease(lease=lease))
    second = loaded.ask(LeaseRelease(lease=lease))
    assert code(loaded, second) == "busy"


def test_a_second_release_while_the_gpus_are_emptied_is_told_too_and_the_first_is_answered(loaded):
    lease = acquire(loaded)
    first, second = (loaded.ask(LeaseRelease(lease=lease)) for _ in range(2))
    assert code(loaded, second) == "busy"
    loaded.work()
    assert loaded.reply(first)["ok"]


@pytest.mark.parametrize("early", [True, False])
def test_a_release_waits_for_memory_as_long_as_it_says(loaded, early):
    lease = acquire(loaded) if early else held(loaded)
    loaded.free[0] = GIB
    released = loaded.ask(LeaseRelease(lease=lease, wait_s=2))
    for _ in range(4):
        loaded.work()
        loaded.wait(1)
    assert code(loaded, released) == "device_memory"
    assert loaded.states() == ["parked"] * 2


def test_a_release_answers_within_its_timeout_and_the_reload_goes_on(loaded):
    lease = held(loaded)
    released = loaded.ask(LeaseRelease(lease=lease, timeout_s=5))
    loaded.answer_probes()
    reloads = loaded.take(ReloadModel)
    loaded.wait(6)
    assert code(loaded, released) == "timeout"
    assert state(loaded, lease) is None
    for gpu, command in reloads:
        loaded.finish(gpu, command)
    assert loaded.states() == ["loaded"] * 2


def test_a_stranger_needs_force(loaded):
    lease = held(loaded)
    stranger = Peer(pid=9, uid=2000)
    request = LeaseRelease(lease=lease)
    loaded.apply(events.Requested(request=request, client=b"s", peer=stranger, blobs=()))
    assert code(loaded, request.id) == "bad_request"
    assert state(loaded, lease) == "held"
    forced = LeaseRelease(lease=lease, force=True)
    loaded.apply(events.Requested(request=forced, client=b"s", peer=stranger, blobs=()))
    loaded.work()
    assert loaded.reply(forced.id)["ok"]


@pytest.mark.parametrize("wait_s", [0, 60])
def test_a_stranger_cannot_cancel_it(loaded, wait_s):
    lease = held(loaded)
    if wait_s:
        lease = acquire(loaded, pid=8, wait_s=wait_s)
    before = state(loaded, lease)
    request = Cancel(target=lease)
    stranger = Peer(pid=9, uid=2000)
    loaded.apply(events.Requested(request=request, client=b"s", peer=stranger, blobs=()))
    assert code(loaded, request.id) == "bad_request"
    assert state(loaded, lease) == before
    assert not loaded.take(ReloadModel)


def test_a_stranger_cannot_renew_it(loaded):
    lease = held(loaded, ttl_s=60)
    loaded.wait(50)
    request = LeaseRenew(lease=lease)
    stranger = Peer(pid=9, uid=2000)
    loaded.apply(events.Requested(request=request, client=b"s", peer=stranger, blobs=()))
    assert code(loaded, request.id) == "bad_request"
    loaded.wait(20)
    assert state(loaded, lease) != "held", "it has run out"


def test_cancelling_the_request_withdraws_the_lease_with_an_answer(loaded):
    held(loaded, pid=1)
    second = acquire(loaded, pid=2, wait_s=60)
    loaded.ask(Cancel(target=second))
    assert code(loaded, second) == "cancelled"
    assert state(loaded, second) is None


def test_a_cancel_that_crosses_the_grant_gives_the_gpus_back(loaded):
    lease = held(loaded)
    loaded.ask(Cancel(target=lease))
    loaded.work()
    assert loaded.states() == ["loaded"] * 2
    assert state(loaded, lease) is None


# --- holders that end -------------------------------------------------------------------------


def test_a_holder_that_dies_while_it_waits_leaves_the_line(loaded):
    held(loaded, pid=1)
    second = acquire(loaded, pid=2, wait_s=60)
    died(loaded, second)
    assert state(loaded, second) is None


def test_a_holder_that_dies_while_the_gpus_are_emptied_gets_them_reloaded(loaded):
    lease = acquire(loaded)
    unloads = loaded.take(UnloadModel)
    died(loaded, lease)
    for gpu, command in unloads:
        loaded.finish(gpu, command)
    loaded.work()
    assert loaded.states() == ["loaded"] * 2
    assert state(loaded, lease) is None


def test_after_a_death_the_models_wait_for_the_other_programs_memory(loaded):
    lease = held(loaded)
    loaded.free = dict.fromkeys(loaded.free, GIB)
    loaded.foreign = {gpu: [{"pid": 99, "name": "child", "bytes": 70 * GIB}] for gpu in (0, 1)}
    died(loaded, lease)
    loaded.answer_probes()
    assert not loaded.take(ReloadModel)
    loaded.free = dict.fromkeys(loaded.free, 80 * GIB)
    loaded.wait(1)
    loaded.work()
    assert loaded.states() == ["loaded"] * 2


def test_memory_that_stays_taken_leaves_every_model_parked_with_the_reason(loaded):
    lease = held(loaded)
    loaded.free[0] = GIB
    loaded.foreign[0] = [{"pid": 99, "name": "child", "bytes": 70 * GIB}]
    died(loaded, lease)
    for _ in range(40):
        loaded.answer_probes()
        loaded.wait(1)
    loaded.work()
    assert loaded.states() == ["parked"] * 2, "never half of them"
    error = loaded.fleet.state.workers[0].holding("flux").error
    assert "pid 99 child" in error["message"]
    assert state(loaded, lease) is None


def test_a_worker_that_dies_under_a_lease_does_not_end_it(loaded):
    lease = held(loaded)
    loaded.die(0)
    loaded.wait(2)
    loaded.hello(0)
    loaded.work()
    assert state(loaded, lease) == "held"
    assert loaded.state(0) != "loaded"


def spawned(bench):
    """GPUs whose workers are started in this turn."""
    return [effect.gpu for effect in bench.effects if isinstance(effect, effects.Spawn)]


def test_nothing_of_ours_starts_on_a_gpu_that_another_program_has(loaded):
    lease = held(loaded)
    loaded.die(0)
    loaded.wait(70)
    assert spawned(loaded) == []
    worker = loaded.fleet.state.workers[0]
    assert (str(worker.state), worker.reason) == ("backoff", AWAITS_GPU)
    assert loaded.fleet.ready
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.tick()
    assert spawned(loaded) == [0]
    loaded.hello(0)
    loaded.work()
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2


def test_a_load_forced_onto_a_leased_gpu_starts_its_worker(loaded):
    held(loaded)
    loaded.die(0)
    forced = loaded.ask(Load(model="flux", gpus=[0], force=True))
    loaded.wait(70)
    assert spawned(loaded) == [0]
    loaded.hello(0)
    loaded.work()
    assert loaded.reply(forced)["ok"]


def test_who_forces_a_move_is_told_whose_the_gpus_are(loaded):
    lease = held(loaded, gpus=[1], command="score.py")
    forced = loaded.ask(Reload(force=True))
    loaded.work()
    [told] = loaded.reply(forced)["forced"]
    assert (told["id"], told["gpus"], told["holder"]["command"]) == (lease, [1], "score.py")
    assert loaded.states() == ["loaded"] * 2


# --- daemons that end -------------------------------------------------------------------------


def reboot(bench, make_bench, workers=2):
    """The next daemon with what this one remembers; its workers are not up yet."""
    fresh = make_bench(workers)
    fresh.now = bench.now + 5
    fresh.apply(events.Booted(bench.fleet.snapshot))
    return fresh


def watched(bench):
    return [
        (each.lease, each.pid) for each in bench.effects if isinstance(each, effects.WatchProcess)
    ]


def test_a_lease_goes_on_with_the_next_daemon(loaded, make_bench):
    lease = held(loaded, gpus=[0])
    fresh = reboot(loaded, make_bench)
    assert spawned(fresh) == [1], "nothing of ours on the other"
    assert watched(fresh) == [(lease, 7)]
    fresh.hello(1)
    fresh.work()
    assert fresh.fleet.ready
    assert fresh.states() == ["absent", "loaded"]
    assert code(fresh, fresh.ask(Load(model="flux", gpus=[0]))) == "leased"
    released = fresh.ask(LeaseRelease(lease=lease))
    fresh.tick()
    fresh.hello(0)
    fresh.work()
    assert fresh.reply(released)["ok"]
    assert fresh.states() == ["loaded"] * 2


def test_a_holder_that_died_with_the_daemon_leaves_the_models_to_the_next(loaded, make_bench):
    lease = held(loaded)
    fresh = reboot(loaded, make_bench)
    died(fresh, lease)
    fresh.tick()
    fresh.all_up()
    fresh.work()
    assert fresh.states() == ["loaded"] * 2
    assert state(fresh, lease) is None


@pytest.mark.parametrize("moment", ["while it begins", "while it ends"])
def test_a_lease_that_is_not_in_force_ends_with_the_daemon(loaded, make_bench, moment):
    lease = acquire(loaded)
    if moment == "while it ends":
        loaded.work()
        loaded.ask(LeaseRelease(lease=lease))
    else:
        [*_, (gpu, command)] = loaded.take(UnloadModel)
        loaded.finish(gpu, command)
    fresh = reboot(loaded, make_bench)
    assert state(fresh, lease) is None
    fresh.all_up()
    fresh.work()
    assert fresh.states() == ["loaded"] * 2


def test_what_a_lease_found_parked_stays_parked(loaded, make_bench):
    loaded.ask(Unload(gpus=[0]))
    loaded.work()
    held(loaded)
    fresh = reboot(loaded, make_bench)
    [(lease, _)] = watched(fresh)
    died(fresh, lease)
    fresh.tick()
    fresh.all_up()
    fresh.work()
    assert fresh.states() == ["parked", "loaded"]


def test_a_holder_that_did_not_hear_of_its_lease_asks_again_and_has_it(loaded, make_bench):
    request = LeaseAcquire(gpus=[0])
    loaded.ask(request, pid=7)
    loaded.work()
    fresh = reboot(loaded, make_bench)
    fresh.ask(request, client=b"new", pid=7)
    assert fresh.reply(request.id)["ok"]
    assert fresh.reply(request.id)["lease"]["state"] == "held"


def test_nobody_else_has_it_by_the_same_id(loaded, make_bench):
    request = LeaseAcquire(gpus=[0])
    loaded.ask(request, pid=7)
    loaded.work()
    fresh = reboot(loaded, make_bench)
    stranger = Peer(pid=9, uid=2000)
    fresh.apply(events.Requested(request=request, client=b"s", peer=stranger, blobs=()))
    assert code(fresh, request.id) == "bad_request"
    assert state(fresh, request.id) == "held"


def test_a_lease_with_a_time_to_live_has_it_once_more(loaded, make_bench):
    lease = held(loaded, ttl_s=30.0)
    loaded.wait(29)
    fresh = reboot(loaded, make_bench)
    assert watched(fresh) == []
    fresh.wait(29)
    assert state(fresh, lease) == "held"
    fresh.wait(2)
    assert state(fresh, lease) == "reloading"


@pytest.mark.parametrize(("gpus", "left"), [([0, 1], "held"), ([1], None)])
def test_a_gpu_that_the_next_daemon_has_not_is_nobodys(loaded, make_bench, gpus, left):
    lease = held(loaded, gpus=gpus)
    fresh = reboot(loaded, make_bench, workers=1)
    assert state(fresh, lease) == left
    died(fresh, lease)
    fresh.tick()
    fresh.all_up()
    fresh.work()
    assert fresh.states() == ["loaded"]


# --- workers that end -------------------------------------------------------------------------


def come_back(bench, gpu):
    """Its next process is up."""
    bench.wait(70)
    bench.hello(gpu)


def test_a_worker_that_dies_while_the_gpus_are_emptied_has_freed_its_own(loaded):
    lease = acquire(loaded)
    [_, (gpu, command)] = loaded.take(UnloadModel)
    loaded.die(0)
    assert state(loaded, lease) == "unloading"
    loaded.finish(gpu, command)
    assert loaded.reply(lease)["ok"]
    come_back(loaded, 0)
    loaded.work()
    assert loaded.states() == ["parked"] * 2, "the lease lives"
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.work()
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2


def test_what_is_needed_is_asked_of_the_worker_that_comes_back(loaded):
    lease = acquire(loaded, need_bytes=GIB, wait_s=120)
    [_, (gpu, command)] = loaded.take(UnloadModel)
    loaded.die(0)
    loaded.finish(gpu, command)
    loaded.answer_probes()
    assert state(loaded, lease) == "probing"
    come_back(loaded, 0)
    loaded.wait(1)
    loaded.work()
    assert state(loaded, lease) == "held"


def test_holder_and_worker_that_die_while_the_gpus_are_emptied(loaded):
    lease = acquire(loaded)
    [_, (gpu, command)] = loaded.take(UnloadModel)
    died(loaded, lease)
    loaded.die(0)
    loaded.finish(gpu, command)
    come_back(loaded, 0)
    loaded.work()
    assert loaded.states() == ["loaded"] * 2
    assert state(loaded, lease) is None


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_at_the_reload_after_a_lease_brings_the_model_all_the_same(
    loaded, deaths
):
    lease = held(loaded)
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.answer_probes()
    [_, (gpu, command)] = loaded.take(ReloadModel)
    loaded.finish(gpu, command)
    for _ in range(deaths):
        loaded.die(0)
        assert state(loaded, lease) == "reloading"
        come_back(loaded, 0)
    loaded.work()
    assert loaded.reply(released)["ok"]
    assert loaded.states() == ["loaded"] * 2
    assert state(loaded, lease) is None


def test_a_worker_that_keeps_dying_at_the_reload_does_not_hold_the_lease_for_ever(loaded):
    lease = held(loaded)
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.answer_probes()
    [_, (gpu, command)] = loaded.take(ReloadModel)
    loaded.finish(gpu, command)
    loaded.die(0)
    for _ in range(MAX_FUTILE_STARTS - 1):
        come_back(loaded, 0)
        loaded.die(0)
    assert state(loaded, lease) is None
    assert code(loaded, released) == "partial"
    assert "gpu 0 is failed" in loaded.reply(released)["error"]["message"]
    again = loaded.ask(Reload())
    loaded.hello(0)
    loaded.work()
    assert loaded.reply(again)["ok"]
    assert loaded.states() == ["loaded"] * 2


def test_a_stop_while_a_worker_is_waited_for_ends_the_lease(loaded):
    lease = held(loaded)
    released = loaded.ask(LeaseRelease(lease=lease))
    loaded.answer_probes()
    loaded.die(0)
    loaded.apply(events.Stopping())
    for gpu, command in loaded.take(ReloadModel):
        loaded.finish(gpu, command)
    assert not loaded.reply(released)["ok"]
    assert state(loaded, lease) is None


# --- time to live -----------------------------------------------------------------------------


def test_a_holder_without_a_pid_must_renew(loaded):
    lease = held(loaded, pid=0)
    loaded.wait(REMOTE_TTL_S - 1)
    loaded.ask(LeaseRenew(lease=lease))
    loaded.wait(REMOTE_TTL_S - 1)
    assert state(loaded, lease) == "held"
    loaded.wait(2)
    loaded.work()
    assert state(loaded, lease) is None
    assert loaded.states() == ["loaded"] * 2


def test_a_holder_with_a_pid_is_watched_instead(loaded):
    lease = acquire(loaded, pid=7)
    assert watched(loaded) == [(lease, 7)]
    loaded.work()
    loaded.wait(10 * REMOTE_TTL_S)
    assert state(loaded, lease) == "held"
