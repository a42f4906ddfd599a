"""The stages of a run, each a pure step from artifacts to one artifact of the store."""
