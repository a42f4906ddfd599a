"""The section [cluster]: never a part of what a run makes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lqer.config.section import Positive, Section

LOCAL = "local"
# Ray gives out a GPU in ten-thousandths.
SHARES_OF_A_GPU = 10_000


def _whole_above_one(gpus: float) -> float:
    """Raise ValueError for parts of several GPUs, which Ray gives to nobody."""
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("must be a whole number, or a fraction below 1")
    return gpus


class ClusterConfig(Section):
    """Where the jobs of a run or a sweep are done."""

    # "off": this process, without Ray. "local": the GPUs of this machine. "auto": the running Ray cluster.
    # "host:port": the cluster of that head.
    address: Annotated[str, Field(min_length=1)] = "off"
    # GPUs of a worker; a fraction shares a card. Without GPUs in the cluster, a worker has CPUs alone.
    gpus_per_job: Annotated[float, Field(ge=1 / SHARES_OF_A_GPU), AfterValidator(_whole_above_one)] = 1
    # Threads of a worker; without GPUs in the cluster, also what Ray reserves for it.
    cpus_per_job: Positive = 4
    # "shared": output_dir is one folder that all nodes see. "driver": only the driver sees it, files
    # travel. Absent: "shared" on this machine alone, else "driver".
    store: Literal["driver", "shared"] | None = None
    # Processes of one machine that do a job together; "node": as many as it sees GPUs.
    gang: Positive | Literal["node"] = 1
    # What one job quantizes, where blocks do not depend on each other: neighbouring blocks, or a single linear. "auto":
    # a linear where the longest one of the model takes long.
    split: Literal["auto", "blocks", "linears"] = "auto"
    # How often a job is done again whose worker was lost.
    retries: Annotated[int, Field(ge=0)] = 3

    def workers_on(self, gpus: int) -> int:
        """How many workers a machine with that many GPUs has room for; a fraction is a share of a single card."""
        if self.gpus_per_job >= 1:
            return gpus // int(self.gpus_per_job)
        return gpus * (SHARES_OF_A_GPU // round(SHARES_OF_A_GPU * self.gpus_per_job))

    @property
    def card_share(self) -> float:
        """How much of a GPU's memory a worker has, of each that it has."""
        return min(1.0, self.gpus_per_job)

    @property
    def shares_folder(self) -> bool:
        """Whether workers see output_dir."""
        return self.store == "shared" or (self.store is None and self.address == LOCAL)
