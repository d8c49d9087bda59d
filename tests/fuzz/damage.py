"""Ways to damage bytes and trees, drawn from a random generator: the same seed gives the same damage."""

from __future__ import annotations

import datetime
import math
import os
import pickle
import random
from collections.abc import Callable, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

TEXTS = (
    "", " ", "0", "-1", "nan", "1e400", "true", "None", "..", "../..", "/", "a/b", "~", "%s", "${HOME}", "$(id)",
    "a\nb", "a\tb", "é", "日本", "🙂", "\u202eabc", "\ufeffx", "\u0000", "x" * 300, "N/0", "N/10", "0:8", "a:b",
    "os:system", "small_conv_net ", "RESNET20", "resnet20", "wrn_16_1", "float64", "Grow", "idx", "csv",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 7, 8, 10, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, -1.0, 0.5, 1.0, 1.5,
    1e-320, 1e-30, 1e30, 1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip


def junk(draw: random.Random, depth: int = 0) -> Any:
    """Return a value of any TOML type."""
    kind = draw.randrange(7 if depth < 2 else 5)
    if kind == 0:
        return draw.choice(TEXTS)
    if kind == 1:
        return draw.choice([True, False])
    if kind in {2, 3}:
        return draw.choice(NUMBERS)
    if kind == 4:
        return draw.choice([datetime.date(2020, 2, 29), datetime.datetime(2020, 1, 1), datetime.time(1, 2)])
    if kind == 5:
        return [junk(draw, depth + 1) for _ in range(draw.choice([0, 1, 2, 3, 9]))]
    return {draw.choice(["x", "name", "lr", "é", "a b", ""]): junk(draw, depth + 1) for _ in range(draw.randrange(3))}


def any_place(draw: random.Random, tree: Any) -> tuple[Any, Any]:
    """Return a container within a tree of dicts and lists, and one of its keys or indices."""
    places: list[tuple[Any, Any]] = []
    open_ = [tree]
    while open_:
        node = open_.pop()
        keys = list(node) if isinstance(node, MutableMapping) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], (MutableMapping, MutableSequence)) and node[key]:
                open_.append(node[key])
    return draw.choice(places)


def damage_tree(draw: random.Random, tree: Any) -> str:
    """Damage a tree in place, one to three times; return a description."""
    damage = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        if not tree:
            break
        node, key = any_place(draw, tree)
        what = draw.choice(["drop", "junk", "junk", "text", "negate", "add", "nest"])
        damage.append(f"{what} {key!r}")
        if what == "drop":
            del node[key]
        elif what == "junk":
            node[key] = junk(draw)
        elif what == "text":
            node[key] = str(node[key])
        elif what == "negate" and isinstance(node[key], (int, float)):
            node[key] = -node[key]
        elif what == "nest":
            node[key] = [node[key]]
        elif isinstance(node, MutableMapping):
            node[draw.choice(["x", "lr", "é", "a b", "naem"])] = junk(draw)
    return ", ".join(damage)


# --- bytes ---------------------------------------------------------------------------------------


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flip(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 1, 4, 32])):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _flip_head(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 2, 8])):
        damaged[draw.randrange(min(len(data), 128))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    return bytes(damaged)


def _flip_tail(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.choice([1, 2, 8])):
        damaged[-1 - draw.randrange(min(len(data), 256))] = draw.choice([0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    return bytes(damaged)


def _zero(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.choice([1, 16, 512, 4096])
    return data[:start] + bytes(len(data[start : start + size])) + data[start + size :]


def _insert(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + draw.randbytes(draw.choice([1, 3, 64])) + data[start:]


def _remove(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.choice([1, 3, 64]) :]


def _swap(data: bytes, draw: random.Random) -> bytes:
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def _twice(data: bytes, draw: random.Random) -> bytes:
    return data + data[draw.randrange(len(data)) :]


def _foreign(data: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        [b"", b"\0", b"\n", b"#!/bin/sh\nid\n", b"\xff" * 64, pickle.dumps(os.getcwd), b"{}", b"[]", b"null", b"1",
         b'""', b"[" * 3000, b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(1024), draw.randbytes(512),
         "﻿ünïcode\n".encode(), b"a,b,c\n1,2\n", b"NaN\n", b"\x89PNG\r\n\x1a\n", b"PAR1PAR1"]
    )  # fmt: skip


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut, _flip, _flip, _flip_head, _flip_head, _flip_tail, _zero, _insert, _remove, _swap, _twice, _foreign
)  # fmt: skip


def damage_bytes(draw: random.Random, path: Path) -> str:
    """Damage a file; return a description."""
    way = draw.choice(WAYS)
    data = path.read_bytes()
    path.write_bytes(way(data, draw) if data else _foreign(data, draw))
    return f"{way.__name__.strip('_')} {path}"


def damage_entry(draw: random.Random, path: Path) -> str:
    """Replace a file with something else; return a description."""
    what = draw.choice(["nothing", "a folder", "a pipe", "a link to itself", "a link to nowhere", "a device"])
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a link to nowhere":
        path.symlink_to("/nowhere/at/all")
    elif what == "a device":
        path.symlink_to("/dev/zero")
    return f"{what} for {path}"
