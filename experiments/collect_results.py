"""Merge the runs below a folder into one table (markdown and csv), one page for a browser (report.html) and
perplexity-over-bits plots with their Pareto front.

    python experiments/collect_results.py DIR [--match GLOB] [--out DIR]

DIR is an output_dir whose folders hold results.json; --match picks runs by tag. Files go to --out (default: DIR/table).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lqer.errors import LqerError
from lqer.report.collect import collect, write_collection, write_page
from lqer.report.write import markdown_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--match", default="*", metavar="GLOB")
    parser.add_argument("--out", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        table = collect(arguments.folder, arguments.match)
        out = arguments.out or arguments.folder / "table"
        paths = [*write_collection(table, out), write_page(arguments.folder, arguments.match, out)]
    except LqerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown_table(table.dropna(axis="columns", how="all")))
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
