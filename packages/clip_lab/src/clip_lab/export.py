"""Writes a model in another library's format: `python -m clip_lab.export --to open_clip`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.export()

from clip_lab.config import FINISHED, TRAIN, ExportConfig
from clip_lab.saved import FORMATS, load_model
from labs_common.lock import new_folder
from labs_common.run import newest_run


def export(config: ExportConfig) -> None:
    """Reads the model and writes it to --output.

    Raises:
        LabError: there is no model, the other library has no such towers, or the directory exists.
    """
    new_folder(config.output, config.output)  # locked: another export may be on its way there
    loaded = load_model(config.checkpoint or newest_run(FINISHED, TRAIN))
    FORMATS[config.to].write(loaded, config.output)
    print(f"written: {config.output}")
    print(f"read it: {FORMATS[config.to].read.format(config.output)}")
