"""Sentences into which the name of a class is put."""

from pathlib import Path

from labs_common.errors import LabError

PLAIN = ("a photo of a {}.",)
SHORT = (
    "a photo of a {}.",
    "a close photo of a {}.",
    "a small photo of the {}.",
    "a blurry picture of a {}.",
    "a picture of one {}.",
    "there is a {} in the picture.",
    "a {}",
)


def templates_of(kind: str) -> list[str]:
    """The templates that --templates names: plain, short, openai, or those of a file.

    Raises:
        LabError: the file cannot be read, or a line of it has no place for the name.
    """
    if kind in ("plain", "short"):
        return list(PLAIN if kind == "plain" else SHORT)
    if kind == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    found = lines_of(Path(kind), "--templates")
    for line in found:
        if line.count("{}") != 1:
            raise LabError(f"--templates {kind}: “{line}” must have one {{}} for the name of the class")
    return found


def lines_of(file: Path, option: str) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        LabError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise LabError(f"{option} {file}: cannot be read ({reason})") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise LabError(f"{option} {file}: holds no line of text")
    return found


def filled(template: str, name: str) -> str:
    """The sentence about a class; `a` becomes `an` where the name asks for it."""
    said = name.replace("_", " ")
    if said[:1].lower() in tuple("aeiou"):
        template = template.replace("a {}", "an {}")
    return template.replace("{}", said)
