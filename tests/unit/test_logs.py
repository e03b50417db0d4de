import logging
import os
import socket
import struct
import sys

import pytest

from gpuctld import logs


def record(message="worker_lost", level=logging.WARNING, exc_info=None, **values):
    made = logging.LogRecord("gpuctld.fleet", level, __file__, 7, message, (), exc_info)
    made.__dict__.update(logs.fields(**values))
    return made


def parse(datagram):
    """Read the native protocol back, as journald would."""
    found = {}
    while datagram:
        head, _, rest = datagram.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[9 + length :]
        found[name.decode()] = value.decode()
        datagram = rest
    return found


def test_a_line_is_the_event_and_its_fields():
    assert logs.line(record(gpu=2, reason="killed by signal 9", path="/a=b", none="")) == (
        'worker_lost gpu=2 reason="killed by signal 9" path="/a=b" none=""'
    )


@pytest.mark.parametrize("text", ["two\nlines", "tab\there", 'quote"d', "esc\x1b[0m"])
def test_a_line_stays_one_printable_line(text):
    assert logs.line(record(text=text)).isprintable()


def test_a_traceback_is_a_field():
    try:
        raise RuntimeError("broken pipe")  # noqa: TRY301
    except RuntimeError:
        made = record(exc_info=sys.exc_info())
    assert "RuntimeError: broken pipe" in logs.record_fields(made)["exception"]
    assert "\n" not in logs.line(made)


@pytest.mark.parametrize(
    ("level", "number"),
    [(10, 7), (20, 6), (25, 6), (30, 4), (40, 3), (50, 2)],
)
def test_priorities(level, number):
    assert logs.priority(level) == number


def test_text_has_a_stamp_and_a_level():
    made = record(gpu=1)
    made.created, made.msecs = 0.5, 500.0
    expected = "1970-01-01T00:00:00.500Z warning gpuctld.fleet: worker_lost gpu=1"
    assert logs.TextFormatter().format(made) == expected


def test_the_prefix_is_the_priority():
    assert logs.PriorityFormatter().format(record(gpu=1)) == "<4>worker_lost gpu=1"


def test_the_journal_gets_fields(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        journal.settimeout(5)
        handler = logs.JournalHandler(tmp_path / "journal")
        handler.emit(record(gpu=2, free_bytes=5, note="a\nb"))
        handler.close()
        got = parse(journal.recv(65536))
    assert got["PRIORITY"] == "4"
    assert got["SYSLOG_IDENTIFIER"] == "gpuctld"
    assert got["GPUCTL_EVENT"] == "worker_lost"
    assert got["GPUCTL_GPU"] == "2"
    assert got["GPUCTL_FREE_BYTES"] == "5"
    assert got["GPUCTL_NOTE"] == "a\nb"
    assert got["MESSAGE"] == r'worker_lost gpu=2 free_bytes=5 note="a\nb"'


def test_large_fields_are_cut():
    got = parse(logs.encode(record(text="x" * 1_000_000)))
    assert len(got["GPUCTL_TEXT"]) == logs.MAX_FIELD
    assert len(got["MESSAGE"]) == logs.MAX_FIELD


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def test_stderr_is_the_journal_only_when_the_inode_agrees(monkeypatch, tmp_path, root_logger):
    with (tmp_path / "err").open("w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        stat = os.fstat(stream.fileno())
        patch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
        patch.setattr(logs, "JOURNAL_SOCKET", tmp_path / "nobody")
        logs.setup("warning")
        logging.getLogger("gpuctld").warning("hot", extra=logs.fields(gpu=0))
        logging.getLogger("gpuctld").info("unseen")
        patch.setenv("JOURNAL_STREAM", "1:1")
        logs.setup("info")
        logging.getLogger("gpuctld").info("seen")
    first, second = (tmp_path / "err").read_text().splitlines()
    assert first == "<4>hot gpu=0"
    assert second.endswith("Z info gpuctld: seen")


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="loud"):
        logs.setup("loud")
