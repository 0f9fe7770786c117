"""The pipeline on a repository of simulated raws gives what the prompt payload gives on the same files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from lsst.daf.butler import Butler
from lsst.pex.config import Config
from lsst.pipe.base import ExecutionResources, Pipeline, QuantumSuccessCaveats
from lsst.pipe.base.separable_pipeline_executor import SeparablePipelineExecutor

from cumbre.core.configuration import SITE_FILE, Site
from cumbre.core.errors import NotFoundError
from cumbre.core.instrument import load_instrument
from cumbre.core.time import parse_isot, tai_from_utc
from cumbre.payloads.alert_production import produce
from cumbre.payloads.calibrate import calibrate
from cumbre.payloads.calibration import Calibrations
from cumbre.payloads.difference import DifferenceConfig
from cumbre.payloads.exposure import Exposure, MaskPlane
from cumbre.payloads.exposure_file import load_exposure, save_exposure
from cumbre.payloads.injection import InjectionConfig
from cumbre.payloads.isr import assemble_and_correct
from cumbre.payloads.refcat import RefCat
from cumbre.pipelines import inputs
from cumbre.pipelines.alert_production import find_changes
from cumbre.pipelines.settings import settings_class, values
from cumbre.repository.records import polygon
from cumbre.repository.storage import ALERTS, EXPOSURE, RAW, declare
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
    kernel = np.zeros((5, 5), np.float32)
    kernel[1:4, 2], kernel[2, 1:4], kernel[2, 2] = -2e-7, -2e-7, -6e-7
    calibrations = Calibrations(flat=flat, defects=defects, brighter_fatter=kernel)
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
        assert inputs.register_calibrations(repository, CAMERA, files, **when) == 3
        assert inputs.register_calibrations(repository, CAMERA, files, **when) == 0
        assert inputs.register_reference(repository, reference, version="v1") > 0
        assert inputs.register_reference(repository, reference, version="v1") == 0
        rows = [
            {
                "ra": tile.ra,
                "dec": tile.dec,
                "detector": chip.name,
                "band": "r",
                "path": root / "template.fits",
            }
        ]
        inputs.register_templates(repository, CAMERA, rows, version="v1")
        chain = inputs.chain_inputs(repository, CAMERA)
    return SimpleNamespace(
        root=root, repo=root / "repo", raw=raw, calibrations=calibrations, reference=reference, chain=chain
    )


def run(world, subset, *, out="u/test/run", config=(), collections=None):
    """Build the graph of a subset, leaving out what is done, and run it in this process; gives its tasks."""
    with Butler.from_config(world.repo) as known:
        before = [out] if out in known.collections.query("*") else []
    with Butler.from_config(
        world.repo, collections=collections or [*before, world.chain], run=out, writeable=True
    ) as butler:
        executor = SeparablePipelineExecutor(
            butler, skip_existing_in=before, resources=ExecutionResources(num_cores=1)
        )
        pipeline = Pipeline.from_uri(f"{URI}#{subset}")
        for task, field, value in config:
            pipeline.addConfigOverride(task, field, value)
        graph = executor.make_quantum_graph(pipeline, where="instrument = 'DemoCam' AND detector = 0")
        executor.pre_execute_qgraph(graph, register_dataset_types=True)
        executor.run_pipeline(graph)
        return sorted(quantum.task_node.label for quantum in graph)


@pytest.fixture(scope="module")
def butler(world):
    assert [run(world, subset) for subset in SUBSETS] == [
        ["gatherHistory", "gatherReference"],
        ["calibrateImage", "findChanges", "isr"],
        ["exportImages", "measureQuality"],
    ]
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


def test_charge_is_given_back_where_there_is_a_kernel(world, butler):
    metrics = get(butler, world, "preliminary_visit_image").metrics
    assert metrics["brighter_fatter_iterations"] >= 1
    assert metrics["brighter_fatter_moved"] > 100


def test_images_are_given_to_others_in_njy_with_their_sky(world, butler):
    ours, theirs = get(butler, world, "preliminary_visit_image"), get(butler, world, "visit_masked_image")
    scale = ours.njy_per_electron()
    assert np.allclose(
        theirs.image.array, ours.image * scale, rtol=1e-3, atol=np.sqrt(ours.variance).min() * scale
    )
    assert theirs.image.unit == "nJy"
    struck = (ours.mask & MaskPlane.CR) > 0
    assert struck.any()
    assert np.array_equal(theirs.mask.get("CR"), struck)
    sky = theirs.sky_projection.pixel_to_sky(x=np.array([500.0]), y=np.array([400.0]))
    ra, dec = ours.wcs.pix2sky(500.0, 400.0)
    assert abs(sky.ra.deg[0] - ra) < 1e-6
    assert abs(sky.dec.deg[0] - dec) < 1e-6


def test_the_quality_numbers_count_the_sources(world, butler):
    metrics, sources = get(butler, world, "detector_visit_quality_core"), get(butler, world, "dia_source")
    assert metrics["numDiaSources"] == sources.num_rows
    assert metrics["numHighReliability"] + metrics["numLowReliability"] == sources.num_rows
    assert metrics["numHighReliability"] == sum((r or 0) >= 0.5 for r in sources["reliability"].to_pylist())
    assert metrics["differenceNoiseRatio"] == pytest.approx(1.0, abs=0.1)


def test_a_rerun_leaves_out_what_is_done(world, butler):
    del butler
    assert run(world, "prompt") == []


def test_what_an_image_was_made_from_is_told(world, butler):
    meta = world.raw.metadata
    where = {"instrument": "DemoCam", "detector": meta.detector_id}
    image = butler.get("post_isr_image.metadata", exposure=meta.exposure_id, **where)
    inputs = {value for key, value in image.items() if key.startswith("butler.input")}
    assert {"raw", "flat", "defects"} <= inputs
    assert image["butler.run"] == "u/test/run"
    config = butler.get("findChanges_config")
    assert config.difference.threshold == DifferenceConfig().threshold
    assert "python" in butler.get("packages")


def test_no_template_is_an_outcome_and_not_silence(world, butler, caplog):
    """Only the raws and what was made of them are searched."""
    del butler
    caplog.set_level("INFO")  # as pipetask sets it
    inputs_only = ["u/test/run", "DemoCam/raw/all"]
    assert run(world, "findChanges", out="u/test/bare", collections=inputs_only) == ["findChanges"]
    with Butler.from_config(world.repo, collections="u/test/bare") as made:
        assert not made.query_datasets("dia_source", explain=False)
        told = get(made, world, "findChanges_metadata")["quantum"]
        log = get(made, world, "findChanges_log")
    assert QuantumSuccessCaveats.NO_WORK in QuantumSuccessCaveats(int(told["caveats"]))
    assert any("no template of this band overlaps" in record.message for record in log)


def test_planted_sources_are_told_and_in_no_alert(world, butler):
    template = get(butler, world, "dia_source")
    config = [("findChanges", "injection_fraction", 1.0)]
    run(world, "findChanges", out="u/test/fakes", config=config, collections=["u/test/run", world.chain])
    with Butler.from_config(world.repo, collections="u/test/fakes") as made:
        fakes, alerts = get(made, world, "injected_sources"), get(made, world, "dia_alerts")
    assert fakes.num_rows == InjectionConfig().transients
    assert sum(fakes["found"].to_pylist()) > 0
    places = np.array([[a["diaSource"]["ra"], a["diaSource"]["dec"]] for a in alerts])
    for ra, dec in zip(fakes["ra"].to_pylist(), fakes["dec"].to_pylist(), strict=True):
        apart = np.hypot((places[:, 0] - ra) * np.cos(np.radians(dec)), places[:, 1] - dec)
        assert apart.min() > 0.5 / 3600
    assert template.num_rows > 0


def test_the_subsets_are_exclusive_and_every_choice_is_described():
    graph = Pipeline.from_uri(URI).to_graph()
    listed = [task for subset in SUBSETS for task in graph.task_subsets[subset]]
    assert sorted(listed) == sorted(graph.tasks)
    for node in graph.tasks.values():
        stack = [node.config]
        while stack:
            config = stack.pop()
            for name, field in config._fields.items():
                assert len(field.doc.split()) > 1, (node.label, name)
                value = getattr(config, name)
                stack += [value] if isinstance(value, Config) else []


def test_settings_come_back_as_the_payloads_want_them():
    settings = find_changes.InjectionSettings()
    settings.snr = [5.0, 50.0]
    settings.transients = 3
    assert values(settings) == InjectionConfig(transients=3, snr=(5.0, 50.0))
    assert values(find_changes.DifferenceSettings()) == DifferenceConfig()

    @dataclass
    class Silent:
        """Attributes
        ----------
        told
            What it is.
        """

        told: int = 1
        untold: int = 2

    with pytest.raises(TypeError, match="untold"):
        settings_class(Silent, __name__, "SilentSettings")


def test_an_older_repository_gains_the_storage_classes(tmp_path):
    (tmp_path / "butler.yaml").write_text(
        "datastore: {formatters: {Other: x.y}}\nstorageClasses: {Other: {pytype: list}}\n"
    )
    assert declare(tmp_path)
    assert not declare(tmp_path)
    config = yaml.safe_load((tmp_path / "butler.yaml").read_text())
    assert set(config["storageClasses"]) == {"Other", RAW, EXPOSURE, ALERTS}
    assert config["datastore"]["formatters"]["Other"] == "x.y"
    with pytest.raises(NotFoundError, match="no Butler repository"):
        declare(tmp_path / "nowhere")


def test_the_template_that_covers_most_is_chosen():
    def square(ra, dec, side=0.2):
        half = side / 2
        return SimpleNamespace(
            region=polygon(
                [ra - half, ra + half, ra + half, ra - half], [dec - half, dec - half, dec + half, dec + half]
            )
        )

    here = square(50.0, 0.0).region
    others = [square(50.15, 0.0), square(50.05, 0.0), square(50.0, 0.1), square(60.0, 0.0)]
    assert find_changes.best_template(here, others) == 1
    assert find_changes.best_template(here, others[3:]) is None
    assert find_changes.best_template(here, []) is None


def test_pipetask_runs_it(world, butler):
    """The middleware's own command, on what the prompt subset needs least for."""
    pytest.importorskip("lsst.ctrl.mpexec", reason="pipetask (lsst-ctrl-mpexec) is not installed")
    del butler
    command = [sys.executable, "-c", "from lsst.ctrl.mpexec.cli.pipetask import main; main()", "run"]
    command += [
        "-b",
        str(world.repo),
        "-i",
        world.chain,
        "-o",
        "u/test/command",
        "-p",
        f"{URI}#gatherReference",
    ]
    command += ["-d", "instrument = 'DemoCam' AND detector = 0", "--register-dataset-types"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with Butler.from_config(world.repo, collections="u/test/command") as made:
        assert get(made, world, "reference_stars_detector").num_rows > 20
