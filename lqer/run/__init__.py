"""One run of an experiment: its context, the checks before any work, the list of stages, its folder."""
