import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from labs_common import cli
from labs_common.options import RunOptions
from labs_common.report.classes import Predictions, wilson_interval
from labs_common.report.figures import bar_figure, curve_figure, histogram_figure, loss_figure
from labs_common.report.page import Code, Figure, Section, Table, Text, write_report
from labs_common.report.sections import asked_section, structure_of
from labs_common.run import Run


class Page(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_one_file_without_network_or_markup_from_data(tmp_path: Path) -> None:
    svg = curve_figure({"a": ([1, 2], [3.0, 4.0])}, "step", "loss")
    rows = [("<script>alert(1)</script>", 1234, 0.5, None, True)]
    blocks = [Text("متن فارسی"), Table(("x", "n", "f", "none", "flag"), rows), Figure(svg, "A figure."), Code("a && b")]
    path = write_report(Run(tmp_path), "Title", "Summary", [Section("One", blocks)])
    html = Path(path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 1, "that of the page itself, which sorts tables"
    assert all(address.startswith("#") for address in page.addresses), "nothing is fetched"
    assert "<script>alert(1)</script>" in page.texts
    assert {"1,234", "0.500", "–", "yes", "a && b"} <= set(page.texts)
    assert 'dir="auto"' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "Vazirmatn" in html


def test_figures_take_the_pages_colour_and_are_reproducible() -> None:
    figures = [
        lambda: curve_figure({"a": ([1, 2], [3, 4]), "b": ([1, 2], [1, 10])}, "x", "y", log_up=True),
        lambda: histogram_figure([1, 2, 2, 3], "length"),
        lambda: bar_figure(
            {"lora": {"before": 0.1, "after": 0.5}, "full": {"before": 0.1, "after": 0.6}}, "share", 1.0
        ),
    ]
    for figure in figures:
        svg = figure()
        assert svg == figure()
        assert "currentColor" in svg
        assert ET.fromstring(svg).tag.endswith("svg")


def test_first_steps_and_peaks_do_not_squash_the_loss() -> None:
    steps = list(range(1, 401))
    values = [1000 / step for step in steps[:8]] + [2 + (step % 7) / 10 for step in steps[8:]]
    values[200] = 500.0
    svg = loss_figure((steps, values), {"validation": ([0, 100, 400], [900.0, 3.0, 2.0])})
    ticks = [float(found) for found in re.findall(r">([\d.]+)</text>", svg)]
    assert {2.2, 2.8} <= set(ticks), "the axis shows what lies between 2 and 3"
    assert 500 not in ticks, "and neither the peak nor the first steps"


@pytest.mark.parametrize("values", [[], [1.0], [float("nan")] * 40, [2.0] * 60])
def test_any_losses_make_a_figure(values: list[float]) -> None:
    steps = list(range(len(values)))
    assert ET.fromstring(loss_figure((steps, values), {"validation": (steps[:2], values[:2])})).tag.endswith("svg")


def test_the_interval_of_a_share_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 7), (3, 10), (199, 200)):
        expected = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
        assert wilson_interval(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_predictions_are_sklearns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    found = Predictions(generator.dirichlet(np.ones(4), 60), generator.integers(0, 3, 60))  # none is of the last class
    assert found.accuracy == metrics.accuracy_score(found.labels, found.said)
    assert found.loss == pytest.approx(metrics.log_loss(found.labels, found.probabilities, labels=range(4)))
    assert np.array_equal(found.confusion(), metrics.confusion_matrix(found.labels, found.said, labels=range(4)))


def test_a_network_is_a_stack_of_its_parts_with_equal_layers_taken_together() -> None:
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(3)]
    network = torch.nn.Sequential()
    network.stem, network.blocks, network.head = (
        torch.nn.Linear(2, 4),
        torch.nn.Sequential(*layers),
        torch.nn.Linear(4, 3),
    )
    network.stem.requires_grad_(False)
    layers[2][0].requires_grad_(False)
    found = structure_of(network)
    assert [(row.name, row.times) for row in found.rows] == [
        ("stem", 1),
        ("blocks.0 – blocks.1", 2),
        ("blocks.2", 1),
        ("head", 1),
    ]
    assert [(cell.trained, cell.fixed) for cell in found.rows[2].cells] == [(0, 20), (8, 0)]
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters()) == 12 + 3 * 28 + 15
    assert found.trainable == found.parameters - 12 - 20


@dataclass
class Options:
    width: int = 3
    rate: float | None = None
    depth: int = 2
    run: RunOptions = field(default_factory=RunOptions)


def test_what_was_chosen_stands_apart_from_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also in a run that was resumed, whose config has both."""
    asked = RunOptions(output=tmp_path / "run", track="none")
    monkeypatch.setattr(cli, "_given", Options(width=5, run=asked))
    begun = Options(width=5, rate=0.5, run=asked)
    Run.start(begun, asked, "test", Accelerator(cpu=True))
    resumed = replace(begun, run=replace(asked, resume=tmp_path / "run"))
    for config in (begun, resumed):
        monkeypatch.setattr(cli, "_given", Options(width=5, run=asked) if config is begun else resumed)
        first, chosen, every = asked_section(config).blocks
        assert ("--width", "5") in first.rows
        assert chosen.rows == [("--rate", "0.5")]
        assert not {"--rate", "--depth"} & {name for name, _ in first.rows}
        assert {"--rate", "--depth"} <= {name for name, _ in every.rows}
    monkeypatch.setattr(cli, "_given", None)  # a program that calls the function
    assert ("--rate", "0.5") in asked_section(begun).blocks[0].rows
