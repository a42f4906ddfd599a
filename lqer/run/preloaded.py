"""What the server of a sweep's processes imports. Ctrl-C ends it without a word: the sweep says that it was."""

from lqer.run.imports import heavy_imports

with heavy_imports(said=""):
    import lqer.report.write
    import lqer.run.pipeline  # noqa: F401
