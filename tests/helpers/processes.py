"""What a program needs that a test starts: JAX has to be asked for devices before it starts."""

from __future__ import annotations

import os


def environment(devices: int) -> dict[str, str]:
    """Returns this process' variables, flags of XLA included, for so many devices of the CPU."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
