"""Progress in a log; the bar of a terminal is rich's."""

import pytest

from labs_common import progress
from labs_common.progress import ProgressLine, tracked

pytestmark = pytest.mark.quick


def test_a_log_has_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with ProgressLine("training", total=10, done=4) as line:  # resumed after four
        for _ in range(6):
            line.advance("loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training 6/10  loss 1.5  40 s left",
        "training 8/10  loss 1.5  20 s left",
        "training 10/10  loss 1.5  60 s",
    ]


def test_only_the_main_process_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked(iter("abc"), "reading", 3, shown=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(tracked(iter("abc"), "reading", 3)) == ["a", "b", "c"]
    assert "reading 3/3" in capsys.readouterr().err
