"""Generate requests: a bounded queue, each job to an idle worker that has the model."""

from __future__ import annotations

import zlib
from typing import Any

from gpuctl.errors import (
    BadRequest,
    Busy,
    Cancelled,
    GpuctlError,
    Leased,
    ModelParked,
    QueueFull,
    UnknownGpu,
)
from gpuctl.protocol import Generate
from gpuctl.residency import DOWN, JobState, Residency, Tier
from gpuctld.fleet import operations, outcomes, placement, report
from gpuctld.fleet.effects import Answer, Send
from gpuctld.fleet.events import Requested
from gpuctld.fleet.state import FleetState, Job, Operation, Purpose, Step, Task, Worker
from gpuctld.messages import CancelTask, RunJob


def submit(fleet: FleetState, event: Requested, now: float) -> None:
    """Queue a job.

    Raises:
        UnknownModel, UnknownGpu, BadRequest: it can never run.
        QueueFull, ModelParked, Leased: it cannot run now and the caller does not wait.
    """
    request: Generate = event.request
    fleet.catalog[request.model]
    _check_images(request, len(event.blobs))
    job = Job(request, event.client, event.blobs, now)
    _check_workers(fleet, job)
    if sum(each.state is JobState.QUEUED for each in fleet.jobs.values()) >= _bound(fleet):
        raise QueueFull(f"{_bound(fleet)} jobs wait already", "try again later")
    if request.on_parked == "refuse":
        _refuse_unless_loaded(fleet, job)
    elif request.on_parked == "reload":
        _reload_for(fleet, job, now)
    fleet.jobs[job.id] = job
    _publish(fleet, job, now)


def _bound(fleet: FleetState) -> int:
    return fleet.config.daemon.job_queue


def _check_images(request: Generate, blobs: int) -> None:
    for name, indices in request.images.items():
        if not indices or any(not 0 <= index < blobs for index in indices):
            raise BadRequest(f"images.{name} refers to a blob that is not in the message")


def _check_workers(fleet: FleetState, job: Job) -> None:
    if job.request.gpu is not None:
        fleet.select([job.request.gpu])
    if not placement.eligible(fleet, job):
        raise UnknownGpu(f"{job.model} may not run there", "see its devices in the configuration")


def _refuse_unless_loaded(fleet: FleetState, job: Job) -> None:
    """A job waits only for what is on its way; otherwise the caller gets the remedy."""
    workers = placement.eligible(fleet, job)
    leases = [fleet.lease_on(worker.gpu) for worker in workers]
    refusing = [lease for lease in leases if lease is not None and not lease.queue_jobs]
    if refusing and len(refusing) == len(workers):
        raise Leased(f"the GPUs of {job.model} are leased", "try again when the lease has ended")
    if any(lease is not None and lease.queue_jobs for lease in leases):
        return
    if not any(_has_or_gets(fleet, worker, job.model) for worker in workers):
        raise _not_loaded(job.model, workers)


def _has_or_gets(fleet: FleetState, worker: Worker, model: str) -> bool:
    """Loaded, or about to be; an unload that has been accepted counts as done."""
    steps = [
        step
        for operation in fleet.operations
        for step in operation.unfinished
        if (step.gpu, step.model) == (worker.gpu, model)
    ]
    if steps:
        return steps[-1].target is Tier.DEVICE
    wanted = worker.wanted.get(model) is Tier.DEVICE
    return wanted or worker.state_of(model) is Residency.LOADED


def _not_loaded(model: str, workers: list[Worker]) -> ModelParked:
    if any(worker.wanted.get(model) is Tier.HOST for worker in workers):
        return ModelParked(
            f"{model} is parked in host memory",
            f"gpuctl reload {model}, or --on-parked reload",
        )
    return ModelParked(f"{model} is not loaded", f"gpuctl load {model}")


def _reload_for(fleet: FleetState, job: Job, now: float) -> None:
    """Reload, or load, the model on the eligible workers that no lease keeps."""
    workers = [w for w in placement.eligible(fleet, job) if fleet.lease_on(w.gpu) is None]
    if any(_has_or_gets(fleet, worker, job.model) for worker in workers):
        return
    id_ = f"for-{job.id}"
    steps = [Step(worker.gpu, job.model, Tier.DEVICE, id_) for worker in workers]
    if steps:
        operations.begin(fleet, Operation(id_, "reload", steps, now, purpose=Purpose.NOBODY))


# --- running --------------------------------------------------------------------------------


def dispatch(fleet: FleetState, now: float) -> None:
    """Give queued jobs, oldest first, to idle workers that no operation waits for."""
    if fleet.stopping:
        return
    busy = {step.gpu for operation in fleet.operations for step in operation.unfinished}
    for job in fleet.jobs.values():
        if job.state is JobState.QUEUED:
            worker = placement.choose(fleet, job, busy)
            if worker is not None:
                _run(fleet, worker, job, now)


def _run(fleet: FleetState, worker: Worker, job: Job, now: float) -> None:
    request = job.request
    job.state, job.gpu, job.started_at = JobState.RUNNING, worker.gpu, now
    worker.task = Task(job.id, now + fleet.config.deadlines.job_step, job=job)
    worker.holding(job.model).used_at = now
    command = RunJob(
        task=job.id,
        model=job.model,
        params={**fleet.catalog[job.model].defaults, **request.params},
        images=request.images,
        seed=seed_of(request),
        count=request.count,
        format=request.format,
    )
    fleet.emit(Send(worker.gpu, command, job.blobs))
    _publish(fleet, job, now)


def seed_of(request: Generate) -> int:
    """The seed asked for, else one that the request's id determines: a resend draws the same."""
    return zlib.crc32(request.id.encode()) if request.seed is None else request.seed


def stepped(fleet: FleetState, worker: Worker, job: Job, done: int, total: int, now: float) -> None:
    """A denoise step is done: the job lives, so its deadline moves."""
    job.step, job.steps = done, total
    if worker.task and worker.task.strikes == 0:
        worker.task.deadline = now + fleet.config.deadlines.job_step
    _publish(fleet, job, now)


def finished(fleet: FleetState, job: Job, result: dict[str, Any], blobs: Any, now: float) -> None:
    """The worker has made the images."""
    held = fleet.workers[job.gpu].holding(job.model) if job.gpu is not None else None
    if held is not None:
        held.used_at = now
    fields = {"model": job.model, "gpu": job.gpu, "duration_s": now - job.queued_at, **result}
    _end(fleet, job, JobState.DONE, report.reply(job.id, "generate", **fields), blobs, now)


def failed(fleet: FleetState, job: Job, error: dict[str, Any], now: float) -> None:
    """The job failed, or was cancelled; a cancellation is told with its own reason."""
    if job.cancelled_by is not None and error["code"] == Cancelled.code:
        error = job.cancelled_by.to_map()
    state = JobState.CANCELLED if error["code"] == Cancelled.code else JobState.FAILED
    fields = {"model": job.model, "gpu": job.gpu, "duration_s": now - job.queued_at}
    outcome = {"ok": False, "error": error, "images": []}
    reply = {**report.reply(job.id, "generate", **fields), **outcome}
    _end(fleet, job, state, reply, (), now)


def _end(
    fleet: FleetState, job: Job, state: JobState, reply: dict[str, Any], blobs: Any, now: float
) -> None:
    job.state = state
    job.blobs = ()
    del fleet.jobs[job.id]
    _publish(fleet, job, now)
    fleet.emit(Answer(job.id, reply, blobs))


def _publish(fleet: FleetState, job: Job, now: float) -> None:
    fleet.publish("job", job.id, **report.job(job, now))


# --- cancelling -----------------------------------------------------------------------------


def cancel(fleet: FleetState, job: Job, why: GpuctlError, now: float) -> None:
    """Drop a queued job; stop a running one at its next denoise step."""
    if job.state is JobState.QUEUED:
        job.cancelled_by = why
        failed(fleet, job, why.to_map(), now)
    elif job.cancelled_by is None and job.gpu is not None:
        job.cancelled_by = why
        fleet.emit(Send(job.gpu, CancelTask(task=job.id)))


def cancel_of_client(fleet: FleetState, client: bytes, now: float) -> None:
    """A client has gone: nobody waits for its jobs."""
    for job in [each for each in fleet.jobs.values() if each.client == client]:
        cancel(fleet, job, Cancelled("the client has gone"), now)


def abort_on(fleet: FleetState, gpus: set[int], now: float) -> None:
    """Stop what runs on these GPUs, for an unload that does not wait."""
    for job in list(fleet.jobs.values()):
        if job.state is JobState.RUNNING and job.gpu in gpus:
            cancel(fleet, job, Cancelled("aborted by an unload"), now)


def expire(fleet: FleetState, now: float) -> None:
    """Cancel jobs that took longer than their client allows."""
    for job in list(fleet.jobs.values()):
        limit = job.request.timeout_s
        if limit is not None and now >= job.queued_at + limit and job.cancelled_by is None:
            cancel(fleet, job, Cancelled(f"not done in {limit:g} s"), now)


def give_up(fleet: FleetState, now: float) -> None:
    """Answer jobs that wait for workers none of which comes back by itself."""
    for job in list(fleet.jobs.values()):
        workers = placement.eligible(fleet, job)
        if job.state is JobState.QUEUED and all(worker.state in DOWN for worker in workers):
            failed(fleet, job, outcomes.lost_worker(workers[0]).to_map(), now)


def refuse_stranded(fleet: FleetState, now: float) -> None:
    """After an unload, jobs that may not wait for a parked model get the remedy."""
    for job in list(fleet.jobs.values()):
        if job.state is JobState.QUEUED and job.request.on_parked == "refuse":
            try:
                _refuse_unless_loaded(fleet, job)
            except Busy as refused:
                failed(fleet, job, refused.to_map(), now)
