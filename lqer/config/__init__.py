"""The configuration: what it may say (schema), how it is read (reader), what it means for a linear (plan)."""

from lqer.config.plan import plan_linear
from lqer.config.reader import read_config
from lqer.config.schema import Config

__all__ = ["Config", "plan_linear", "read_config"]
