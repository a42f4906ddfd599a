"""Run one experiment from a TOML file.

    python experiments/pipeline.py CONFIG [TAG] [--section.key=value ...]
    python experiments/pipeline.py --validate CONFIG [--section.key=value ...]
    python experiments/pipeline.py --chunk i/n CONFIG [TAG] [--section.key=value ...]

CONFIG is a TOML file; TAG names the run's folder under output_dir (default: the config's own tag). Any key can be
overridden by its dotted name; the value is read as TOML, a bare word as a string. --chunk quantizes one of n shares of
the decoder blocks, in any number of processes on one output_dir; whoever finds all shares there goes on to evaluate and
report. Exit status: 0 done, 2 a mistake in the input or a run that cannot fit (one line on stderr says which), 130
interrupted (the same command goes on where it stopped).
"""

from __future__ import annotations

import sys

from lqer.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
