from __future__ import annotations

import pytest

from gpuctl.protocol import Cancel, Generate, Load, LoraAdd, LoraRemove, Phase, Reload, Unload
from gpuctld.fleet import effects
from gpuctld.messages import ChangeAdapter, Done, LoadModel, Probe, ReloadModel, RunJob, UnloadModel

GIB = 2**30


def loaded(bench, model="flux"):
    id_ = bench.ask(Load(model=model))
    bench.work()
    assert bench.reply(id_)["ok"]
    return bench


def parked(bench, model="flux"):
    loaded(bench, model)
    bench.ask(Unload(model=model))
    bench.work()
    return bench


def test_a_first_load_goes_to_one_worker_after_the_other(make_bench):
    bench = make_bench(3).all_up()
    id_ = bench.ask(Load(model="flux"))
    bench.answer_probes()
    for expected in range(3):
        [(gpu, command)] = bench.take(LoadModel)
        assert gpu == expected
        assert (command.layout is None) == (gpu == 0), "only the first worker reads the disk"
        bench.finish(gpu, command)
    assert bench.states() == ["loaded"] * 3
    assert [row["gpu"] for row in bench.reply(id_)["workers"]] == [0, 1, 2]


def test_a_parallel_first_load_still_reads_the_disk_once(make_bench):
    bench = make_bench(3).all_up()
    bench.ask(Load(model="flux", serial=False))
    bench.answer_probes()
    [(first, command)] = bench.take(LoadModel)
    bench.finish(first, command)
    rest = bench.take(LoadModel)
    assert [gpu for gpu, _ in rest] == [1, 2]
    assert all(command.layout is not None for _, command in rest)


def test_unload_and_reload_are_sent_to_all_at_once(make_bench):
    bench = loaded(make_bench(4).all_up())
    bench.ask(Unload())
    assert [gpu for gpu, _ in bench.take(UnloadModel)] == [0, 1, 2, 3]


def test_reload_is_a_broadcast_with_a_share_of_the_transfer_for_each(make_bench):
    bench = parked(make_bench(4).all_up())
    bench.ask(Reload())
    bench.answer_probes()
    sent = bench.take(ReloadModel)
    assert [command.fanout["rank"] for _, command in sent] == [0, 1, 2, 3]


def test_reload_without_fanout_or_in_sequence_copies_plainly(make_bench):
    for request in (Reload(fanout=False), Reload(serial=True)):
        bench = parked(make_bench(2).all_up())
        bench.ask(request)
        bench.answer_probes()
        assert all(command.fanout is None for _, command in bench.take(ReloadModel))


def test_load_of_a_parked_model_is_a_parallel_reload(bench):
    parked(bench)
    bench.ask(Load(model="flux"))
    bench.answer_probes()
    assert [gpu for gpu, _ in bench.take(ReloadModel)] == [0, 1]


@pytest.mark.parametrize(
    ("request_", "state"),
    [(Load(model="flux"), "loaded"), (Reload(), "loaded")],
)
def test_already_so_is_ok_and_sends_nothing(bench, request_, state):
    loaded(bench)
    bench.sent.clear()
    id_ = bench.ask(request_)
    assert bench.reply(id_)["ok"]
    assert {row["state"] for row in bench.reply(id_)["workers"]} == {state}
    assert bench.sent == []


def test_unload_of_a_model_that_is_nowhere_is_ok(bench):
    id_ = bench.ask(Unload(model="flux"))
    assert bench.reply(id_)["ok"]
    assert {row["state"] for row in bench.reply(id_)["workers"]} == {"absent"}


def test_one_failing_worker_leaves_the_others_right(bench):
    for request, kind, before in (
        (Load(model="flux", serial=False), LoadModel, "absent"),
        (Unload(), UnloadModel, "loaded"),
        (Reload(), ReloadModel, "parked"),
    ):
        id_ = bench.ask(request)
        bench.answer_probes()
        while sent := bench.take(kind):
            for gpu, command in sent:
                (bench.fail if gpu == 1 else bench.finish)(gpu, command)
        reply = bench.reply(id_)
        assert not reply["ok"]
        assert reply["error"]["code"] == "partial"
        assert [row["error"] is None for row in reply["workers"]] == [True, False]
        assert bench.state(1) == before
        bench.ask(type(request)(model="flux"))
        bench.work()


def test_fail_fast_does_not_try_the_rest(make_bench):
    bench = make_bench(3).all_up()
    id_ = bench.ask(Load(model="flux", fail_fast=True))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.fail(gpu, command)
    assert bench.take(LoadModel) == []
    assert "not tried" in bench.reply(id_)["workers"][2]["error"]["message"]


def test_without_fail_fast_the_next_one_is_tried(make_bench):
    bench = make_bench(2).all_up()
    bench.ask(Load(model="flux"))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.fail(gpu, command)
    assert [gpu for gpu, _ in bench.take(LoadModel)] == [1]


def test_an_operation_waits_for_an_earlier_one_on_the_same_workers(bench):
    loaded(bench)
    bench.ask(Unload(gpus=[0]))
    bench.ask(Reload(gpus=[0, 1]))
    assert [type(c) for _, c in bench.take(UnloadModel, ReloadModel, Probe)] == [UnloadModel]


def test_operations_on_other_workers_go_side_by_side(bench):
    loaded(bench)
    bench.ask(Unload(gpus=[0]))
    bench.ask(Unload(gpus=[1]))
    assert [gpu for gpu, _ in bench.take(UnloadModel)] == [0, 1]


def test_unload_waits_for_the_running_job(bench):
    loaded(bench)
    bench.ask(Generate(model="flux", gpu=0))
    [(gpu, job)] = bench.take(RunJob)
    bench.ask(Unload())
    assert [gpu for gpu, _ in bench.take(UnloadModel)] == [1]
    bench.finish(gpu, job)
    assert [gpu for gpu, _ in bench.take(UnloadModel)] == [0]


def test_unload_abort_cancels_the_running_job(bench):
    loaded(bench)
    job = bench.ask(Generate(model="flux", gpu=0))
    bench.ask(Unload(mode="abort"))
    assert bench.cancelled() == [job]


def test_a_reload_that_does_not_fit_on_one_gpu_moves_none(bench):
    parked(bench)
    bench.free[1] = GIB
    bench.foreign[1] = [{"pid": 4242, "name": "python", "bytes": 79 * GIB}]
    id_ = bench.ask(Reload())
    bench.answer_probes()
    assert bench.take(ReloadModel) == []
    reply = bench.reply(id_)
    assert reply["error"]["code"] == "device_memory"
    assert "pid 4242 python (79.0 GiB)" in reply["workers"][1]["error"]["message"]
    assert bench.states() == ["parked", "parked"]


def test_a_reload_may_wait_until_it_fits(bench):
    parked(bench)
    bench.free[0] = GIB
    id_ = bench.ask(Reload(wait_s=60))
    bench.answer_probes()
    assert id_ not in bench.answers
    bench.free[0] = 80 * GIB
    bench.wait(0.2)
    bench.work()
    assert bench.reply(id_)["ok"]


def test_a_reload_gives_up_when_the_wait_is_over(bench):
    parked(bench)
    bench.free[0] = GIB
    id_ = bench.ask(Reload(wait_s=1))
    for _ in range(12):
        bench.answer_probes()
        bench.wait(0.2)
    assert bench.reply(id_)["error"]["code"] == "device_memory"


def test_a_second_model_that_does_not_fit_says_what_to_unload(bench):
    loaded(bench)
    bench.fleet.state.layouts["sd"] = {"slab_bytes": 100 * GIB}
    id_ = bench.ask(Load(model="sd"))
    bench.work()
    error = bench.reply(id_)["error"]
    assert "flux (4.0 GiB)" in error["message"]
    assert error["hint"] == "gpuctl unload flux --gpu 0"


def test_dropping_the_last_copy_releases_it_on_the_host(bench):
    loaded(bench)
    bench.ask(Unload(to="disk", gpus=[0]))
    bench.work()
    assert "flux" in bench.fleet.state.layouts
    bench.ask(Unload(to="disk", gpus=[1]))
    released = []
    while sent := bench.take(UnloadModel):
        for gpu, command in sent:
            bench.finish(gpu, command)
            released += [e for e in bench.effects if isinstance(e, effects.ReleaseCopy)]
    assert [effect.model for effect in released] == ["flux"]
    assert bench.states() == ["absent", "absent"]


def test_a_client_deadline_gives_a_timeout_row_and_a_late_answer_still_counts(bench):
    id_ = bench.ask(Load(model="flux", gpus=[0], timeout_s=5))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.wait(6)
    assert bench.reply(id_)["workers"][0]["error"]["code"] == "timeout"
    bench.finish(gpu, command)
    assert bench.state(0) == "loaded"


@pytest.mark.parametrize("end", ["fail", "die"])
def test_a_first_load_that_fails_gives_the_host_copy_back(bench, end):
    bench.ask(Load(model="flux", gpus=[0]))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.fail(gpu, command) if end == "fail" else bench.die(gpu)
    assert effects.ReleaseCopy("flux") in bench.effects


def test_a_load_from_the_host_copy_that_fails_leaves_it(bench):
    loaded(bench)
    bench.ask(Unload(model="flux", gpus=[1], to="disk"))
    bench.work()
    bench.ask(Load(model="flux"))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.fail(gpu, command)
    assert effects.ReleaseCopy("flux") not in bench.effects


def test_a_cancelled_operation_drops_what_is_not_under_way(make_bench):
    bench = make_bench(3).all_up()
    id_ = bench.ask(Load(model="flux"))
    bench.answer_probes()
    [(gpu, command)] = bench.take(LoadModel)
    bench.ask(Cancel(target=id_))
    bench.finish(gpu, command)
    assert bench.states() == ["loaded", "absent", "absent"]
    assert bench.reply(id_)["error"]["code"] == "partial"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Load(model="flix"), "unknown_model"),
        (Load(model="flux", gpus=[7]), "unknown_gpu"),
        (Reload(model="flux"), "busy"),
        (Phase(name="nope"), "bad_request"),
        (LoraAdd(model="sd", adapter="oil"), "bad_request"),
        (LoraAdd(model="sd", adapter="ink"), "busy"),
    ],
)
def test_wrong_requests_are_refused_and_nothing_moves(bench, request_, code):
    bench.sent.clear()
    id_ = bench.ask(request_)
    assert bench.reply(id_)["error"]["code"] == code
    assert bench.sent == []


def test_an_adapter_goes_to_every_worker_that_has_the_model(bench):
    loaded(bench, "sd")
    id_ = bench.ask(LoraAdd(model="sd", adapter="ink", scale=0.5))
    for gpu, command in bench.take(ChangeAdapter):
        assert (command.path, command.scale) == ("/adapters/ink", 0.5)
        bench.finish(gpu, command)
    assert bench.reply(id_)["ok"]
    assert bench.states("sd") == ["loaded", "loaded"]


def test_an_adapter_is_not_put_on_a_parked_model_but_is_taken_off_one(bench):
    loaded(bench, "sd")
    bench.ask(Unload(model="sd"))
    bench.work()
    refused = bench.ask(LoraAdd(model="sd", adapter="ink"))
    assert bench.reply(refused)["error"]["code"] == "busy"
    bench.free = dict.fromkeys(bench.free, 0)
    removed = bench.ask(LoraRemove(model="sd", adapter="ink"))
    for gpu, command in bench.take(ChangeAdapter):
        assert command.path is None
        bench.finish(gpu, command)
    assert bench.reply(removed)["ok"]
    assert bench.states("sd") == ["parked"] * 2
    assert {worker.wanted["sd"] for worker in bench.fleet.state.workers.values()} == {"host"}


def test_an_adapter_that_comes_behind_an_unload_is_refused(bench):
    loaded(bench, "sd")
    bench.ask(Unload(model="sd"))
    id_ = bench.ask(LoraAdd(model="sd", adapter="ink"))
    bench.work()
    assert bench.reply(id_)["error"]["code"] == "busy"
    assert bench.states("sd") == ["parked"] * 2


def test_a_reload_asks_for_the_room_of_the_adapters_too(bench):
    loaded(bench, "sd")
    bench.ask(LoraAdd(model="sd", adapter="ink"))
    for gpu, command in bench.take(ChangeAdapter):
        bench.say(gpu, Done(task=command.task, result={"device_bytes": 50 * GIB}))
    bench.ask(Unload(model="sd"))
    for gpu, command in bench.take(UnloadModel):
        bench.say(gpu, Done(task=command.task, result={}))
    bench.free[1] = 49 * GIB
    id_ = bench.ask(Reload(model="sd"))
    bench.answer_probes()
    assert "50.0 GiB are needed" in bench.reply(id_)["error"]["message"]
    assert bench.states("sd") == ["parked"] * 2


def test_a_phase_moves_only_what_differs(bench):
    loaded(bench, "flux")
    loaded(bench, "sd")
    id_ = bench.ask(Phase(name="draw"))
    moved = bench.work()
    assert {type(command) for _, command in moved} == {UnloadModel}
    assert bench.reply(id_)["ok"]
    assert (bench.states("flux"), bench.states("sd")) == (["loaded"] * 2, ["parked"] * 2)


@pytest.mark.parametrize("request_", [Unload(), Phase(name="score")])
def test_what_is_still_being_loaded_is_unloaded_after_it(bench, request_):
    load = bench.ask(Load(model="flux"))
    bench.answer_probes()
    id_ = bench.ask(request_)
    bench.work()
    assert bench.reply(load)["ok"]
    assert bench.reply(id_)["ok"]
    assert bench.states() == ["parked", "parked"]


def test_a_phase_brings_back_what_is_still_being_unloaded(bench):
    loaded(bench)
    bench.ask(Unload())
    id_ = bench.ask(Phase(name="draw"))
    bench.work()
    assert bench.reply(id_)["ok"]
    assert bench.states() == ["loaded", "loaded"]


def test_keep_alive_parks_an_unused_model(make_bench):
    text = '[models.flux]\npath="/m"\nkeep_alive="10s"\n'
    bench = loaded(make_bench(1, text).all_up())
    bench.wait(9)
    assert bench.take(UnloadModel) == []
    bench.wait(2)
    bench.work()
    assert bench.states() == ["parked"]
