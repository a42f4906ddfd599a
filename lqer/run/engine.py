"""Runs and sweeps where [cluster] says: in this process, each run of a sweep in one of its own, or by Ray's workers.

What belongs to a cluster is imported only where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

from lqer.config import Config
from lqer.config.sweep import SweepPlan
from lqer.errors import ConfigError
from lqer.report.sweep import TABLE_FOLDER
from lqer.results import Results
from lqer.run import pipeline
from lqer.run.chunks import Chunk
from lqer.run.sweep import SweepOutcome, run_sweep
from lqer.run.sweep_process import InAProcess


def run(config: Config, plugins: Sequence[str] = (), chunk: Chunk | None = None) -> Results | None:
    """Run the experiment and write its folder, as `pipeline.run_chunk` does. None while other chunks are missing.

    Raises ConfigError for a chunk on a cluster.
    """
    if config.ray is not None:
        if chunk is not None:
            raise ConfigError("--chunk: a cluster shares out the blocks itself; leave out one of the two")
        from lqer.run.cluster import fill_store

        fill_store(config, plugins)
    return pipeline.run_chunk(config.alone, chunk)


def sweep(plan: SweepPlan, tag: str, plugins: Sequence[str] = ()) -> SweepOutcome:
    """Run what is missing of a sweep with this tag."""
    cluster = plan.runs[0].config.ray
    if cluster is None:
        return run_sweep(plan, InAProcess(plugins))
    from lqer.run.cluster import sweep_on_cluster

    return sweep_on_cluster(plan, cluster, plan.output_dir / TABLE_FOLDER.format(tag=tag), plugins)
