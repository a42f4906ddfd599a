"""Errors in the user's input, which the command line prints as one line with exit status 2; and one that is not."""


class LqerError(Exception):
    """A rule was broken by an input: the message states the rule and the value that broke it."""


class ConfigError(LqerError):
    """The configuration, or an override of it, cannot be what the user meant."""


class PluginError(LqerError):
    """A plug-in cannot be imported."""


class ModelError(LqerError):
    """The model cannot be loaded or holds something that cannot be quantized."""


class HubError(ModelError):
    """The model is not on this machine and the hub does not have it or cannot be reached."""


class DataError(LqerError):
    """A dataset cannot be read or is too small for what is asked of it."""


class HubTextError(DataError):
    """The dataset is not on this machine and the hub does not have it or cannot be reached."""


class RunFolderError(LqerError):
    """The folder of a run cannot be written to without destroying something else."""


class ExportError(LqerError):
    """A checkpoint cannot be written for a target."""


class DifferentExportError(ExportError):
    """What was written for a target cannot be read back or is not the checkpoint."""


class StoreError(LqerError):
    """An artifact on disk is damaged or is not what its name says."""


class RunFailedError(Exception):
    """A run ended with an exception that no input explains: the message names the log with the traceback."""


class LostProcessError(RunFailedError):
    """A process that did a part of the work was killed: done again, it goes on from what is stored."""
