"""One training loop for every network: schedule, progress lines, averaged weights."""

import math
import time
from collections.abc import Callable, Iterable

import attrs
import torch
from torch import Tensor, nn

from training.config import Schedule

REPORT_EVERY_S = 5.0
CLIP = 1.0


class Average:
    """Exponential moving average of the parameters of some modules."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.live = [p for module in modules for p in module.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average a step towards the live parameters; in long steps at first."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        """Replaces the live parameters by their average."""
        torch._foreach_copy_(self.live, self.mean)


@attrs.define
class Clock:
    """How much of a schedule is used up."""

    schedule: Schedule
    step: int = 0
    started: float = attrs.field(factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        return max(self.step / self.schedule.steps, self.elapsed / self.schedule.seconds)

    def factor(self) -> float:
        """Of the learning rate: a linear warm-up, then half a cosine."""
        warm = min(1.0, (self.step + 1) / self.schedule.warmup)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress))))


def learn(
    name: str, modules: list[nn.Module], loss: Callable[[], Tensor], schedule: Schedule, ema: float
) -> int:
    """Minimises `loss` (a fresh batch per call), leaves averaged weights, returns the steps."""
    average = Average(modules, ema)
    optimizer = torch.optim.AdamW(average.live, lr=schedule.rate, betas=(0.9, 0.99))
    clock, window = Clock(schedule), Window(name, schedule.batch)
    while clock.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * clock.factor()
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(average.live, CLIP)
        optimizer.step()
        average.update()
        clock.step += 1
        window.add(value.detach(), clock)
    average.install()
    print(f"{name}: {clock.step} steps in {clock.elapsed:.1f} s", flush=True)
    return clock.step


@attrs.define
class Window:
    """Collects losses and prints their mean every few seconds."""

    name: str
    batch: int
    losses: list[Tensor] = attrs.field(factory=list)
    printed: float = attrs.field(factory=time.monotonic)

    def add(self, loss: Tensor, clock: Clock) -> None:
        """Takes one loss; reading it waits for the GPU, so that is done once per line."""
        self.losses.append(loss)
        passed = time.monotonic() - self.printed
        if passed < REPORT_EVERY_S:
            return
        mean, rate = torch.stack(self.losses).mean().item(), len(self.losses) * self.batch / passed
        when = f"{clock.elapsed:6.1f} s  step {clock.step:6d}"
        print(f"{self.name}: {when}  loss {mean:.5f}  {rate:.0f}/s", flush=True)
        self.losses, self.printed = [], time.monotonic()
