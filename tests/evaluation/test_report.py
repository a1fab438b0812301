import math
import re
from pathlib import Path

import pytest
from evaluation.support import ROWS, Page, results, training_log, write_run

from softtrellis.evaluation.report import format_table, verdict, write_report
from softtrellis.evaluation.run_log import Comparison, read_run

PNG = b"\x89PNG\r\n\x1a\n"


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


@pytest.mark.parametrize("known", [True, False])
def test_text_is_called_held_out_where_that_is_known(tmp_path: Path, known: bool) -> None:
    content = results() | ({"held_out": True} if known else {})
    write_report(write_run(tmp_path, content=content))
    _, page = read_page(tmp_path)
    assert ("on held-out text" in page.text) == known


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


def test_held_out_kl_is_drawn_where_it_was_logged(tmp_path: Path) -> None:
    log = training_log(20)
    for record in log[::10]:
        record |= {"heldout_kl": 0.6, "heldout_kl_hard": 0.7, "tokens": 4096, "skipped": 0}
    write_report(write_run(tmp_path, log))
    _, page = read_page(tmp_path)
    assert "windows that the training does not see" in page.text


def test_report_under_another_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", training_log(10))
    target = tmp_path / "page.html"
    assert write_report(run, target) == target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.png", "run"]
    assert [path.name for path in run.iterdir()] == ["log.jsonl"]


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
    assert "on this text" in text
    assert "on held-out text" in verdict(comparison, held_out=True)[1]
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
    assert run.series("loss") == ([2, 3], [1.0, 5.0])  # counted from 1
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
