from __future__ import annotations

import signal

from gpuctl.protocol import Generate, Load, Reload, Unload
from gpuctl.residency import Tier
from gpuctld import catalog, config
from gpuctld.fleet import effects, events
from gpuctld.fleet.snapshot import Snapshot
from gpuctld.fleet.workers import FAULTS_S, MAX_FAULTS, SILENCE_S, STUCK_S
from gpuctld.messages import CancelTask, Fault, LoadModel, Probe, Probed, RunJob, Stop, UnloadModel


def signals(bench):
    return [e.signal for e in bench.effects if isinstance(e, effects.Signal)]


def spawned(bench):
    return [e.gpu for e in bench.effects if isinstance(e, effects.Spawn)]


def loaded(bench):
    bench.ask(Load(model="flux"))
    bench.work()
    return bench


def come_back(bench, gpu, seconds=2):
    bench.wait(seconds)
    assert spawned(bench) == [gpu]
    bench.hello(gpu)


def test_a_killed_worker_comes_back_with_its_model_from_the_host_copy(bench):
    loaded(bench)
    bench.die(0)
    come_back(bench, 0)
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    assert (gpu, command.tier) == (0, "device")
    assert command.layout is not None
    bench.finish(gpu, command)
    assert bench.states() == ["loaded", "loaded"]


def test_a_parked_model_comes_back_parked(bench):
    loaded(bench)
    bench.ask(Unload())
    bench.work()
    bench.die(1)
    come_back(bench, 1)
    [(_, command)] = bench.take(LoadModel)
    assert command.tier == "host"
    bench.finish(1, command)
    assert bench.states() == ["parked", "parked"]


def test_a_job_of_a_killed_worker_is_answered_once_and_not_run_again(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    bench.die(0)
    assert bench.reply(job)["error"]["code"] == "worker_lost"
    bench.take(RunJob)
    come_back(bench, 0)
    bench.work()
    assert bench.take(RunJob) == []


def test_an_unload_under_which_the_worker_dies_has_freed_the_gpu(bench):
    loaded(bench)
    id_ = bench.ask(Unload())
    bench.die(0)
    for gpu, command in bench.take(UnloadModel):
        if gpu == 1:
            bench.finish(gpu, command)
    assert bench.reply(id_)["ok"]
    come_back(bench, 0)
    bench.work()
    assert bench.states() == ["parked", "parked"]


def test_unload_while_a_worker_is_down_is_done_at_once(bench):
    loaded(bench)
    bench.die(0)
    id_ = bench.ask(Unload())
    bench.work()
    assert bench.reply(id_)["ok"]
    come_back(bench, 0)
    bench.work()
    assert bench.states() == ["parked", "parked"]


def test_reload_waits_for_a_worker_that_is_coming_back(bench):
    loaded(bench)
    bench.ask(Unload())
    bench.work()
    bench.die(0)
    id_ = bench.ask(Reload())
    come_back(bench, 0)
    bench.work()
    assert bench.reply(id_)["ok"]
    assert bench.states() == ["loaded", "loaded"]


def test_a_worker_that_dies_before_it_has_answered_a_probe_is_asked_again(bench):
    loaded(bench)
    bench.ask(Unload())
    bench.work()
    id_ = bench.ask(Reload())
    bench.take(Probe)
    bench.die(0)
    bench.say(1, Probed(task=id_, memory=bench._memory(1), foreign=[]))
    come_back(bench, 0)
    bench.work()
    assert bench.reply(id_)["ok"]
    assert bench.states() == ["loaded", "loaded"]


def test_backoff_doubles(bench):
    waits = []
    for _ in range(4):
        bench.die(0)
        worker = bench.fleet.state.workers[0]
        waits.append(worker.respawn_at - bench.now)
        bench.wait(waits[-1] + 0.01)
        bench.hello(0)
    for expected, wait in zip((1, 2, 4, 8), waits, strict=True):
        assert 0.8 * expected <= wait <= expected


def test_three_deaths_while_starting_are_the_end_until_somebody_asks(make_bench):
    bench = make_bench(1)
    for _ in range(3):
        bench.die(0, "left with status 1")
        bench.wait(10)
    assert bench.fleet.state.workers[0].state == "failed"
    bench.ask(Load(model="flux"))
    assert spawned(bench) == [0]


def test_a_worker_that_dies_while_its_models_come_back_brings_them_the_next_time(bench):
    loaded(bench)
    for _ in range(2):
        bench.die(0)
        come_back(bench, 0)
        bench.answer_probes()
    bench.work()
    assert bench.states() == ["loaded", "loaded"]


def test_three_deaths_by_one_model_are_the_end_though_others_load(bench):
    loaded(bench)
    bench.ask(Load(model="sd", gpus=[0]))
    bench.work()
    bench.die(0)
    for _ in range(3):
        come_back(bench, 0, seconds=4)
        bench.answer_probes()
        [(gpu, command)] = bench.take(LoadModel)
        bench.finish(gpu, command)
        bench.answer_probes()
        bench.die(0)
    assert bench.fleet.state.workers[0].state == "failed"


def test_a_silent_worker_is_killed(bench):
    bench.silence(SILENCE_S + 1)
    assert signals(bench) == [signal.SIGKILL, signal.SIGKILL]


def test_a_standstill_of_the_daemon_is_no_silence_of_the_workers(bench):
    bench.tick(3 * SILENCE_S)
    assert signals(bench) == []
    bench.silence(SILENCE_S + 1)
    assert set(signals(bench)) == {signal.SIGKILL}


def test_a_stuck_job_is_cancelled_then_terminated_then_killed(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    seen = []
    for _ in range(4):
        bench.wait(301 if not seen else 11)
        seen += [c.task for _, c in bench.take(CancelTask)] + signals(bench)
    assert seen[:3] == [job, signal.SIGTERM, signal.SIGKILL]


def test_freeing_a_gpu_always_succeeds(bench):
    loaded(bench)
    id_ = bench.ask(Unload(gpus=[0]))
    bench.wait(31)
    assert signals(bench) == [signal.SIGTERM]
    bench.wait(3)
    assert signals(bench) == [signal.SIGKILL]
    bench.die(0)
    assert bench.reply(id_)["ok"]


def test_a_sticky_error_is_told_at_once_and_the_worker_replaced(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    bench.say(0, Fault(task=job, error={"code": "gpu_fault", "message": "bad", "hint": ""}))
    assert bench.reply(job)["error"]["code"] == "gpu_fault"
    assert bench.fleet.state.workers[0].state == "stopping"
    bench.die(0, "left with status 70")
    come_back(bench, 0)
    bench.work()
    assert bench.states() == ["loaded", "loaded"]


def gpu_fault(bench, gpu, recovery=""):
    """The worker reports a sticky error, and its process ends."""
    error = {"code": "gpu_fault", "message": "illegal memory access", "hint": ""}
    bench.say(gpu, Fault(task="", error=error, recovery=recovery))
    bench.die(gpu, "left with status 70")


def worker(bench, gpu):
    return bench.fleet.state.workers[gpu]


def test_many_gpu_faults_in_a_short_time_quarantine_the_device_and_the_others_go_on(bench):
    loaded(bench)
    for _ in range(MAX_FAULTS - 1):
        gpu_fault(bench, 0)
        bench.wait(60)
        bench.hello(0)
        bench.work()
    gpu_fault(bench, 0)
    bench.wait(3600)
    assert str(worker(bench, 0).state) == "quarantined"
    assert "illegal memory access" in worker(bench, 0).reason
    again = bench.ask(Reload(model="flux"))
    bench.work()
    assert not bench.reply(again)["ok"]
    assert "quarantined" in bench.reply(again)["workers"][0]["error"]["message"]
    assert not spawned(bench), "it takes more than a reload"
    job = bench.ask(Generate(model="flux"))
    bench.work()
    assert bench.reply(job)["gpu"] == 1


def test_rare_gpu_faults_do_not_quarantine(bench):
    for _ in range(2 * MAX_FAULTS):
        gpu_fault(bench, 0)
        bench.wait(60)
        bench.hello(0)
        bench.wait(FAULTS_S)
    assert str(worker(bench, 0).state) == "ready"


def test_a_device_that_the_driver_wants_reset_is_quarantined_at_once(bench):
    gpu_fault(bench, 0, "a reset of the GPU")
    bench.wait(3600)
    assert str(worker(bench, 0).state) == "quarantined"
    assert "a reset of the GPU" in worker(bench, 0).reason
    assert not spawned(bench)


def test_a_job_that_only_a_quarantined_device_could_do_is_answered(bench):
    loaded(bench)
    bench.ask(Generate(model="flux", gpu=0))
    waiting = bench.ask(Generate(model="flux", gpu=0))
    gpu_fault(bench, 0, "a reset of the GPU")
    bench.tick()
    assert bench.reply(waiting)["error"]["code"] == "worker_lost"


def test_a_process_that_survives_a_kill_makes_its_device_stuck_until_it_ends(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    pid = worker(bench, 0).pid
    bench.silence(SILENCE_S + 1)
    bench.wait(STUCK_S + 1)
    assert str(worker(bench, 0).state) == "stuck"
    assert f"pid {pid}" in worker(bench, 0).reason
    assert bench.reply(job)["error"]["code"] == "worker_lost"
    moved = bench.ask(Unload(gpus=[0]))
    assert not bench.reply(moved)["ok"], "nobody says that its memory is free"
    bench.wait(3600)
    assert 0 not in spawned(bench), "no second process on the device"
    bench.die(0)
    come_back(bench, 0)
    bench.work()
    assert bench.states()[0] == "parked", "as the unload has asked for"


def test_an_unload_of_a_process_that_gets_stuck_is_not_said_to_have_freed_anything(bench):
    loaded(bench)
    id_ = bench.ask(Unload(gpus=[0]))
    bench.take(UnloadModel)
    bench.silence(SILENCE_S + 1)
    bench.wait(STUCK_S + 1)
    assert str(worker(bench, 0).state) == "stuck"
    assert not bench.reply(id_)["ok"]


def test_a_stuck_process_does_not_hold_up_a_stop(bench):
    bench.silence(SILENCE_S + 1)
    bench.die(1)
    bench.wait(STUCK_S + 1)
    bench.apply(events.Stopping())
    bench.tick()
    assert bench.fleet.stopped


def test_a_worker_that_ignores_the_stop_is_killed(bench):
    bench.apply(events.Stopping())
    seen = []
    for _ in range(15):
        bench.wait(1)
        seen += signals(bench)
    assert seen == [signal.SIGKILL, signal.SIGKILL]


def test_models_that_do_not_fit_any_more_come_back_parked_with_the_reason(bench):
    loaded(bench)
    bench.die(0)
    bench.free[0] = 0
    come_back(bench, 0)
    bench.work()
    assert bench.states() == ["parked", "loaded"]


def test_restored_models_are_loaded_after_the_start(make_bench):
    bench = make_bench(2)
    wanted = {0: {"flux": Tier.DEVICE, "gone": Tier.HOST}, 9: {"flux": Tier.DEVICE}}
    bench.apply(events.Booted(Snapshot(wanted=wanted)))
    bench.all_up()
    bench.work()
    assert bench.states() == ["loaded", "absent"]


def test_a_worker_that_died_before_its_first_hello_is_still_awaited(make_bench):
    bench = make_bench(workers=1)
    bench.die(0)
    assert not bench.fleet.ready
    come_back(bench, 0)
    assert bench.fleet.ready


def test_stopping_drains_and_ends_the_workers(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    [(_, run)] = bench.take(RunJob)
    waiting = bench.ask(Generate(model="flux", gpu=0))
    bench.apply(events.Stopping())
    assert bench.reply(waiting)["error"]["code"] == "cancelled"
    bench.wait(0.1)
    assert [gpu for gpu, _ in bench.take(Stop)] == [1]
    late = bench.ask(Load(model="flux"))
    assert bench.reply(late)["error"]["code"] == "busy"
    bench.finish(0, run)
    assert bench.reply(job)["ok"]
    bench.wait(0.1)
    assert [gpu for gpu, _ in bench.take(Stop)] == [0]
    bench.die(0)
    bench.die(1)
    assert bench.fleet.stopped


def test_a_stop_waits_for_a_load_only_so_long(make_bench):
    bench = make_bench(1).all_up()
    bench.ask(Load(model="flux"))
    bench.answer_probes()
    assert bench.take(LoadModel)
    bench.apply(events.Stopping())
    sent = {}
    for second in range(1, 23):
        bench.wait(1)
        sent[second] = [*bench.take(CancelTask), *signals(bench)]
    assert [second for second, each in sent.items() if each] == [10, 20, 22]
    assert sent[20] + sent[22] == [signal.SIGTERM, signal.SIGKILL]


def test_a_stop_does_not_wait_for_a_worker_that_hangs_in_its_start(make_bench):
    bench = make_bench(1)
    bench.apply(events.Spawned(0, 100))
    bench.apply(events.Stopping())
    seen = []
    for _ in range(12):
        bench.wait(1)
        seen += signals(bench)
    assert seen == [signal.SIGKILL]
    bench.die(0)
    assert bench.fleet.stopped


def test_a_model_that_leaves_the_catalog_leaves_the_workers(bench):
    loaded(bench)
    fresh = config.parse('[models.sd]\npath="/m"\n')
    bench.apply(events.Reconfigured(catalog.from_config(fresh), {}))
    bench.work()
    assert bench.states() == ["absent", "absent"]
