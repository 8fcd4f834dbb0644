"""Finds pictures for sentences, captions for pictures: `python -m clip_lab.retrieve "This is a dog" --data photos`."""

from clip_lab import commands

if __name__ == "__main__":  # before the imports below: --help and a wrong option answer at once
    commands.retrieve()

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_lab.command_config import RetrieveConfig
from labs_common.errors import LabError
from labs_common.options import OnBadData

if TYPE_CHECKING:  # the real imports wait until the command line has been read: --help is fast
    from clip_lab.encoder import Encoder
    from clip_lab.index import Index
    from labs_common.data import CaptionedPictures


def retrieve(config: RetrieveConfig) -> None:
    """Prints what is most similar, and writes a grid as PNG and a page as HTML.

    Raises:
        LabError: nothing is asked for, there is nothing to search, or a picture cannot be read.
    """
    from clip_lab.encoder import load_encoder
    from clip_lab.searching import captions_for, pictures_for, write_found
    from labs_common.data.images import picture_files
    from labs_common.options import RunOptions
    from labs_common.run import Run, check_run_options

    options = RunOptions(output=config.output, track="none")
    check_run_options(options)
    if not config.sentences and not config.picture:
        raise LabError('say what to look for: python -m clip_lab.retrieve "a dog on the beach", or --picture dog.jpg')
    if config.top < 1 or config.batch_size < 1:
        raise LabError("--top and --batch-size must be at least 1")
    files = picture_files(config.picture) if config.picture else []
    encoder = load_encoder(config.checkpoint)
    index, test = searched(config.data, encoder, config.index, config.batch_size, config.on_bad_data)
    found = pictures_for(config.sentences, encoder, index, config.top, config.search) if config.sentences else []
    if files:
        captions = known_captions(config.captions, config.data, test)
        found += captions_for(files, captions, encoder, index, config.top, config.search)
    for one in found:
        print(one.asked)
        for result in one.results:
            print(f"  {result.score:.3f}  {result.said}")
    from accelerate import Accelerator

    run = Run.start(config, options, "retrieve", Accelerator())
    grid, page = write_found(run, config, found)
    print(f"grid: {grid}")
    print(f"page: {page}")


def searched(
    data: Path | None, encoder: "Encoder", kept: Path | None, batch_size: int, on_bad_data: OnBadData = "skip"
) -> "tuple[Index, CaptionedPictures | None]":
    """The index of the folder --data; else of the run's own test pictures, and these.

    Raises:
        LabError: no data is named and the model is no run that knows its pictures; or see `indexed`.
    """
    from clip_lab.index import indexed, pictures_in

    if data is not None:
        files = pictures_in(data)
        return indexed(files, str(data.resolve()), encoder, kept, batch_size, on_bad_data), None
    from clip_lab.config import TrainConfig
    from clip_lab.data import read_data
    from labs_common.cli import config_from_yaml

    file = Path(encoder.name) / "config.yaml"
    if not file.is_file():
        raise LabError(f"--checkpoint {encoder.name}: knows no pictures; name a folder of them with --data")
    trained = config_from_yaml(TrainConfig, file)
    test = read_data(trained.data, trained.run.seed, shown=False).splits["test"]
    return indexed(test.contents, f"test {test.fingerprint()}", encoder, kept, batch_size, on_bad_data), test


def known_captions(file: Path | None, data: Path | None, test: Any) -> list[str]:
    """The sentences among which pictures find theirs: of a file with one per line, or of the data.

    Raises:
        LabError: there are none.
    """
    from clip_lab.templates import lines_of
    from labs_common.data import read_captioned

    if file is not None:
        return list(dict.fromkeys(lines_of(file, "--captions")))
    if test is None:
        try:
            assert data is not None
            test = read_captioned(data, "skip", shown=False)
        except LabError:
            return []  # then similar pictures are all that can be shown
    return list(dict.fromkeys(caption for of in test.captions for caption in of))
