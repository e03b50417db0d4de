"""The configuration file: TOML into typed classes, wrong keys refused with line and spelling."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import cattrs

from gpuctl.errors import BadConfig

SEARCH_PATH = ("~/.config/gpuctl/config.toml", "/etc/gpuctl/config.toml")

_SIZE = re.compile(r"\s*([0-9.]+)\s*([KMGT]i?B|B|%)?\s*$")
_UNITS = {"B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
_TIME = re.compile(r"\s*([0-9.]+)\s*(ms|s|m|h)?\s*$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str | int) -> int:
    """Bytes for ``"30GiB"``, ``"64 GB"`` or a plain number of bytes.

    Raises:
        ValueError: not a size.
    """
    match = _SIZE.match(str(text))
    if match is None or match[2] == "%":
        raise ValueError(f"{text!r} is not a size such as 30GiB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def parse_duration(text: str | float) -> float:
    """Seconds for ``"10m"``, ``"1.5s"`` or a plain number of seconds.

    Raises:
        ValueError: not a duration.
    """
    match = _TIME.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 10m or 30s")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def _optional_size(text: str | int | None) -> int | None:
    return None if text is None else parse_size(text)


def _optional_duration(text: str | float | None) -> float | None:
    return None if text is None else parse_duration(text)


def _default_state_dir() -> str:
    base = os.environ.get("XDG_STATE_HOME", "~/.local/state")
    return os.environ.get("STATE_DIRECTORY", f"{base}/gpuctl")


@attrs.frozen(kw_only=True)
class DaemonConfig:
    """``[daemon]``.

    ``devices``: ``"auto"`` (every CUDA GPU) or a list of ``cuda:N``, ``GPU-<uuid>`` and ``cpu``.
    ``host_budget``: most host memory for weights; by default what the machine and its control
    group leave. ``job_queue``: most jobs that wait. ``max_pixels``: largest input image.
    """

    devices: str | list[str] = "auto"
    socket: str | None = None
    state_dir: str = attrs.field(factory=_default_state_dir)
    host_budget: int | None = attrs.field(default=None, converter=_optional_size)
    job_queue: int = 256
    max_pixels: int = 64_000_000
    restore: bool = True
    threads: int | None = None


@attrs.frozen(kw_only=True)
class TcpConfig:
    """``[tcp]``: clients of other machines.

    ``listen``: ``"ADDRESS:PORT"``; nobody listens without it. ``key``: the daemon's own
    ``.key_secret`` file. ``clients``: a name and a public key for each who may enter.
    """

    listen: str | None = None
    key: str | None = None
    clients: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class DeadlineConfig:
    """``[deadlines]``: how long a worker may take before it is stopped and replaced."""

    start: float = attrs.field(default=120.0, converter=parse_duration)
    load: float = attrs.field(default=1800.0, converter=parse_duration)
    unload: float = attrs.field(default=30.0, converter=parse_duration)
    reload: float = attrs.field(default=300.0, converter=parse_duration)
    job_step: float = attrs.field(default=300.0, converter=parse_duration)
    stop: float = attrs.field(default=20.0, converter=parse_duration)


@attrs.frozen(kw_only=True)
class RestartConfig:
    """``[restart]``: how long a worker that ended stays down; doubles from ``min`` to ``max``."""

    min: float = attrs.field(default=1.0, converter=parse_duration)
    max: float = attrs.field(default=60.0, converter=parse_duration)


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """``[models.NAME.adapters.ADAPTER]``: a LoRA that clients may load by name."""

    path: str
    scale: float = 1.0
    preload: bool = False


@attrs.frozen(kw_only=True)
class ModelConfig:
    """``[models.NAME]``: one entry of the catalog.

    ``pipeline``: class name; by default what ``model_index.json`` says. ``defaults``: call
    parameters used where a request names none. ``devices``: GPU numbers the model may use.
    ``keep_alive``: unload after that long without a job.
    """

    path: str
    dtype: str | None = None
    variant: str | None = None
    pipeline: str | None = None
    defaults: dict[str, Any] = attrs.field(factory=dict)
    devices: list[int] | None = None
    keep_alive: float | None = attrs.field(default=None, converter=_optional_duration)
    verify: bool = False
    adapters: dict[str, AdapterConfig] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class PhaseConfig:
    """``[phases.NAME]``: which models are loaded; every other one is unloaded to host memory."""

    loaded: list[str] = attrs.field(factory=list)
    devices: list[int] | None = None


@attrs.frozen(kw_only=True)
class Config:
    """The whole file."""

    daemon: DaemonConfig = attrs.field(factory=DaemonConfig)
    tcp: TcpConfig = attrs.field(factory=TcpConfig)
    deadlines: DeadlineConfig = attrs.field(factory=DeadlineConfig)
    restart: RestartConfig = attrs.field(factory=RestartConfig)
    models: dict[str, ModelConfig] = attrs.field(factory=dict)
    phases: dict[str, PhaseConfig] = attrs.field(factory=dict)
    base_dir: Path = attrs.field(factory=Path.cwd, init=False)

    def with_daemon(self, daemon: DaemonConfig) -> Config:
        """The same configuration with another ``[daemon]``."""
        return _at(attrs.evolve(self, daemon=daemon), self.base_dir)


def _at(config: Config, base_dir: Path) -> Config:
    """Note where relative paths count from; the file itself cannot say that."""
    object.__setattr__(config, "base_dir", base_dir)
    return config


_converter = cattrs.Converter(forbid_extra_keys=True, prefer_attrib_converters=True)
_converter.register_structure_hook(str | list[str], lambda value, _: value)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


def find(flag: str | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: flag, ``$GPUCTL_CONFIG``, the user's, the system's; ``None`` for none.

    Raises:
        BadConfig: the flag or the variable names a file that is not there.
    """
    named = flag or environ.get("GPUCTL_CONFIG")
    if named is not None:
        return _existing(Path(named).expanduser())
    candidates = (Path(place).expanduser() for place in SEARCH_PATH)
    return next((path for path in candidates if path.is_file()), None)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadConfig(f"{path}: no such configuration file")
    return path


def read(path: Path | None) -> Config:
    """Read and check a configuration file; defaults without one.

    Raises:
        BadConfig: unreadable, not TOML, an unknown key or a wrong value; with line and hint.
    """
    if path is None:
        return Config()
    try:
        text = path.read_text()
        config = parse(text)
    except BadConfig as wrong:
        raise BadConfig(f"{path}: {wrong.message}", wrong.hint) from None
    except (OSError, UnicodeDecodeError) as unreadable:
        raise BadConfig(f"{path}: {unreadable}") from None
    return _at(config, path.resolve().parent)


def parse(text: str) -> Config:
    """Structure the text of a configuration file.

    Raises:
        BadConfig: as :func:`read`.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as broken:
        raise BadConfig(f"not TOML: {broken}") from None
    _refuse_unknown(Config, tables, (), text)
    try:
        return _converter.structure(tables, Config)
    except cattrs.BaseValidationError as invalid:
        raise _wrong_value(invalid, text) from None


def _wrong_value(invalid: cattrs.BaseValidationError, text: str) -> BadConfig:
    problems = cattrs.transform_error(invalid, path="", format_exception=_describe)
    what, _, where = problems[0].partition(" @ ")
    keys = tuple(re.findall(r"[\w-]+", where))
    return BadConfig(f"line {_line_of(keys, text)}: {'.'.join(keys)}: {what}")


def _describe(problem: BaseException, kind: type | None) -> str:
    if isinstance(problem, KeyError):
        return f"the key {problem.args[0]!r} is missing"
    if isinstance(problem, ValueError) and str(problem).startswith("'"):
        return str(problem)
    expected = getattr(kind, "__name__", str(kind))
    return f"expected {expected}: {problem}"


def _refuse_unknown(cls: type, table: Any, at: tuple[str, ...], text: str) -> None:
    """Walk the tables beside the classes, so that the first stranger is named with its line."""
    if not isinstance(table, dict):
        raise BadConfig(f"line {_line_of(at, text)}: {'.'.join(at)} must be a table")
    fields = {field.name: field.type for field in attrs.fields(attrs.resolve_types(cls))}
    fields.pop("base_dir", None)
    for key, value in table.items():
        if key not in fields:
            raise _unknown_key(key, at, list(fields), text)
        _descend(fields[key], value, (*at, key), text)


def _descend(kind: Any, value: Any, at: tuple[str, ...], text: str) -> None:
    if attrs.has(kind):
        _refuse_unknown(kind, value, at, text)
    elif (inner := _table_of(kind)) is not None and isinstance(value, dict):
        for name, table in value.items():
            _refuse_unknown(inner, table, (*at, name), text)


def _table_of(kind: Any) -> type | None:
    arguments: tuple[type, ...] = getattr(kind, "__args__", ())
    return arguments[1] if len(arguments) == 2 and attrs.has(arguments[1]) else None


def _unknown_key(key: str, at: tuple[str, ...], known: list[str], text: str) -> BadConfig:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    where = f"[{'.'.join(at)}]" if at else "the file"
    line = _line_of((*at, key), text)
    return BadConfig(f"line {line}: unknown key {key!r} in {where}", hint)


def _line_of(keys: tuple[str, ...], text: str) -> int:
    """The line where a key stands: its own name below the header of its table."""
    if not keys:
        return 1
    lines = text.splitlines()
    header = re.compile(r"\s*\[\s*" + r"\s*\.\s*".join(map(re.escape, keys)) + r"\s*[\].]")
    table = re.compile(r"\s*\[\s*" + r"\s*\.\s*".join(map(re.escape, keys[:-1])) + r"\s*\]")
    entry = re.compile(rf"\s*\"?{re.escape(keys[-1])}\"?\s*=")
    inside = len(keys) == 1
    for number, line in enumerate(lines, start=1):
        if header.match(line) or (inside and entry.match(line)):
            return number
        if line.lstrip().startswith("["):
            inside = bool(table.match(line))
    return 1
