"""The study of infinite width: what it measures, what it prints and draws, and what it refuses."""

import sys

import numpy as np
import pytest

import gradflow as gf
from gradflow import plot, studies
from gradflow.cli import main
from gradflow.plot._legends import covering

LINE = np.linspace(-1, 1, 8)
SINE = gf.data.Dataset(np.stack([LINE, np.ones(8)], axis=1), np.sin(np.pi * LINE), name="sine")


@pytest.fixture(scope="module")
def ds():
    sizes = {"widths": (16,), "depths": (2,), "sgd_widths": (16,), "seeds": 24, "more": 1}
    return studies.mean_field(SINE, **sizes, node_counts=(16, 64), nodes=4, accuracy=1e-4, saves=4, progress=False)


@pytest.mark.slow
def test_mean_field_study(ds):
    """Deviations as predicted, rules of nodes in their order, test particles at their labels at the start."""
    assert float(ds.deviation[0, 0] / ds.predicted_deviation[0]) == pytest.approx(1, abs=0.35)
    assert float(ds.limit_error) <= 1e-4
    assert np.all(ds.drift < 1e-5)
    errors = ds.node_error.sel(node_count=64)
    assert errors[0] < errors[1] < errors[2]
    np.testing.assert_allclose(ds.particle_path[0, 0], [-1.8, -1.6])
    assert float(np.abs(ds.particle_path[:, -1] - ds.particle_path[:, 0]).max()) > 0.05
    table = studies.mean_field_table(ds)
    assert "limit of two hidden layers: predictions to" in table
    assert "error by nodes of the first layer, Sobol: 16:" in table


@pytest.mark.slow
def test_command(ds, tmp_path, monkeypatch, capsys):
    """Two components of the digits go in; store, table and figure come out."""
    given = {}

    def study(dataset, **options):
        given.update(options, dataset=dataset)
        return ds

    monkeypatch.setattr(studies, "mean_field", study)
    words = ["mean-field", "--quick", "--data", "digits", "--samples", "30", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gradflow", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    x, y = given["dataset"]
    assert (x.shape, sorted(set(y)), given["dataset"].name) == ((30, 2), [-1.0, 1.0], "digits, two components")
    assert abs(x[:, 0] @ x[:, 1]) < 1e-10
    assert (given["seeds"], given["widths"], given["resume"]) == (8, (16,), True)
    assert capsys.readouterr().out.startswith(studies.mean_field_table(ds))
    ds = gf.sweeps.open_store(tmp_path / "mean-field-digits-quick.zarr")
    drawn = plot.draw(ds)
    assert covering(drawn) == []
    assert plot.save(drawn, tmp_path / "again.pdf").exists()
    assert (tmp_path / "mean-field-digits-quick.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": gf.data.Dataset(np.ones((3, 1)), np.ones(3))}, r"`dataset` must have inputs \(n, 2\)"),
        ({"seeds": 1}, "`seeds` must be an integer of at least 2"),
        ({"horizon": 0.0}, "`horizon` must be positive"),
        ({"saves": 1}, "`saves` must be an integer of at least 2, but is 1"),
        ({"depths": (3,)}, "`depths` must hold 2"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        studies.mean_field(**({"dataset": SINE, "progress": False} | options))
