"""Projections: exact where the model is, marked as what they are, and refused without what they need."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_deploy.bench.points import Point, append_point, as_report
from dlp_deploy.bench.project import describe_target, project, project_reports, to_markdown
from dlp_deploy.bench.report import Report, to_json
from dlp_deploy.bench.scaling import fit_parts
from dlp_deploy.errors import UserError

from .bench_reports import DENSE, SPARSE, report


def measured(cores: int, compute: float, serial: float, gigabytes: float = 0.001) -> Report:
    """A report of runs that obey Amdahl's law to the letter."""
    times = np.full((3, 7), compute / cores + serial)
    return report({DENSE: 4 * times, SPARSE: times}, gigabytes, cores=cores)


@given(st.floats(1, 500), st.floats(0, 20), st.lists(st.integers(1, 32), min_size=2, max_size=5, unique=True))
@settings(deadline=None)
def test_amdahls_law_is_recovered(compute: float, serial: float, cores: list[int]) -> None:
    counts = np.array(cores)
    found = fit_parts(counts, compute / counts + serial, np.zeros(len(cores)))
    assert found == pytest.approx((compute, serial), rel=1e-6, abs=1e-6)


@given(
    st.floats(1, 500),
    st.floats(0, 20),
    st.lists(st.integers(1, 32), min_size=2, max_size=5, unique=True),
    st.floats(0.01, 600),
)
@settings(deadline=None)
def test_waiting_for_memory_is_no_serial_part(
    compute: float, serial: float, cores: list[int], memory: float
) -> None:
    counts = np.array(sorted(cores))
    waits = np.full(len(cores), memory)
    times = np.maximum(compute / counts, waits) + serial
    found_compute, found_serial = fit_parts(counts, times, waits)
    fitted = np.maximum(found_compute / counts, waits) + found_serial
    assert fitted == pytest.approx(times, rel=1e-6, abs=1e-6)
    # Where cores are the limit anywhere and memory elsewhere, or nowhere, the parts are known.
    if memory >= compute / counts[0] or (memory <= compute / counts[-1] and len(cores) > 1):
        assert found_serial == pytest.approx(serial, rel=1e-5, abs=1e-5)
    assert found_compute <= max(compute, counts[0] * memory) * (1 + 1e-6)


def test_a_dense_model_that_waits_for_memory_gains_what_more_memory_gives() -> None:
    # 4.1 GB in fp32 where one core reads 9.6 GB/s and two together 17.
    one = report({DENSE: np.full((3, 7), 427.0)}, 4.1, cores=1, memory_bandwidth_gbps=9.6)
    two = report({DENSE: np.full((3, 7), 241.0)}, 4.1, cores=2, memory_bandwidth_gbps=17.0)
    (run,) = project_reports([one, two], describe_target("xeon-6248r", None, None, None)).runs
    assert run.serial_ms == pytest.approx(0, abs=0.2)
    assert run.projected_ms == pytest.approx(4.1 / 0.1126, rel=0.01)


def test_a_projection_takes_the_place_of_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(measured(1, 100, 0)))
    before = path.read_bytes()
    with pytest.raises(UserError, match="is no projection and would be replaced"):
        project([path], machine="xeon-6248r", output=path)
    with pytest.raises(UserError, match=r"ends in \.json"):
        project([path], machine="xeon-6248r", output=tmp_path / "projection.md")
    assert path.read_bytes() == before
    for _ in range(2):
        project([path], machine="xeon-6248r", output=tmp_path / "projection.json")


def test_two_cores_from_one_are_what_two_cores_measure() -> None:
    one, two = measured(1, 100, 0), measured(2, 100, 0)
    projection = project_reports([one], describe_target(None, 2, 20.0, None), checked=two)
    assert [run.error for run in projection.runs] == pytest.approx([0, 0])
    assert [run.bound for run in projection.runs] == ["compute", "compute"]
    (speedup,) = projection.speedups
    assert (speedup.run, speedup.baseline, speedup.speedup) == (SPARSE, DENSE, pytest.approx(4))


def test_a_serial_part_is_seen_with_two_numbers_of_cores() -> None:
    reports = [measured(1, 100, 10), measured(2, 100, 10)]
    projection = project_reports(reports, describe_target(None, 20, 1e6, None))
    sparse = projection.runs[1]
    assert (sparse.compute_ms, sparse.serial_ms) == pytest.approx((5, 10))
    assert any("Amdahl" in line for line in projection.assumptions)
    # One report alone is optimistic, and says so.
    alone = project_reports(reports[:1], describe_target(None, 20, 1e6, None))
    assert alone.runs[1].projected_ms == pytest.approx(110 / 20)
    assert any("optimistic" in line for line in alone.assumptions)


def test_no_number_of_cores_reads_faster_than_the_memory() -> None:
    projection = project_reports([measured(1, 100, 0, gigabytes=1)], describe_target(None, 64, 50.0, 4.0))
    for run in projection.runs:
        assert run.bound == "bandwidth"
        assert run.projected_ms == run.memory_ms == pytest.approx(20)


def test_what_caches_hold_is_not_waited_for_longer_than_a_token_takes() -> None:
    # 2 GB in 110 and 60 ms are about twice what one and two cores read.
    reports = [measured(1, 100, 10, gigabytes=2), measured(2, 100, 10, gigabytes=2)]
    sparse = project_reports(reports, describe_target(None, 20, 1e6, None)).runs[1]
    assert sparse.projected_ms == pytest.approx(110 / 20)


def test_the_clock_scales_what_the_cores_do() -> None:
    projection = project_reports([measured(1, 100, 0)], describe_target(None, 1, 1e6, 4.0))
    assert projection.runs[1].projected_ms == pytest.approx(50)


def test_a_known_machine_is_projected_to_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(measured(1, 100, 0)))
    projection = project([path], machine="xeon-6248r")
    assert (projection.cores, projection.bandwidth_gbps) == (24, pytest.approx(112.6, abs=0.1))
    stored = json.loads((tmp_path / "report.xeon-6248r.json").read_text())
    assert stored["kind"] == "projected"
    text = (tmp_path / "report.xeon-6248r.md").read_text()
    assert text == to_markdown(projection)
    assert text.startswith("# Projected, not measured: xeon-6248r")
    assert all(line in text for line in projection.assumptions)


def test_a_known_machine_with_other_figures_is_told_as_such() -> None:
    target = describe_target("xeon-6248r", 12, None, None)
    assert target.cores == 12
    assert target.source.endswith("; but with 12 cores, as given")
    assert "but with" not in describe_target("xeon-6248r", None, None, None).source


def test_runs_that_waited_for_memory_and_an_unknown_clock_are_named_among_the_assumptions() -> None:
    # 0.5 GB in 100 ms are half of the memory's 10 GB/s, and all of it in 50 ms.
    one = report({DENSE: np.full((3, 7), 50.0), SPARSE: np.full((3, 7), 100.0)}, 0.5, clock_ghz=None)
    lines = project_reports([one], describe_target(None, 2, 20.0, 3.0)).assumptions
    (waited,) = [line for line in lines if "waited for memory" in line]
    assert DENSE in waited
    assert SPARSE not in waited
    assert any("does not tell its clock" in line for line in lines)


def test_of_a_dense_model_that_every_point_measured_the_middle_one_is_projected() -> None:
    samples = [{DENSE: np.full((3, 7), dense), SPARSE: np.full((3, 7), 10.0)} for dense in (90, 40, 50)]
    points = [
        Point(
            schema=1,
            shape="tiny",
            quant="int8",
            sparsity=number / 10,
            settings={},
            measured=(),
            report=report(times, 0.001),
        )
        for number, times in enumerate(samples)
    ]
    dense, *sparse = as_report(points).runs
    assert dense.tpot_ms is not None
    assert dense.tpot_ms.p50 == 50
    assert len(sparse) == 3


def test_what_was_extrapolated_before_it_was_projected_is_named_among_the_assumptions() -> None:
    stored = measured(1, 100, 0)
    assert not any("itself extrapolated" in line for line in assumptions(stored))
    note = "extrapolated from 2 and 4 of 32 decoder blocks"
    carried_on = {"extrapolated_from": ("two", "four"), "notes": ("int8", note)}
    dense, sparse = stored.runs
    stored = stored.model_copy(update={"runs": (dense.model_copy(update=carried_on), sparse)})
    (line,) = [line for line in assumptions(stored) if "itself extrapolated" in line]
    assert f"{DENSE} ({note})" in line
    assert SPARSE not in line


def assumptions(stored: Report) -> tuple[str, ...]:
    return project_reports([stored], describe_target("xeon-6248r", None, None, None)).assumptions


def test_a_sweep_is_projected_with_all_its_points(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path, cores in ((one, 1), (two, 2)):
        for sparsity in (0.5, 0.7):
            times = np.full((3, 7), 100 * (1 - sparsity) / cores)
            name = f"deepsparse-int8-s{100 * sparsity:g}"
            append_point(
                path,
                Point(
                    schema=1,
                    shape="tinyllama-1.1b",
                    quant="int8",
                    sparsity=sparsity,
                    settings={"cores": cores},
                    measured=(),
                    report=report({DENSE: np.full((3, 7), 400 / cores), name: times}, 0.001, cores=cores),
                ),
            )
    projection = project([one], check=two)
    assert [run.name for run in projection.runs] == [DENSE, "deepsparse-int8-s50", "deepsparse-int8-s70"]
    assert [run.projected_ms for run in projection.runs] == pytest.approx([200, 25, 15])
    assert [run.error for run in projection.runs] == pytest.approx([0, 0, 0])
    assert (tmp_path / "one.check-2-cores.md").is_file()


def test_what_cannot_be_projected_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(measured(1, 100, 0)))
    with pytest.raises(UserError, match="--machine cray-1 is not known; give xeon-6248r"):
        project([path], machine="cray-1")
    with pytest.raises(UserError, match="describe the machine"):
        project([path], cores=4)
    with pytest.raises(UserError, match="--bandwidth -1"):
        project([path], cores=4, bandwidth=-1)
    with pytest.raises(UserError, match="--bandwidth inf: give a number"):
        project([path], cores=4, bandwidth=float("inf"))
    with pytest.raises(UserError, match="cannot be read"):
        project([tmp_path / "none.json"], machine="xeon-6248r")
    with pytest.raises(UserError, match="has no finished point"):
        project([tmp_path / "none.jsonl"], machine="xeon-6248r")
    with pytest.raises(UserError, match="--check projects to the machine of that report"):
        project([path], machine="xeon-6248r", check=path)
    other = measured(2, 100, 0).model_copy(update={"artifact": "another"})
    with pytest.raises(UserError, match="differ in more than cores"):
        project_reports([measured(1, 100, 0)], describe_target("xeon-6248r", None, None, None), other)
    with pytest.raises(UserError, match="differ in more than cores"):
        project_reports([measured(1, 100, 0), other], describe_target("xeon-6248r", None, None, None))
