"""The toys, as a lab has its commands."""

from functools import partial

from toy.training import ToyConfig

from labs_common.cli import run_command
from labs_common.options import ComparisonOptions

training = partial(run_command, "toy.training:train", ToyConfig)
comparison = partial(run_command, "toy.comparison:compare", ComparisonOptions)
