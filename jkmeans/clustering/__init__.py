"""The job from the shell: cluster a file, write what came out, go on where it stopped.

`cluster` is the one way in. Data that fits into memory lies on the devices and Lloyd's algorithm
runs in programs of some iterations each, between which the job reports, can stop, and is saved
(`memory`). Larger data is streamed by `jkmeans.streaming`, which does the same between its chunks
(`stream`).
"""

from jkmeans.clustering.folder import SUMMARY_FILE
from jkmeans.clustering.job import cluster
from jkmeans.clustering.settings import FIELDS, validate

__all__ = ["FIELDS", "SUMMARY_FILE", "cluster", "validate"]
