"""The main loop: sockets, signals and the clock into events; effects out.

One thread, one poller, no blocking call. The controller decides nothing about models and jobs
(that is the fleet's), opens no CUDA, and copies no image: blobs pass through as frames.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from typing import Any, Protocol

import attrs
import zmq

from gpuctl import protocol
from gpuctl.errors import BadRequest, GpuctlError, HostMemory
from gpuctl.protocol import Ping, Status, Subscribe
from gpuctld import doors, logs
from gpuctld.answers import Answers, Caller
from gpuctld.doors import Door, Incoming
from gpuctld.fleet import Fleet, effects, events, report
from gpuctld.fleet.snapshot import Snapshot
from gpuctld.links import Links
from gpuctld.messages import Failed, LoadModel
from gpuctld.processes import Processes
from gpuctld.signals import SignalPipe
from gpuctld.state_file import StateFile
from gpuctld.supervisor import Supervisor

log = logging.getLogger(__name__)

BUSY_TICK_S = 0.05
IDLE_TICK_S = 0.5
ALIVE_S = 2.0
"""How often a waiting client is sent a sign of life, and so found to be gone."""
FEED_S = 0.5
"""The watchdog is fed at most this often: a busy loop shall not keep the manager busy too."""


class HostCopies(Protocol):
    """The host store, as far as the controller uses it."""

    def descriptor(self, model: str, need_bytes: int) -> int:
        """The open file of a model's copy, made and reserved at first use."""

    def release(self, model: str) -> None:
        """Give a model's copy back."""


class ServiceManager(Protocol):
    """Whoever started the daemon and wants to know how it is."""

    def ready(self) -> None: ...
    def reloading(self) -> None: ...
    def stopping(self) -> None: ...
    def status(self, text: str) -> None: ...
    def watchdog(self) -> None: ...


@attrs.frozen(kw_only=True)
class About:
    """What the daemon says of itself."""

    version: str
    epoch: str
    socket: str


@attrs.define(eq=False, kw_only=True)
class Controller:
    """Owns the parts and turns them. ``run`` returns when the last worker has gone."""

    fleet: Fleet
    door: Door
    links: Links
    supervisor: Supervisor
    store: HostCopies
    state_file: StateFile
    processes: Processes
    signals: SignalPipe
    manager: ServiceManager
    about: About
    reconfigure: Any
    answers: Answers = attrs.field(factory=Answers)
    _inbox: deque[events.Event] = attrs.field(factory=deque, init=False)
    _subscribers: dict[str, Caller] = attrs.field(factory=dict, init=False)
    _sequence: Any = attrs.field(factory=lambda: itertools.count(1), init=False)
    _announced: bool = attrs.field(default=False, init=False)
    _started_at: float = attrs.field(factory=time.monotonic, init=False)
    _alive_at: float = attrs.field(default=0.0, init=False)
    _feed_at: float = attrs.field(default=0.0, init=False)
    _described: str = attrs.field(default="", init=False)

    def run(self) -> None:
        """Serve until stopped."""
        restore = self.fleet.state.config.daemon.restore
        self._inbox.append(events.Booted(self.state_file.read() if restore else Snapshot()))
        self._settle()
        while not self.fleet.stopped:
            self.turn()
        self.supervisor.dismiss()

    def close(self) -> None:
        """End what is left, on any way out."""
        self.supervisor.close()
        self.links.close_all()
        self.door.close()

    def turn(self) -> None:
        """One full turn of the loop; only this feeds the watchdog."""
        ready = self._wait()
        self._take_signals()
        self._take_requests()
        self._take_worker_messages(ready)
        self._take_process_news(ready)
        self._inbox.append(events.Tick())
        self._settle()
        self._say_alive()
        self._announce()
        self._feed_watchdog()

    # --- waiting ----------------------------------------------------------------------------

    def _wait(self) -> set[Any]:
        poller = zmq.Poller()
        for source in (
            *self.door.sources,
            self.signals.descriptor,
            *self.links.sockets(),
            *self.supervisor.descriptors(),
            *self.processes.descriptors(),
        ):
            poller.register(source, zmq.POLLIN)
        state = self.fleet.state
        busy = state.operations or state.leases or not self._announced or state.stopping
        timeout = BUSY_TICK_S if busy else IDLE_TICK_S
        return {source for source, _ in poller.poll(int(timeout * 1000))}

    # --- taking -----------------------------------------------------------------------------

    def _take_signals(self) -> None:
        for word in self.signals.take():
            if word == "stop":
                self._stop()
            elif word == "reload":
                self._reconfigure()

    def _stop(self) -> None:
        log.info("stopping")
        self.manager.stopping()
        self._inbox.append(events.Stopping())

    def _reconfigure(self) -> None:
        self.manager.reloading()
        try:
            self._inbox.append(self.reconfigure())
            log.info("configuration_read")
        except GpuctlError as wrong:
            reason = logs.fields(reason=wrong.message, hint=wrong.hint)
            log.error("configuration_refused", extra=reason)  # noqa: TRY400  the reason says it all
        if self._announced:
            self.manager.ready()

    def _take_requests(self) -> None:
        for incoming in self.door.receive():
            try:
                request, body, blobs = doors.read(incoming)
                self._take(incoming, request, body, blobs)
            except BadRequest as wrong:
                self._refuse(incoming, wrong)

    def _take(self, incoming: Incoming, request: Any, body: bytes, blobs: list[Any]) -> None:
        if isinstance(request, Ping | Status):
            self._reply_to(incoming, self._about(request))
            return
        caller = Caller(incoming.client, incoming.delimited)
        verdict = self.answers.admit(
            request.id, body, caller, progress=getattr(request, "progress", False)
        )
        if not isinstance(verdict, bool):
            self.door.send(incoming.client, verdict, delimited=incoming.delimited)
        elif verdict and isinstance(request, Subscribe):
            self._subscribe(request, caller)
        elif verdict and not self._cancel_subscription(request):
            self.processes.watch(incoming.client, incoming.peer.pid)
            self._inbox.append(
                events.Requested(
                    request=request, client=incoming.client, peer=incoming.peer, blobs=blobs
                )
            )

    def _refuse(self, incoming: Incoming, wrong: BadRequest) -> None:
        id_ = doors.readable_id(incoming)
        if id_ is None:
            self.door.refused += 1
            return
        reply = {**report.reply(id_, ""), "ok": False, "error": wrong.to_map()}
        self._reply_to(incoming, reply)

    def _reply_to(self, incoming: Incoming, reply: dict[str, Any]) -> None:
        self.door.send(incoming.client, protocol.encode(reply), delimited=incoming.delimited)

    def _take_worker_messages(self, ready: set[Any]) -> None:
        for socket, gpu in self.links.sockets().items():
            if socket in ready:
                for message, blobs in self.links.receive(gpu):
                    self._inbox.append(events.Heard(gpu, message, blobs))

    def _take_process_news(self, ready: set[Any]) -> None:
        for news in self.supervisor.news():
            if isinstance(news, events.Died):
                self._bury(news)
            else:
                log.info("worker_started", extra=logs.fields(gpu=news.gpu, pid=news.pid))
            self._inbox.append(news)
        for key in self.processes.ended(ready):
            self._process_ended(key)

    def _bury(self, died: events.Died) -> None:
        for message, blobs in self.links.receive(died.gpu):  # its last words count
            self._inbox.append(events.Heard(died.gpu, message, blobs))
        self.links.close(died.gpu)
        level = logging.INFO if self.fleet.state.stopping else logging.WARNING
        log.log(level, "worker_ended", extra=logs.fields(gpu=died.gpu, reason=died.reason))

    def _process_ended(self, key: bytes | str) -> None:
        if isinstance(key, str):
            self._inbox.append(events.HolderDied(key))
        else:
            self._client_gone(key)

    def _client_gone(self, client: bytes) -> None:
        self.processes.forget(client)
        self.answers.drop_client(client)
        for id_ in [i for i, caller in self._subscribers.items() if caller.client == client]:
            self._unsubscribe(id_)
        self._inbox.append(events.ClientGone(client))

    # --- deciding and doing -----------------------------------------------------------------

    def _settle(self) -> None:
        """Apply events, carry out effects, until both are exhausted.

        What is decided is saved before anybody hears of it: who has a lease has it even if this
        process ends in the next moment.
        """
        while self._inbox:
            event = self._inbox.popleft()
            decided = self.fleet.apply(event, time.monotonic())
            self.state_file.save(self.fleet.snapshot)
            for effect in decided:
                self._carry_out(effect)
        self.state_file.sync()

    def _carry_out(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Send():
                self._send(effect)
            case effects.Answer():
                self._answer(effect)
            case effects.Publish():
                self._publish(effect)
            case effects.Spawn():
                self._spawn(effect.gpu)
            case effects.Signal():
                self.supervisor.signal(effect.gpu, effect.signal)
            case effects.ReleaseCopy():
                self.store.release(effect.model)
            case effects.WatchProcess():
                self.processes.watch(effect.lease, effect.pid, effect.since)
            case effects.UnwatchProcess():
                self.processes.forget(effect.lease)

    def _send(self, effect: effects.Send) -> None:
        command = effect.command
        if isinstance(command, LoadModel) and not self._hand_over_copy(effect.gpu, command):
            return
        self.links.send(effect.gpu, command, effect.blobs)

    def _hand_over_copy(self, gpu: int, command: LoadModel) -> bool:
        """Reserve the host copy and pass it to the worker; refused before anything is read."""
        name = command.source["name"]
        need = self.fleet.state.catalog[name].estimated_bytes
        try:
            descriptor = self.store.descriptor(name, need)
        except HostMemory as refused:
            failed = Failed(task=command.task, error=refused.to_map())
            self._inbox.append(events.Heard(gpu, failed))
            return False
        self.supervisor.send_descriptor(gpu, name, descriptor)
        return True

    def _spawn(self, gpu: int) -> None:
        self.links.open(gpu)
        self.supervisor.spawn(gpu)

    def _answer(self, effect: effects.Answer) -> None:
        frames = protocol.encode(effect.reply, effect.blobs)
        callers = self.answers.settle(effect.id, frames, time.monotonic())
        for caller in callers:
            self.door.send(caller.client, frames, delimited=caller.delimited)
        waiting = self.answers.waiting()
        for caller in callers:
            if caller.client not in waiting:
                self.processes.forget(caller.client)

    # --- events to clients ------------------------------------------------------------------

    def _subscribe(self, request: Subscribe, caller: Caller) -> None:
        self._subscribers[request.id] = caller
        self._tell(request.id, caller, {"event": "subscribed", "seq": 0, "at": time.time()})

    def _cancel_subscription(self, request: Any) -> bool:
        target = getattr(request, "target", "")
        if request.op != "cancel" or target not in self._subscribers:
            return False
        self._unsubscribe(target)
        reply = report.reply(request.id, "cancel", cancelled=True)
        self._answer(effects.Answer(request.id, reply))
        return True

    def _unsubscribe(self, id_: str) -> None:
        self._subscribers.pop(id_, None)
        self._answer(effects.Answer(id_, report.reply(id_, "subscribe")))

    def _publish(self, effect: effects.Publish) -> None:
        log.debug("event", extra=logs.fields(**effect.event))
        event = {**effect.event, "seq": next(self._sequence), "at": time.time()}
        for id_, caller in self._subscribers.items():
            self._tell(id_, caller, event)
        if effect.id is not None:
            for caller in self.answers.watchers(effect.id):
                self._tell(effect.id, caller, event)

    def _tell(self, id_: str, caller: Caller, event: dict[str, Any]) -> None:
        """Send an event, or drop it: a slow reader sees the gap in ``seq``."""
        if not caller.delimited:
            self.door.send(caller.client, protocol.encode({**event, "id": id_}), delimited=False)

    def _say_alive(self) -> None:
        now = time.monotonic()
        if now < self._alive_at:
            return
        self._alive_at = now + ALIVE_S
        waiting = self.answers.waiting()
        event = {"event": "alive", "seq": 0, "at": time.time(), "id": ""}
        for client in waiting:
            delimited = self.answers.delimited(client)
            if not delimited and self.door.has_lost(client, protocol.encode(event)):
                self._client_gone(client)

    # --- about itself -----------------------------------------------------------------------

    def _announce(self) -> None:
        if not self._announced and self.fleet.ready:
            self._announced = True
            self.manager.ready()
            workers = len(self.fleet.state.workers)
            log.info("ready", extra=logs.fields(workers=workers, socket=self.about.socket))
        described = report.headline(self.fleet.state)
        if described != self._described:
            self._described = described
            self.manager.status(described)

    def _feed_watchdog(self) -> None:
        now = time.monotonic()
        if now >= self._feed_at:
            self._feed_at = now + FEED_S
            self.manager.watchdog()

    def _about(self, request: Ping | Status) -> dict[str, Any]:
        uptime = time.monotonic() - self._started_at
        if isinstance(request, Ping):
            about = {**attrs.asdict(self.about), "pid": os.getpid(), "uptime_s": uptime}
            return report.reply(request.id, "ping", protocol=protocol.VERSION.decode(), **about)
        degraded = [each for each in (self.state_file.problem, self.door.problem) if each]
        daemon = {
            **attrs.asdict(self.about),
            "pid": os.getpid(),
            "uptime_s": uptime,
            "ready": self._announced,
            "refused_messages": self.door.refused,
            "degraded": degraded,
        }
        status = report.status(self.fleet.state, time.monotonic())
        return report.reply(request.id, "status", daemon=daemon, **status)
