"""The client for asyncio programs: any number of requests at once on one connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Self

import zmq
import zmq.asyncio

from gpuctl import endpoint, protocol
from gpuctl.conversation import SILENCE_S, Conversation, OnEvent, Reply, no_daemon
from gpuctl.errors import BadConfig, GpuctlError, Timeout
from gpuctl.jobs import Job, pictures
from gpuctl.paths import default_socket
from gpuctl.protocol import Request

if TYPE_CHECKING:
    from PIL.Image import Image

PING_S = 3.0


class AsyncClient:
    """Talks to one daemon from one event loop.

    Args:
        socket: endpoint; by default as in :class:`gpuctl.Client`.
        timeout: seconds that a request may take; ``None`` waits as long as the daemon is there.
    """

    def __init__(self, socket: str | None = None, timeout: float | None = None) -> None:
        self.endpoint = socket or default_socket()
        self.timeout = timeout
        self._context = zmq.asyncio.Context.instance()
        self._socket: zmq.asyncio.Socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._under_way: dict[str, tuple[Conversation, asyncio.Future[Reply]]] = {}
        self._epoch: str | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the connection and fail what is under way."""
        if self._reader is not None:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader
        self._disconnect()
        self._fail(no_daemon(self.endpoint))

    # --- requests ---------------------------------------------------------------------------

    async def ping(self) -> dict[str, Any]:
        """Version, protocol, boot epoch and pid of the daemon."""
        return (await self.ask(protocol.Ping())).fields

    async def status(self) -> dict[str, Any]:
        """Daemon, workers, models, leases and jobs."""
        return (await self.ask(protocol.Status())).fields

    async def models(self) -> list[dict[str, Any]]:
        """The catalog."""
        found: list[dict[str, Any]] = (await self.ask(protocol.Models()))["models"]
        return found

    async def load(self, model: str, *, serial: bool | None = None, **options: Any) -> Reply:
        """Bring a model onto its GPUs."""
        return await self.ask(protocol.Load(model=model, serial=serial, **options))

    async def unload(self, model: str | None = None, **options: Any) -> Reply:
        """Free the GPUs of a model, or of all."""
        return await self.ask(protocol.Unload(model=model, **options))

    async def drop(self, model: str | None = None, **options: Any) -> Reply:
        """Free the GPUs and the host copy."""
        return await self.unload(model, to="disk", **options)

    async def reload(
        self, model: str | None = None, *, parallel: bool = True, **options: Any
    ) -> Reply:
        """Bring parked models back."""
        return await self.ask(protocol.Reload(model=model, serial=not parallel, **options))

    async def cancel(self, target: str) -> bool:
        """Cancel the request with that id; whether there was one."""
        return bool((await self.ask(protocol.Cancel(target=target)))["cancelled"])

    async def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        images: dict[str, Any] | None = None,
        seed: int | None = None,
        count: int = 1,
        **params: Any,
    ) -> list[Image]:
        """Images for a prompt; ``params`` are the pipeline's own call parameters."""
        given = params if prompt is None else {"prompt": prompt, **params}
        request, blobs = Job(model, given, images or {}, seed, count).request()
        return pictures(await self.ask(request, blobs))

    async def map(
        self, jobs: Iterable[Job], *, in_flight: int = 32
    ) -> AsyncIterator[tuple[Job, list[Image] | GpuctlError]]:
        """Run jobs on all workers; yields each with its images, in order of completion."""
        waiting = iter(jobs)
        flying: dict[asyncio.Task[list[Image]], Job] = {}
        while True:
            while len(flying) < in_flight and (job := next(waiting, None)) is not None:
                flying[asyncio.create_task(self._run(job))] = job
            if not flying:
                return
            done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield flying.pop(task), _outcome(task)

    async def _run(self, job: Job) -> list[Image]:
        request, blobs = job.request()
        return pictures(await self.ask(request, blobs))

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Everything that happens, until the iterator is closed."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        request = protocol.Subscribe()
        asking = asyncio.create_task(self.ask(request, (), queue.put_nowait))
        try:
            while not asking.done():
                event = await queue.get()
                if event["event"] != "subscribed":
                    yield event
        finally:
            asking.cancel()

    @asynccontextmanager
    async def lease(self, **options: Any) -> AsyncIterator[dict[str, Any]]:
        """Have GPUs to oneself; models leave before the body and are back after it.

        A lease with a time to live is renewed meanwhile.
        """
        lease = (await self.ask(protocol.LeaseAcquire(**options)))["lease"]
        renewal = asyncio.create_task(self._renew(lease))
        try:
            yield lease
        finally:
            renewal.cancel()
            await self.ask(protocol.LeaseRelease(lease=lease["id"]))

    async def _renew(self, lease: dict[str, Any]) -> None:
        while lease["ttl_s"] is not None:
            await asyncio.sleep(lease["ttl_s"] / 3)
            with suppress(GpuctlError):  # the next one may get through
                await self.ask(protocol.LeaseRenew(lease=lease["id"]))

    @asynccontextmanager
    async def unloaded(self, **options: Any) -> AsyncIterator[dict[str, Any]]:
        """``async with client.unloaded(): ...``: a lease on all GPUs."""
        async with self.lease(**options) as lease:
            yield lease

    # --- asking -----------------------------------------------------------------------------

    async def ask(
        self, request: Request, blobs: Sequence[Any] = (), on_event: OnEvent | None = None
    ) -> Reply:
        """Send any request and wait for its answer.

        Raises:
            GpuctlError: what the daemon answered, or ``NoDaemon``, or ``Timeout``.
        """
        try:
            async with asyncio.timeout(self.timeout):
                await self._open()
                return (await self._exchange(request, blobs, on_event)).raise_for_error()
        except TimeoutError:
            raise Timeout(f"no answer in {self.timeout:g} s") from None

    async def _exchange(
        self, request: Request, blobs: Sequence[Any], on_event: OnEvent | None
    ) -> Reply:
        conversation = Conversation(request, blobs, on_event, self._epoch)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._under_way[request.id] = (conversation, answer)
        try:
            await self._send(conversation.frames())
            return await answer
        except asyncio.CancelledError:
            await self._send(protocol.encode(protocol.Cancel(target=request.id)))
            raise
        finally:
            del self._under_way[request.id]

    async def _send(self, frames: list[Any]) -> None:
        if self._socket is not None:
            await self._socket.send_multipart(frames)

    # --- the connection ---------------------------------------------------------------------

    async def _open(self) -> None:
        async with self._opening:
            if self._socket is None:
                await self._connect()
            if self._reader is None or self._reader.done():
                self._reader = asyncio.create_task(self._read())

    async def _connect(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        hello = Conversation(protocol.Ping())
        try:
            endpoint.connect(socket, self.endpoint)
            async with asyncio.timeout(PING_S):
                await socket.send_multipart(hello.frames())
                while hello.reply is None:
                    hello.take(await socket.recv_multipart())
        except TimeoutError:
            socket.close()
            raise no_daemon(self.endpoint) from None
        except BadConfig:
            socket.close()
            raise
        self._socket, self._epoch = socket, hello.reply["epoch"]

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _read(self) -> None:
        while self._under_way or self._socket is not None:
            frames = await self._next()
            if frames is None:
                if self._under_way:
                    await self._find_again()
                continue
            for conversation, answer in list(self._under_way.values()):
                conversation.take(frames)
                if conversation.reply is not None and not answer.done():
                    answer.set_result(conversation.reply)

    async def _next(self) -> list[bytes] | None:
        if self._socket is None or not await self._socket.poll(int(SILENCE_S * 1000)):
            return None
        frames: list[bytes] = await self._socket.recv_multipart()
        return frames

    async def _find_again(self) -> None:
        """After a silence: a fresh connection, and the same requests with the same ids."""
        self._disconnect()
        try:
            await self._connect()
        except GpuctlError as gone:
            self._fail(gone)
            return
        for conversation, answer in list(self._under_way.values()):
            try:
                conversation.found_daemon(self._epoch or "")
                await self._send(conversation.frames())
            except GpuctlError as lost:
                if not answer.done():
                    answer.set_exception(lost)

    def _fail(self, error: GpuctlError) -> None:
        for _, answer in self._under_way.values():
            if not answer.done():
                answer.set_exception(error)


def _outcome(task: asyncio.Task[list[Image]]) -> list[Image] | GpuctlError:
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, GpuctlError):
        return error
    raise error
