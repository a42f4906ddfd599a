"""What `lqer --help` and `lqer COMMAND --help` print."""

from __future__ import annotations

OVERVIEW = """Post-training quantization of language models.

    lqer run CONFIG [TAG]               run an experiment: calibrate, quantize, evaluate, report
    lqer validate CONFIG                check a configuration, and estimate memory and disk
    lqer sweep SWEEP CONFIG TAG         run the experiments of a sweep, one table at the end
    lqer recommend CONFIG --bits N      the best scheme of an atlas within N bits per weight
    lqer export CHECKPOINT TARGET OUT   write a run's checkpoint for another program, and compare
    lqer ls WHAT                        what a configuration can name; finished runs
    lqer lm-eval run ...                lm-eval's own command line, with the model "lqer"

`lqer COMMAND --help` explains a command; `lqer --version`. CONFIG is a TOML file or preset:NAME (`lqer ls presets`).
Any key of it can be set on the command line: --section.key=value.

Exit status: 0 done, 1 a run failed, 2 a mistake in the input (one line on stderr says which), 130 interrupted.
"""

_OVERRIDES = """    --section.key=value  sets a key of CONFIG; the value is read as TOML, a bare word as a string
    --plugin FILE.py     a Python file with methods, roundings or formats of your own; repeatable
"""

HELP = {
    "run": f"""Run an experiment: calibrate, quantize, evaluate, report.

    lqer run CONFIG [TAG] [--section.key=value ...]

CONFIG is a TOML file or preset:NAME. TAG names the run's folder under output_dir (default: the configuration's own
tag). A second run of the same configuration reuses what is finished; rerun an interrupted one to resume it.

{_OVERRIDES}    --chunk i/n          quantizes one of n chunks of the decoder blocks, in any number of processes on one
                         output_dir; the last one to finish evaluates and reports
""",
    "validate": f"""Check a configuration as a run would, and print the memory and disk that it needs. Nothing is run.

    lqer validate CONFIG [--section.key=value ...]

{_OVERRIDES}    --chunk i/n          also checks that the run can be cut into chunks
""",
    "sweep": f"""Run the experiments of a sweep, then write one table, figures and a page of all of them.

    lqer sweep SWEEP CONFIG TAG [--section.key=value ...]

SWEEP is a TOML file or the name of one that comes with lqer, such as `atlas`; each of its runs is CONFIG with other
keys, under the tag TAG-name. Rerun the same command to resume. Tables and figures are in OUTPUT_DIR/TAG-table.

    --only NAME          runs of this name; shell wildcards; repeatable
    --part NAME          the runs of a part that the sweep file names
    --keep_going=true    goes on after a run that fails
    --parameters.K=value sets a parameter of the sweep
{_OVERRIDES}""",
    "recommend": """Name the best scheme of an atlas within a number of bits or a size.

    lqer recommend CONFIG --bits N | --size 4GB [--run] [--section.key=value ...]

Reads the newest atlas of CONFIG's model under its output_dir; `lqer sweep atlas CONFIG TAG` makes one.

    --bits N             bits per quantized weight, everything stored included
    --size 4GB           size of the checkpoint instead
    --activations N      only schemes whose activations have at most N bits
    --atlas TAG          the sweep of this tag instead of the newest
    --run                where there is no atlas, run its cheap part first
""",
    "export": """Write a run's checkpoint for another program, read it back and compare it with the checkpoint.

    lqer export CHECKPOINT TARGET OUT [--key=value ...]

CHECKPOINT is a run's folder or its checkpoint, TARGET one of `lqer ls targets`, OUT a new folder.

    --key=value          a setting of the target, such as --dtype=bfloat16
    --text FILE          the text to compare on (default: text sampled from the checkpoint)
    --device NAME        where to compare
    --no-check           writes without reading back
    --plugin FILE.py     where the checkpoint has a number format of your own
""",
    "ls": """List what a configuration can name, or finished runs; one line each.

    lqer ls methods | roundings | transforms | formats | statistics | datasets | targets [--plugin FILE.py]
    lqer ls presets [NAME]   configurations that come with lqer: those with NAME, which may have shell wildcards, in
                             their names (default: the recommended ones, those of methods, and folders of others)
    lqer ls runs [FOLDER]    finished runs under FOLDER (default: checkpoints)
""",
}
