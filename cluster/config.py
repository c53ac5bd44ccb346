"""The `cluster` section of a recipe."""

from typing import Annotated

from pydantic import Field

from cluster.section import Section, Unit


class Cluster(Section):
    """Which Ray a run uses, and how much of this machine a local one takes."""

    address: str = Field(default="local", min_length=1, max_length=2000)
    """`local` starts a Ray of its own and stops it at the end; else the address of a running cluster (`auto`, `ray://host:10001`). Inside a submitted job the job's cluster is used."""
    cpus: int | None = Field(default=None, ge=1, le=4096)
    """CPUs of a local Ray; by default every core that this process may use."""
    gpus: int | None = Field(default=None, ge=0, le=64)
    """GPUs of a local Ray; by default every one that it finds."""
    object_store_mib: Annotated[int | None, Unit("in MiB")] = Field(default=None, ge=128, le=1_048_576)
    """Shared memory of a local Ray's object store, in MiB; by default 30% of the memory. It is taken as it is used."""
