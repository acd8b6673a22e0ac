"""What changed between two reports: found where it is, and not where there is only noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlp_deploy.bench.compare import compare, compare_reports, to_markdown
from dlp_deploy.bench.report import Evaluated, OutputAgreement, Report, read_report, to_json
from dlp_deploy.cli import main
from dlp_deploy.errors import UserError

from .bench_reports import DENSE, SPARSE, report


def noisy(milliseconds: float, seed: int) -> np.ndarray:
    """Times [8, 30] that vary by token and by round."""
    random = np.random.default_rng(seed)
    return milliseconds * np.exp(random.normal(0, 0.02, (8, 1)) + random.normal(0, 0.04, (8, 30)))


def test_the_same_machine_measured_twice_is_within_noise() -> None:
    before = report({DENSE: noisy(40, 1), SPARSE: noisy(10, 2)})
    after = report({DENSE: noisy(40, 3), SPARSE: noisy(10, 4)})
    changes = compare_reports(before, after)
    assert changes.facts == changes.runs == ()
    found = (*changes.latencies, *changes.first_tokens, *changes.speedups)
    assert [change.verdict for change in found] == ["within noise"] * 5


def test_a_change_is_found_with_its_size_and_its_direction() -> None:
    before = report({DENSE: noisy(40, 1), SPARSE: noisy(10, 2)})
    after = report({DENSE: noisy(40, 3), SPARSE: noisy(8, 4)}, kernel="7")
    changes = compare_reports(before, after)
    dense, sparse = changes.latencies
    assert dense.verdict == "within noise"
    assert sparse.verdict == "lower"
    assert sparse.ratio.interval is not None
    assert sparse.ratio.interval[0] < 0.8 < sparse.ratio.interval[1]
    assert [change.verdict for change in changes.first_tokens] == ["within noise", "lower"]
    (speedup,) = changes.speedups
    assert speedup.name == f"{SPARSE} over {DENSE}"
    assert speedup.verdict == "higher"
    assert [(fact.name, fact.before, fact.after) for fact in changes.facts] == [
        ("environment.kernel", "6", "7")
    ]
    text = to_markdown(changes)
    assert "| environment.kernel | 6 | 7 |" in text
    assert "higher |" in text


def test_memory_size_quality_and_errors_are_set_side_by_side() -> None:
    quality = {"perplexity": 20.0, "perplexity_stderr": 1.0, "peak_rss_bytes": 500_000_000}
    check = OutputAgreement(
        max_rel_error=0.02,
        mean_rel_error=0.01,
        greedy_match=1,
        positions=33,
        limited="mean_rel_error",
        limit=0.02,
    )
    before = with_fields(report({SPARSE: noisy(10, 1)}), output_check=check, **quality)
    worse = check.model_copy(update={"max_rel_error": 0.03})
    changed = {"perplexity": 22.0, "peak_rss_bytes": 600_000_000, "weight_bytes": 90_000_000}
    after = with_fields(before, output_check=worse, **changed)
    assert {
        figure.name.partition(": ")[2]: figure.verdict for figure in compare_reports(before, after).figures
    } == {
        "peak memory, MB": "higher",
        "weights, MB": "lower",
        "max output error": "higher",
        "mean output error": "the same",
        "perplexity": "within its error",
    }
    (perplexity,) = compare_reports(before, with_fields(after, perplexity=24.0)).figures[-1:]
    assert perplexity.verdict == "higher"
    assert perplexity.error == pytest.approx(2**0.5)
    assert f"| {SPARSE}: perplexity | 20 | 22 | +10.0% | 1.4 | within its error |" in to_markdown(
        compare_reports(before, after)
    )


def test_perplexities_of_different_texts_have_no_verdict() -> None:
    quality = {"perplexity": 20.0, "perplexity_stderr": 1.0}
    text = Evaluated(data="builtin", windows=16, tokens_per_window=512, sha256="abc")
    before = with_fields(report({SPARSE: noisy(10, 1)}), **quality).model_copy(update={"evaluation": text})
    after = with_fields(before, perplexity=40.0)
    assert compare_reports(before, after).figures[-1].verdict == "higher"
    other = after.model_copy(update={"evaluation": text.model_copy(update={"sha256": "def"})})
    assert compare_reports(before, other).figures[-1].verdict == "of different texts"


def test_one_round_has_no_verdict_and_rates_of_the_machine_are_no_facts() -> None:
    before = report({DENSE: noisy(40, 1)[:1], SPARSE: noisy(10, 2)[:1]})
    after = report({DENSE: noisy(40, 3), SPARSE: noisy(8, 4)}, memory_bandwidth_gbps=9.5, peak_int8_gops=1.0)
    changes = compare_reports(before, after)
    assert changes.facts == ()
    assert {change.verdict for change in (*changes.latencies, *changes.speedups)} == {"unknown: one round"}
    assert "| - | unknown: one round |" in to_markdown(changes)


def with_fields(stored: Report, **changes: Any) -> Report:
    """The report with other fields in its only run."""
    (run,) = stored.runs
    return stored.model_copy(update={"runs": (run.model_copy(update=changes),)})


def test_times_of_unlike_work_are_named_before_any_verdict() -> None:
    before = report({SPARSE: noisy(10, 1)})
    after = with_fields(report({SPARSE: noisy(12, 2)}), context=1024, filled_tokens=400)
    changes = compare_reports(before, after)
    assert [(found.name, found.before, found.after) for found in changes.work] == [
        (f"{SPARSE}: context", 512, 1024)
    ]
    text = to_markdown(changes)
    assert text.startswith("Runs of the same name were not given the same work")
    assert f"| {SPARSE}: context | 512 | 1024 |" in text
    assert to_markdown(compare_reports(before, before)).startswith("## Speed-ups")


@pytest.mark.parametrize("changed", [{"model": "other"}, {"artifact": "tiny-s70-again"}])
def test_another_model_under_the_same_names_is_named_before_any_verdict(changed: dict[str, str]) -> None:
    before = report({SPARSE: noisy(10, 1)})
    changes = compare_reports(before, before.model_copy(update=changed))
    ((name, value),) = changed.items()
    assert [(found.name, found.after) for found in changes.work] == [(name, value)]
    text = to_markdown(changes)
    assert text.startswith("Runs of the same name were not given the same work")
    assert text.index(f"| {value} |") < text.index("## Speed-ups")


def test_another_grid_of_the_same_precision_is_named_before_any_verdict() -> None:
    before = with_fields(report({SPARSE: noisy(10, 1)}), block_size=32)
    (found,) = compare_reports(before, with_fields(before, block_size=128)).work
    assert (found.name, found.before, found.after) == (f"{SPARSE}: block_size", 32, 128)
    # Older reports do not tell.
    assert compare_reports(with_fields(before, block_size=None), before).work == ()


def test_runs_of_only_one_report_are_named() -> None:
    before = report({DENSE: noisy(40, 1)})
    after = report({DENSE: noisy(40, 1), SPARSE: noisy(10, 2)})
    (run,) = compare_reports(before, after).runs
    assert (run.name, run.before, run.after) == (SPARSE, None, "ok")


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(to_json(report({DENSE: noisy(40, 1), SPARSE: noisy(10, 2)})))
    assert compare(path, path).facts == ()

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["dlp-deploy", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run("compare", str(path), str(path)) == 0
    assert "within noise" in capsys.readouterr().out
    (tmp_path / "b.json").write_text("{")
    assert run("compare", str(path), str(tmp_path / "b.json")) == 2
    assert "b.json is no bench report" in capsys.readouterr().err
    (tmp_path / "report.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert run("compare", str(tmp_path / "report.png"), str(path)) == 2
    assert "report.png is no bench report, but no text; give a report.json" in capsys.readouterr().err
    # Other words are arguments of the measurement itself.
    assert run(str(tmp_path / "compared")) == 2
    assert "compared is no artifact" in capsys.readouterr().err
    assert run("--no-such-option") == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_ms": []}, "needs samples_ms"),
        ({"ttft_samples_ms": []}, "needs samples_ms and ttft_samples_ms"),
        ({"samples_per_round": 0}, "whole rounds of samples_per_round"),
        ({"samples_per_round": 7}, "whole rounds of samples_per_round"),
    ],
)
def test_a_timed_run_without_its_samples_is_no_report(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stored = json.loads(to_json(report({SPARSE: noisy(10, 1)})))
    stored["runs"][0] |= changes
    (tmp_path / "r.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"r\.json is no bench report: runs\.0: .*{message}"):
        read_report(tmp_path / "r.json")


def test_a_comparison_of_what_was_not_timed_is_no_report(tmp_path: Path) -> None:
    stored = json.loads(to_json(report({DENSE: noisy(40, 1), SPARSE: noisy(10, 1)})))
    path = tmp_path / "r.json"
    path.write_text(json.dumps(stored | {"runs": stored["runs"][:1]}))
    with pytest.raises(UserError, match=f"comparisons need timed runs, and {SPARSE} is none"):
        read_report(path)
    path.write_text(json.dumps(stored | {"runs": [], "comparisons": []}))
    with pytest.raises(UserError, match=r"is no bench report: runs: .* at least 1 item"):
        read_report(path)


def test_a_field_that_is_not_known_yet_is_that_of_a_newer_version(tmp_path: Path) -> None:
    stored = json.loads(to_json(report({SPARSE: noisy(10, 1)})))
    # Fields that came later may be missing from older reports.
    del stored["runs"][0]["block_size"]
    (tmp_path / "old.json").write_text(json.dumps(stored))
    assert read_report(tmp_path / "old.json").runs[0].block_size is None
    stored["runs"][0]["colour"] = "green"
    (tmp_path / "new.json").write_text(json.dumps(stored))
    with pytest.raises(
        UserError, match=r"new\.json has a field runs\.0\.colour, which .* read it with the newer"
    ):
        read_report(tmp_path / "new.json")
