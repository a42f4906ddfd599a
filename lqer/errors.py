"""Errors of the user's making: the command line prints their one line and exits with status 2."""


class LqerError(Exception):
    """A rule was broken by an input: the message states the rule and the value that broke it."""


class ConfigError(LqerError):
    """The configuration, or an override of it, cannot be what the user meant."""


class ModelError(LqerError):
    """The model cannot be loaded or holds something that cannot be quantized."""


class HubError(ModelError):
    """The model is not on this machine and the hub does not have it or cannot be reached."""


class DataError(LqerError):
    """A dataset cannot be read or is too small for what is asked of it."""


class RunFolderError(LqerError):
    """The folder of a run cannot be written to without destroying something else."""


class StoreError(LqerError):
    """An artifact on disk is damaged or is not what its name says."""
