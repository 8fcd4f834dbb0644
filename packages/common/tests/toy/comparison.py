"""Two small training runs in processes of their own, started by the tests so that the whole can be stopped."""

from labs_common.compare.plan import claim
from labs_common.compare.processes import finished_runs, start_server
from labs_common.lock import locked
from labs_common.options import ComparisonOptions


def compare(options: ComparisonOptions) -> None:
    from toy.training import ToyConfig

    assert options.output is not None
    planned = {name: ToyConfig(seconds_per_step=0.05) for name in ("first", "second")}
    claim(options.output, options)
    assert locked(options.output) is None
    finished_runs("toy.training", planned, options.output, options)


if __name__ == "__main__":
    from toy import commands

    start_server(None, ["toy.training"])
    commands.comparison()
