from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuctl import protocol
from gpuctl.errors import BY_CODE, BadRequest

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
GOLDEN = re.findall(r"```json\n(.*?)\n```\n```hex\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("meaning", "hexadecimal"), GOLDEN)
def test_the_documents_bytes_are_the_protocols(meaning, hexadecimal):
    version, body = (bytes.fromhex(line) for line in hexadecimal.splitlines())
    fields = json.loads(meaning)
    assert version == protocol.VERSION
    assert msgpack.packb(fields) == body
    request = protocol.request_from_map(protocol.decode_map(body))
    assert (request.op, request.id) == (fields["op"], fields["id"])


def test_there_are_golden_bytes():
    assert len(GOLDEN) >= 2


@pytest.mark.parametrize("cls", protocol.REQUESTS.values(), ids=lambda cls: cls.op)
def test_every_request_and_field_is_in_the_document(cls):
    assert re.search(rf"\*\*{cls.op}\*\*|`{cls.op}`", PAGE)
    for field in dataclasses.fields(cls):
        assert f"`{field.name}`" in PAGE, f"{cls.op}.{field.name}"


@pytest.mark.parametrize("code", BY_CODE)
def test_every_error_code_is_in_the_document(code):
    assert f"| `{code}` | {BY_CODE[code].exit_status} |" in PAGE


def filled(cls):
    """A request with a value for whatever has no default."""
    none = dataclasses.MISSING
    required = [
        each.name
        for each in dataclasses.fields(cls)
        if each.default is none and each.default_factory is none
    ]
    return cls(**dict.fromkeys(required, "x"))


@pytest.mark.parametrize("cls", protocol.REQUESTS.values(), ids=lambda cls: cls.op)
def test_every_request_survives_the_wire(cls):
    request = filled(cls)
    version, body = protocol.encode(request)
    assert version == protocol.VERSION
    again = protocol.request_from_map(protocol.decode_map(body))
    assert (type(again), vars(again)) == (cls, vars(request))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"op": "load"}, "model"),
        ({"op": "load", "model": 3}, "model"),
        ({"op": "load", "model": "a", "gups": [0]}, "gups"),
        ({"op": "load", "model": "a", "gpus": ["0"]}, "gpus"),
        ({"op": "load", "model": "a", "serial": 1}, "serial"),
        ({"op": "unload", "to": "moon"}, "moon"),
        ({"op": "ping", "id": ""}, "length of id is 0"),
        ({"op": "ping", "id": "x" * 65}, "length of id is 65"),
        ({"op": "generate", "model": "a", "count": 0}, "count is 0; 1 to 64 are allowed"),
        ({"op": "generate", "model": "a", "seed": -1}, "seed is -1"),
        ({"op": "nope"}, "nope"),
        ({}, "None"),
    ],
)
def test_wrong_requests_are_named(fields, says):
    with pytest.raises(BadRequest, match=says):
        protocol.request_from_map(fields)


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x81\xa1a",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
        msgpack.packb({"op": "status", b"a": 2}),
        msgpack.packb({"a": {b"b": 2}}),
        msgpack.packb({"a": nested(17)}),
        msgpack.packb({"a": [[]] * 10_001}),
        msgpack.packb({"a": msgpack.ExtType(1, b"x")}),
        msgpack.packb({"a": "x" * 70_000}),
        msgpack.packb({"a": 1}) + b"x",
        b"\x81\xa1a\xa1\xff",
    ],
)
def test_bad_bytes_are_a_bad_request(body):
    with pytest.raises(BadRequest):
        protocol.decode_map(body)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(body):
    _try(body)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
REQUESTS = protocol.REQUESTS.values()
names = sorted({each.name for cls in REQUESTS for each in dataclasses.fields(cls)})


@settings(suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(
    op=st.sampled_from(list(protocol.REQUESTS)),
    fields=st.dictionaries(st.sampled_from(names), values, max_size=6),
)
def test_well_formed_nonsense_raises_nothing_else(op, fields):
    _try(msgpack.packb({"op": op, **fields}))


@given(
    request=st.sampled_from(list(REQUESTS)),
    place=st.integers(0, 60),
    byte=st.integers(0, 255),
)
def test_a_changed_byte_raises_nothing_else(request, place, byte):
    body = bytearray(protocol.encode(filled(request))[1])
    body[place % len(body)] = byte
    _try(bytes(body))


def _try(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        protocol.request_from_map(protocol.decode_map(body))
