"""Run one experiment from a TOML file.

    python experiments/pipeline.py CONFIG [TAG] [--section.key=value ...]
    python experiments/pipeline.py --validate CONFIG [--section.key=value ...]
    python experiments/pipeline.py --chunk i/n CONFIG [TAG] [--section.key=value ...]
    python experiments/pipeline.py --plugin FILE.py CONFIG [TAG] [--section.key=value ...]

CONFIG is a TOML file or preset:NAME. TAG names the run's folder under output_dir (default: the config's own tag). Any
key can be overridden by its dotted name; the value is read as TOML, a bare word as a string. --chunk quantizes one of n
chunks of the decoder blocks, in any number of processes on one output_dir; the last one to finish evaluates and
reports. --plugin, repeatable, loads a Python file with methods, roundings or formats of your own. Exit status: 0 done,
2 a mistake in the input or a run that cannot fit (one line on stderr says which), 130 interrupted (rerun the same
command to resume).
"""

from __future__ import annotations

import sys

from lqer.cli import main
from lqer.run.outcome import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:], usage=__doc__))
