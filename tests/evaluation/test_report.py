import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from softtrellis.evaluation.report import format_table, verdict, write_report
from softtrellis.evaluation.run_log import Comparison, read_run

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = [
    f"model.layers.{i}.{part}"
    for i in range(2)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]
ROWS: list[dict[str, Any]] = [
    {"name": "full precision", "perplexity": 21.63, "kl": 0.0, "bits_per_weight": 32.0, "bytes": 9},
    {"name": "PTQ", "perplexity": 66.4, "kl": 1.0987, "bits_per_weight": 2.04, "bytes": 34_567_890},
    {"name": "BCJR-QAT", "perplexity": 36.51, "kl": 0.5, "bits_per_weight": 2.04, "bytes": 345},
]


def training_log(steps: int = 60, *, measure: bool = True) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def measured(step: int, scale: float) -> dict[str, float]:
        share = (step / steps) ** 2 * 0.03 * scale
        return {
            "drift": 0.08 * scale * (step / steps) ** 0.7,
            "drift_max": 0.5 * scale * (step / steps) ** 0.7,
            "changed_codes": share,
            "changed_tiles": min(1.0, 20 * share),
            "entropy": 2.5 * math.exp(-2 * step / steps),
            "soft_hard_gap": 0.2 * math.exp(-step / steps),
        }

    log = []
    for step in range(steps + 1):
        record: dict[str, Any] = {
            "step": step,
            "loss": 0.4 + 0.7 * math.exp(-4 * step / steps) + rng.gauss(0, 0.03),
            "temperature": 0.1 * 0.3 ** (step / steps),
            "lr": 1e-2,
            "seconds": 1.5 * step,
            "grad_norm": 1.0,
        }
        if measure and step % 5 == 0:
            record |= measured(step, 1.0)
            record["layers"] = {n: measured(step, 0.6 + 0.1 * i) for i, n in enumerate(LAYERS)}
        log.append(record)
    return log


def results(mean: float = -0.6, spread: float = 0.05, windows: int = 40) -> dict[str, Any]:
    rng = random.Random(1)
    tokens = [2047] * windows
    base = [max(0.2, rng.gauss(1.1, 0.2)) for _ in range(windows)]
    scores = {"full precision": [0.0] * windows, "PTQ": base}
    scores["BCJR-QAT"] = [max(0.01, b + mean * rng.uniform(0.6, 1.4)) for b in base]
    return {
        "title": "SmolLM2-135M-Instruct, 2 bits",
        "rows": [dict(row) for row in ROWS],
        "windows": {
            name: {"nll": [3.0 * n for n in tokens], "kl": [k * 2047 for k in kl], "tokens": tokens}
            for name, kl in scores.items()
        },
        "comparisons": [
            {
                "a": "BCJR-QAT",
                "b": "PTQ",
                "metric": "kl",
                "mean": mean,
                "low": mean - spread,
                "high": mean + spread,
            }
        ],
        "predicted_radius": 0.00623,
        "settings": {"L": 12, "profile": "qtip", "layers": "12-17", "lr": 0.01},
        "environment": {"torch": "2.13.0", "cpu": "2 cores"},
    }


def write_run(
    directory: Path,
    log: list[dict[str, Any]] | None = None,
    content: dict[str, Any] | None = None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if log is not None:
        lines = "".join(json.dumps(record) + "\n" for record in log)
        (directory / "log.jsonl").write_text(lines, encoding="utf-8")
    if content is not None:
        (directory / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


class Page(HTMLParser):
    """Collects the tags, the visible text and the attributes that could load something."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(directory: Path) -> tuple[str, Page]:
    text = (directory / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_run(tmp_path_factory.mktemp("run"), training_log(), results())
    assert write_report(directory) == directory / "report.html"
    return directory


def test_full_report_has_every_part(full_run: Path) -> None:
    text, page = read_page(full_run)
    assert "BCJR-QAT beats PTQ" in page.text
    assert "95% interval -0.6500 to -0.5500" in page.text
    for title in (
        "Difference of KL per window",
        "Loss",
        "Temperature",
        "Drift of the latent weights",
        "Changed since the start",
        "Entropy of the marginals",
        "Soft-to-hard gap",
        "changed codes (%)",
    ):
        assert title in page.text
    assert "predicted radius" in page.text
    assert "66.40" in page.text
    assert "34,567,890" in page.text
    assert "1.self_attn.q_proj" in page.text
    assert "qtip" in page.text
    assert "2 cores" in page.text
    assert "$" not in text


def test_every_plot_has_a_spoken_text_and_a_caption(full_run: Path) -> None:
    text, page = read_page(full_run)
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert len(labels) == page.tags.count("figure") == page.tags.count("figcaption") == 8
    assert all(len(label) > 20 for label in labels)
    assert len(set(labels)) == len(labels)


def test_report_loads_nothing_from_outside(full_run: Path) -> None:
    text, page = read_page(full_run)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(target.startswith(("#", "data:")) for target in page.loads)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_plots_take_the_colour_of_the_page(full_run: Path) -> None:
    text, _ = read_page(full_run)
    svgs = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == 8
    for svg in svgs:
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "fill: #ffffff" not in svg


def test_main_plot_is_a_picture_and_nothing_is_left_over(full_run: Path) -> None:
    assert (full_run / "main.png").read_bytes().startswith(PNG)
    names = sorted(path.name for path in full_run.iterdir())
    assert names == ["log.jsonl", "main.png", "report.html", "results.json"]


def test_report_is_the_same_when_written_again(full_run: Path) -> None:
    before = (full_run / "report.html").read_bytes()
    write_report(full_run)
    assert (full_run / "report.html").read_bytes() == before


def test_training_only(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, training_log()))
    _, page = read_page(tmp_path)
    assert "no evaluation that compares two models" in page.text
    assert "Temperature" in page.text
    assert "Results" not in page.text
    assert (tmp_path / "main.png").exists()


def test_evaluation_only(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, content=results()))
    _, page = read_page(tmp_path)
    assert "no training log" in page.text
    assert "BCJR-QAT beats PTQ" in page.text
    assert "Temperature" not in page.text
    assert (tmp_path / "main.png").exists()


def test_rows_without_anything_to_plot_write_no_picture(tmp_path: Path) -> None:
    (tmp_path / "main.png").write_bytes(b"of an older run")
    rows = [{"name": "my model", "perplexity": 12.5, "kl": None}]
    write_report(write_run(tmp_path, content={"rows": rows}))
    _, page = read_page(tmp_path)
    assert "12.50" in page.text
    assert "KL to reference" not in page.text
    assert not (tmp_path / "main.png").exists()


def test_training_that_moved_nothing_still_plots(tmp_path: Path) -> None:
    zero = {"drift": 0.0, "drift_max": 0.0, "changed_codes": 0.0, "changed_tiles": 0.0}
    log = [{"step": 0, "loss": 0.0, "temperature": 0.1, "seconds": 0.0, **zero}]
    write_report(write_run(tmp_path, log, results()))
    _, page = read_page(tmp_path)
    assert "0% of the codes changed" in page.text


def test_diverged_loss_still_reports(tmp_path: Path) -> None:
    log = training_log(10, measure=False)
    for record in log[5:]:
        record["loss"] = math.nan
    content = results()
    content["rows"][2] = {"name": "BCJR-QAT", "perplexity": math.nan, "kl": math.nan}
    content["windows"]["BCJR-QAT"]["kl"][3] = math.inf
    content["comparisons"][0] |= {"mean": math.nan, "low": math.nan, "high": math.nan}
    write_report(write_run(tmp_path, log, content))
    _, page = read_page(tmp_path)
    assert "cannot be compared" in page.text
    assert "not a finite number in 6 steps" in page.text
    assert "Difference of KL" not in page.text


def test_strings_from_the_run_are_escaped(tmp_path: Path) -> None:
    content = results()
    evil = '<script>alert("x")</script>'
    content["title"] = evil
    content["settings"] = {evil: evil}
    content["rows"] = [{"name": evil}]
    content["comparisons"][0]["a"] = evil
    content["windows"][evil] = content["windows"]["BCJR-QAT"]
    log = training_log(10, measure=False)
    for record in log:
        record["layers"] = {evil: {"drift": 1.0}, "other": {"drift": 2.0}}
    write_report(write_run(tmp_path, log, content))
    _, page = read_page(tmp_path)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


@pytest.mark.parametrize(
    ("mean", "kind", "words"),
    [
        pytest.param(-0.6, "better", "BCJR-QAT beats PTQ", id="better"),
        pytest.param(0.6, "worse", "BCJR-QAT is worse than PTQ", id="worse"),
        pytest.param(-0.01, "open", "BCJR-QAT is not shown to beat PTQ", id="open"),
    ],
)
def test_verdict(mean: float, kind: str, words: str) -> None:
    comparison = Comparison("BCJR-QAT", "PTQ", "kl", mean, mean - 0.05, mean + 0.05)
    found, text = verdict(comparison, baseline=1.2)
    assert found == kind
    assert text.startswith(words)
    assert f"{mean:+.4f}" in text
    assert ("50.0% of PTQ's" in text) == (kind != "open")


def test_format_table_aligns_and_leaves_out_what_was_not_measured() -> None:
    assert format_table(ROWS).splitlines() == [
        "model           perplexity  KL to reference  bits per weight       bytes",
        "--------------  ----------  ---------------  ---------------  ----------",
        "full precision       21.63           0.0000           32.000           9",
        "PTQ                  66.40           1.0987            2.040  34,567,890",
        "BCJR-QAT             36.51           0.5000            2.040         345",
    ]
    assert format_table([{"name": "a", "perplexity": 2}, {"name": "b"}]).splitlines() == [
        "model  perplexity",
        "-----  ----------",
        "a            2.00",
        "b               –",
    ]


def test_resumed_log_counts_the_later_record_and_a_cut_line_is_mentioned(tmp_path: Path) -> None:
    write_run(
        tmp_path, [{"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 5.0}]
    )
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    run = read_run(tmp_path)
    assert run.series("loss") == ([1, 2], [1.0, 5.0])
    write_report(tmp_path)
    assert "last line of log.jsonl is cut off" in read_page(tmp_path)[1].text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("log.jsonl", "{]\n{}\n", "line 1 is not JSON", id="log-not-json"),
        pytest.param("log.jsonl", '{"loss": 1}\n', "line 1 is not an object", id="log-no-step"),
        pytest.param("results.json", "{", "is not JSON", id="results-not-json"),
        pytest.param("results.json", "[]", "JSON object", id="results-list"),
        pytest.param("results.json", '{"rows": [{}]}', "KeyError: 'name'", id="row-no-name"),
        pytest.param(
            "results.json",
            '{"windows": {"PTQ": {"kl": [1, 2], "tokens": [5]}}}',
            "2 kl but 1 tokens",
            id="windows-lengths",
        ),
    ],
)
def test_damaged_files_are_named_and_nothing_is_written(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path)
    assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_directory_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither"):
        write_report(tmp_path)
