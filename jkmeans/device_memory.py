"""How much room the devices have."""

import os

from jkmeans import processes


def device_room(mesh) -> float:
    """Bytes that examples may take on a device: what is left after networks and banks.

    The least that any of the processes has.

    Args:
      mesh: of the devices.
    """
    local = [device for device in mesh.devices.flat if device.process_index == processes.number()]
    # A CPU's devices share the memory of their host, and so do the processes on it.
    n_sharing = len(local) * processes.n_on_this_host()
    return min(processes.gather(_room(local[0], n_sharing)))


def device_memory(mesh) -> int:
    """Bytes that a device of this process has in all; a CPU's has those of its host."""
    me = processes.number()
    # None where there are more processes than devices, which is refused elsewhere.
    device = next((d for d in mesh.devices.flat if d.process_index == me), None)
    statistics = (device.memory_stats() or {}) if device else {}
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return statistics.get("bytes_limit", pages)


def _room(device, n_devices: int) -> float:
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return 0.6 * (statistics["bytes_limit"] - statistics.get("bytes_in_use", 0))
    # macOS does not say how much is free.
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0.5 * free / n_devices
