"""The client for Python programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

import zmq

from gpuctl import endpoint, protocol
from gpuctl.conversation import SILENCE_S, Conversation, OnEvent, Reply, no_daemon
from gpuctl.errors import BadConfig, GpuctlError, Timeout
from gpuctl.jobs import Job, pictures
from gpuctl.paths import default_socket
from gpuctl.protocol import Request

if TYPE_CHECKING:
    from PIL.Image import Image

SLICE_MS = 200
PING_S = 3.0
IN_FLIGHT = 32
RENEWAL_TIMEOUT_S = 4.0


class Client:
    """Talks to one daemon. Not thread-safe: make one client per thread, they cost little.

    Args:
        socket: endpoint; by default ``$GPUCTL_SOCKET``, the user's daemon, the system's service.
        timeout: seconds that a request may take; ``None`` waits as long as the daemon is there.

    Every method raises a :class:`gpuctl.errors.GpuctlError` that names what went wrong. A daemon
    that restarts is found again.
    """

    def __init__(self, socket: str | None = None, timeout: float | None = None) -> None:
        self.endpoint = socket or default_socket()
        self.timeout = timeout
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket: zmq.Socket[bytes] | None = None
        self._epoch: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection; the next request makes a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self._epoch = None

    # --- state ------------------------------------------------------------------------------

    def ping(self) -> dict[str, Any]:
        """Version, protocol, boot epoch and pid of the daemon."""
        return self.ask(protocol.Ping()).fields

    def status(self) -> dict[str, Any]:
        """Daemon, workers, models, leases and jobs."""
        return self.ask(protocol.Status()).fields

    def models(self) -> list[dict[str, Any]]:
        """The catalog."""
        found: list[dict[str, Any]] = self.ask(protocol.Models())["models"]
        return found

    def events(self) -> Iterator[dict[str, Any]]:
        """Everything that happens, until the iterator is closed."""
        with Client(self.endpoint) as other:
            yield from other._stream(protocol.Subscribe())

    # --- moving models ----------------------------------------------------------------------

    def load(self, model: str, *, serial: bool | None = None, **options: Any) -> Reply:
        """Bring a model onto its GPUs; see :class:`gpuctl.protocol.Load` for the options."""
        return self._move(protocol.Load, model=model, serial=serial, **options)

    def unload(self, model: str | None = None, **options: Any) -> Reply:
        """Free the GPUs of a model, or of all; see :class:`gpuctl.protocol.Unload`."""
        return self._move(protocol.Unload, model=model, **options)

    def drop(self, model: str | None = None, **options: Any) -> Reply:
        """Free the GPUs and the host copy."""
        return self.unload(model, to="disk", **options)

    def reload(self, model: str | None = None, *, parallel: bool = True, **options: Any) -> Reply:
        """Bring parked models back; see :class:`gpuctl.protocol.Reload`."""
        return self._move(protocol.Reload, model=model, serial=not parallel, **options)

    def phase(self, name: str, **options: Any) -> Reply:
        """Move to a declared phase."""
        return self._move(protocol.Phase, name=name, **options)

    def _move(
        self, kind: Callable[..., Request], on_event: OnEvent | None = None, **fields: Any
    ) -> Reply:
        progress = {"progress": True} if on_event else {}
        return self.ask(kind(**progress, **fields), (), on_event)

    # --- adapters ---------------------------------------------------------------------------

    def lora_add(self, model: str, adapter: str, scale: float = 1.0) -> Reply:
        """Load a catalogued adapter onto a loaded model."""
        return self.ask(protocol.LoraAdd(model=model, adapter=adapter, scale=scale))

    def lora_remove(self, model: str, adapter: str) -> Reply:
        """Take an adapter off."""
        return self.ask(protocol.LoraRemove(model=model, adapter=adapter))

    def lora_list(self, model: str) -> Reply:
        """Adapters of a model, per worker."""
        return self.ask(protocol.LoraList(model=model))

    # --- leases -----------------------------------------------------------------------------

    @contextmanager
    def lease(self, **options: Any) -> Iterator[dict[str, Any]]:
        """Have GPUs to oneself: models leave before the body and are back after it.

        The models come back also when the body raises. A lease with a time to live is renewed
        meanwhile. Options are those of :class:`gpuctl.protocol.LeaseAcquire`; yields the lease.
        """
        lease = self.ask(protocol.LeaseAcquire(**options))["lease"]
        try:
            with self.renewed(lease):
                yield lease
        finally:
            self.ask(protocol.LeaseRelease(lease=lease["id"]))

    @contextmanager
    def renewed(self, lease: dict[str, Any]) -> Iterator[None]:
        """Keep a lease from running out, on a thread and a connection of their own."""
        if lease["ttl_s"] is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(lease, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _renew(self, lease: dict[str, Any], ended: threading.Event) -> None:
        with Client(self.endpoint, RENEWAL_TIMEOUT_S) as other:
            while not ended.wait(lease["ttl_s"] / 3):
                with suppress(GpuctlError):  # the next one may get through
                    other.ask(protocol.LeaseRenew(lease=lease["id"]))

    @contextmanager
    def unloaded(self, **options: Any) -> Iterator[dict[str, Any]]:
        """``with client.unloaded(): score()``: a lease on all GPUs."""
        with self.lease(**options) as lease:
            yield lease

    # --- generating -------------------------------------------------------------------------

    def generate(
        self,
        model: str,
        prompt: str | Sequence[str] | None = None,
        *,
        images: dict[str, Any] | None = None,
        seed: int | None = None,
        count: int = 1,
        on_event: OnEvent | None = None,
        options: dict[str, Any] | None = None,
        **params: Any,
    ) -> list[Image]:
        """Images for a prompt; ``params`` are the pipeline's own call parameters.

        ``images``: input images by parameter, such as ``{"image": picture}``. ``options``: other
        fields of :class:`gpuctl.protocol.Generate`, such as ``on_parked``.
        """
        given = params if prompt is None else {"prompt": _plain(prompt), **params}
        job = Job(model, given, images or {}, seed, count, options=options or {})
        request, blobs = job.request(progress=on_event is not None)
        return pictures(self.ask(request, blobs, on_event))

    def map(
        self, jobs: Iterable[Job], *, in_flight: int = IN_FLIGHT
    ) -> Iterator[tuple[Job, list[Image] | GpuctlError]]:
        """Run jobs on all workers; yields each with its images, in order of completion.

        A job that fails is yielded with its error and does not stop the others.
        """
        for job, reply in self.replies(jobs, in_flight=in_flight):
            yield job, reply if isinstance(reply, GpuctlError) else pictures(reply)

    def replies(
        self, jobs: Iterable[Job], *, in_flight: int = IN_FLIGHT
    ) -> Iterator[tuple[Job, Reply | GpuctlError]]:
        """Like :meth:`map`, with the encoded answers."""
        waiting = iter(jobs)
        flying: dict[str, tuple[Job, Conversation]] = {}
        while True:
            while len(flying) < in_flight and (job := next(waiting, None)) is not None:
                try:
                    self._launch(job, flying)
                except GpuctlError as wrong:
                    yield job, wrong
            if not flying:
                return
            yield from self._landed(flying)

    def _launch(self, job: Job, flying: dict[str, tuple[Job, Conversation]]) -> None:
        request, blobs = job.request()
        conversation = Conversation(request, blobs)
        self._begin(conversation)
        flying[request.id] = (job, conversation)

    def _landed(
        self, flying: dict[str, tuple[Job, Conversation]]
    ) -> Iterator[tuple[Job, Reply | GpuctlError]]:
        frames = self._receive(SILENCE_S)
        if frames is None:
            yield from self._lost(flying)
            return
        for id_, (job, conversation) in list(flying.items()):
            conversation.take(frames)
            if conversation.reply is not None:
                del flying[id_]
                yield job, _outcome(conversation.reply)

    def _lost(
        self, flying: dict[str, tuple[Job, Conversation]]
    ) -> Iterator[tuple[Job, Reply | GpuctlError]]:
        self.close()
        for id_, (job, conversation) in list(flying.items()):
            try:
                self._resume(conversation)
            except GpuctlError as gone:
                del flying[id_]
                yield job, gone

    # --- asking -----------------------------------------------------------------------------

    def ask(
        self,
        request: Request,
        blobs: Sequence[Any] = (),
        on_event: OnEvent | None = None,
    ) -> Reply:
        """Send any request and wait for its answer.

        Raises:
            GpuctlError: what the daemon answered, or ``NoDaemon``, or ``Timeout``.
        """
        conversation = Conversation(request, blobs, on_event)
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            self._begin(conversation)
            return self._wait(conversation, deadline).raise_for_error()
        except KeyboardInterrupt:
            self._cancel(request)
            raise

    def cancel(self, target: str) -> bool:
        """Cancel the request with that id; whether there was one."""
        return bool(self.ask(protocol.Cancel(target=target))["cancelled"])

    def _cancel(self, request: Request) -> None:
        """Take a request back that the user interrupted; the daemon may be gone."""
        if self._socket is not None:
            frames = protocol.encode(protocol.Cancel(target=request.id))
            self._socket.send_multipart(frames)
            self._socket.close(linger=200)
            self._socket = None

    def _begin(self, conversation: Conversation) -> None:
        if self._socket is None:
            self._connect()
        conversation.epoch = self._epoch
        self._send(conversation.frames())

    def _wait(self, conversation: Conversation, deadline: float | None) -> Reply:
        silent_since = time.monotonic()
        while conversation.reply is None:
            frames = self._receive(SLICE_MS / 1000)
            if frames is not None:
                conversation.take(frames)
                silent_since = time.monotonic()
            elif time.monotonic() - silent_since > SILENCE_S:
                self._find_again(conversation)
                silent_since = time.monotonic()
            if deadline is not None and time.monotonic() > deadline and not conversation.reply:
                self._cancel(conversation.request)
                raise Timeout(f"no answer in {self.timeout:g} s", "the daemon may still do it")
        return conversation.reply

    def _stream(self, request: protocol.Subscribe) -> Iterator[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        conversation = Conversation(request, (), found.append)
        self._begin(conversation)
        while conversation.reply is None:
            frames = self._receive(SILENCE_S)
            if frames is None:
                self._find_again(conversation)
            else:
                conversation.take(frames)
            yield from (event for event in found if event["event"] != "subscribed")
            found.clear()

    # --- the socket -------------------------------------------------------------------------

    def _connect(self) -> None:
        """Open a socket and learn the daemon's epoch."""
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDTIMEO, int(PING_S * 1000))
        try:
            endpoint.connect(self._socket, self.endpoint)
        except BadConfig:
            self.close()
            raise
        hello = Conversation(protocol.Ping())
        self._send(hello.frames())
        patience = PING_S if self.timeout is None else min(PING_S, self.timeout)
        deadline = time.monotonic() + patience
        while hello.reply is None:
            frames = self._receive(max(0.0, deadline - time.monotonic()))
            if frames is None:
                self.close()
                raise no_daemon(self.endpoint)
            hello.take(frames)
        self._epoch = hello.reply["epoch"]

    def _find_again(self, conversation: Conversation) -> None:
        """After a silence: a fresh connection, and the same request with the same id."""
        self.close()
        self._resume(conversation)

    def _resume(self, conversation: Conversation) -> None:
        """Send a request again on the present connection, if its daemon is still the same."""
        self._open()
        conversation.found_daemon(self._epoch or "")
        self._send(conversation.frames())

    def _send(self, frames: list[Any]) -> None:
        try:
            self._open().send_multipart(frames)
        except zmq.Again:
            self.close()
            raise no_daemon(self.endpoint) from None

    def _receive(self, seconds: float) -> list[bytes] | None:
        socket = self._open()
        return socket.recv_multipart() if socket.poll(int(seconds * 1000)) else None

    def _open(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            self._connect()
        assert self._socket is not None  # noqa: S101  set by _connect
        return self._socket


def _outcome(reply: Reply) -> Reply | GpuctlError:
    try:
        return reply.raise_for_error()
    except GpuctlError as error:
        return error


def _plain(prompt: str | Sequence[str]) -> str | list[str]:
    return prompt if isinstance(prompt, str) else list(prompt)
