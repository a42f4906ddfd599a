"""Run the experiments of a sweep file, then write one table and plots of all of them.

    python experiments/sweep.py SWEEP.toml CONFIG TAG [--only NAME ... | --part NAME] [--section.key=value ...]

SWEEP.toml names the runs (docs/sweeps.md); each is CONFIG with other keys, under the tag TAG-name. Every configuration
is checked before the first run begins. A run of the same configuration that is finished is not run again: rerun the
same command to resume, and to add what a longer sweep file asks for. --only, repeatable, picks runs by name (shell
wildcards), --part those of a part that the file names. Further overrides are those of experiments/pipeline.py, for
every run; --keep_going=true goes on after a run that fails, --parameters.NAME=value sets a parameter of the sweep.
Tables and plots are in OUTPUT_DIR/TAG-table. Exit status: 0 done, 1 a run failed, 2 a mistake in the input, 130
interrupted.
"""

from __future__ import annotations

import sys

from lqer.cli import sweep

if __name__ == "__main__":
    sys.exit(sweep(sys.argv[1:], usage=__doc__))
