"""The pipeline on a repository of simulated raws gives what the prompt payload gives on the same files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from lsst.daf.butler import Butler
from lsst.pipe.base import ExecutionResources, Pipeline
from lsst.pipe.base.separable_pipeline_executor import SeparablePipelineExecutor

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.instrument import load_instrument
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.payloads.alert_production import produce
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.exposure_file import load_exposure, save_exposure
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.refcat import RefCat
from cumbre.pipelines import inputs
from cumbre.repository.store import RawFile, create_repository

CAMERA = load_instrument("democam")
NIGHT = tai_from_utc(parse_isot("2026-11-21T01:00:00"))
URI = "resource://cumbre.pipelines/alert_production/pipeline.yaml"
SUBSETS = ("preload", "prompt", "afterburner")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A repository with one raw of a simulated sky, and everything that its processing needs."""
    from cumbre.simulator.exposure import ExposureRequest
    from cumbre.simulator.preparation import prepare_sky
    from cumbre.site import preparation
    from cumbre.site.profiles import create_site

    root = tmp_path_factory.mktemp("site")
    create_site(root, rate=10.0)
    text = (root / SITE_FILE).read_text()
    (root / SITE_FILE).write_text(text.replace("tiles: 3", "tiles: 1"))
    site = Site.load(root)
    sky = prepare_sky(site)
    tile, chip = sky.tiles[0], CAMERA.detectors[0]
    reference = RefCat.load(preparation.paths(site)["refcat"])

    def take(name, begin_tai):
        request = ExposureRequest(name, "OBJECT", 30.0, "r_demo", tile.ra, tile.dec, 0.0, begin_tai)
        return preparation.take_frame(site, CAMERA, chip.name, request, sky)

    flat = np.ones(chip.shape, np.float32)
    defects = np.zeros(chip.shape, bool)
    defects[200:210, 300] = True
    calibrations = Calibrations(flat=flat, defects=defects)
    calibrations.save(root / "calibrations.fits")
    raw = take("XC_O_20261120_000012", NIGHT + 60)
    earlier = take("XC_O_20261010_000001", NIGHT - 38 * 86164.0905)
    save_exposure(
        calibrate(assemble_and_correct(earlier, calibrations), reference, instrument=CAMERA),
        root / "template.fits",
    )
    with create_repository(root / "repo", [CAMERA]) as repository:
        repository.ingest([RawFile(raw.path, raw.metadata)])
        files = [(root / "calibrations.fits", chip.name, "r")]
        when = {"valid_begin_tai": NIGHT - 1e6, "version": "v1"}
        assert inputs.register_calibrations(repository, CAMERA, files, **when) == 2
        assert inputs.register_calibrations(repository, CAMERA, files, **when) == 0
        assert inputs.register_reference(repository, reference, version="v1") > 0
        assert inputs.register_reference(repository, reference, version="v1") == 0
        rows = [{"tile": "T", "detector": chip.name, "band": "r", "path": root / "template.fits"}]
        inputs.register_templates(repository, CAMERA, rows, version="v1")
        chain = inputs.chain_inputs(repository, CAMERA)
    return SimpleNamespace(
        root=root, repo=root / "repo", raw=raw, calibrations=calibrations, reference=reference, chain=chain
    )


def run(world, subset, *, out="u/test/run", skip=True, config=()):
    """Build the graph of a subset and run it in this process; gives the number of quanta."""
    with Butler.from_config(world.repo) as known:
        before = [out] if out in known.collections.query("*") else []
    with Butler.from_config(
        world.repo, collections=[*before, world.chain], run=out, writeable=True
    ) as butler:
        executor = SeparablePipelineExecutor(
            butler, skip_existing_in=before if skip else [], resources=ExecutionResources(num_cores=1)
        )
        pipeline = Pipeline.from_uri(f"{URI}#{subset}" if subset else URI)
        for task, field, value in config:
            pipeline.addConfigOverride(task, field, value)
        graph = executor.make_quantum_graph(pipeline, where="instrument = 'DemoCam' AND detector = 0")
        executor.pre_execute_qgraph(graph, register_dataset_types=True)
        executor.run_pipeline(graph)
        return len(graph)


@pytest.fixture(scope="module")
def butler(world):
    counts = [run(world, subset) for subset in SUBSETS]
    assert counts == [2, 3, 2]
    with Butler.from_config(world.repo, collections="u/test/run") as made:
        yield made


def get(butler, world, name):
    meta = world.raw.metadata
    return butler.get(name, instrument="DemoCam", visit=meta.exposure_id, detector=meta.detector_id)


def test_the_pipeline_gives_what_the_prompt_payload_gives(world, butler):
    template = load_exposure(world.root / "template.fits")
    made = produce(world.raw.path, world.calibrations, template, world.reference, instrument=CAMERA)
    assert len(made.dia_sources) > 3
    stored = get(butler, world, "dia_source")
    assert stored["diaSourceId"].to_pylist() == [row["diaSourceId"] for row in made.dia_sources]
    for name in ("ra", "dec", "psfFlux", "psfFluxErr", "reliability", "scienceFlux"):
        expected = np.array([row[name] for row in made.dia_sources], float)
        assert np.allclose(stored[name].to_numpy(), expected, rtol=1e-4, atol=1e-8), name
    alerts = get(butler, world, "dia_alerts")
    assert [a["diaSourceId"] for a in alerts] == [a["diaSourceId"] for a in made.alerts]
    assert len(alerts) > 0
    assert get(butler, world, "dia_forced_source").num_rows == len(made.forced)
    assert get(butler, world, "visit_quality")["nStars"] == made.quality["nStars"]
    difference = get(butler, world, "difference_image")
    assert isinstance(difference, Exposure)
    assert np.allclose(difference.image, made.result.exposure.image, rtol=1e-3, atol=0.5)
