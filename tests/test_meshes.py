"""What one device gives: on a mesh with Auto and with Explicit axes, and in two processes."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import sharding
from tests import mesh_calls

PROGRAM = Path(mesh_calls.__file__)
IN_TWO = (  # rows that take little time, of each kind
    "pattern (global|per_output|n_m)|prune, (eager|jit)|rigl, jit|structured mlp|"
    "compact (mlp odd|scanned wide)|calibrate|oneshot .*|search|density.*"
)


def start(kind: str, pattern: str, devices: int, *more: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(PROGRAM), kind, pattern, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def told(program: subprocess.Popen[str]) -> dict[str, str]:
    try:
        out, err = program.communicate(timeout=600)
    finally:
        program.kill()
    rows = dict(json.loads(line) for line in out.splitlines() if line.startswith("["))
    assert rows and program.returncode == 0, out + err[-2000:]
    return rows


@functools.cache
def on_mesh(kind: str) -> dict[str, str]:
    return told(start(kind, ".*", 8))


@functools.cache
def in_two_processes() -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [start("Auto", IN_TWO, 4, str(process), port) for process in (0, 1)]
    return [told(program) for program in both]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("row", mesh_calls.ROWS)
def test_a_mesh_gives_what_one_device_gives(row: str, kind: str) -> None:
    assert on_mesh(kind)[row] == ""


def test_two_processes_give_what_one_device_gives() -> None:
    for rows in in_two_processes():
        assert len(rows) == 15
        assert {row: found for row, found in rows.items() if found} == {}
