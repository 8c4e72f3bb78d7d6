"""Disks so small that they can be filled."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_DISK_BYTES = 2**27


@contextlib.contextmanager
def small_disk(folder: Path, small: bool) -> Iterator[None]:
    """A folder on a disk of its own, small enough to be filled, where one is wanted."""
    folder.mkdir(parents=True)
    if small:
        _mount(folder)
    try:
        yield
    finally:
        if small:
            _unmount(folder)


def _mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    return False


def _unmount(folder: Path) -> None:
    """Takes the disk away; nothing happens where there is none."""
    subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether a disk can be mounted at a folder, which takes the rights of root."""
    folder.mkdir(parents=True, exist_ok=True)
    possible = _mount(folder)
    if possible:
        _unmount(folder)
    folder.rmdir()
    return possible


def remove(folder: Path) -> None:
    """Removes a folder, and the disk that a round which was cut has left there."""
    if folder.exists():
        _unmount(folder)
        shutil.rmtree(folder)
