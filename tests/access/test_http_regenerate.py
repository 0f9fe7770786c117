"""Images made again: a raw file is processed, its images are kept aside, and what the service makes is compared with them."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from astropy.io import fits
from astropy.io.votable import parse_single_table

from cumbre.access.images.catalogue import Image
from cumbre.core.time import Clock
from cumbre.orchestration.provenance import INPUTS, record_path
from cumbre.orchestration.task import one_thread
from cumbre.payloads.kernels.wcs import PlaneWcs
from cumbre.site.access import SiteAccess
from cumbre.web.service import WebService
from support.pg import fresh_database
from support.prompt_world import CAMERA, NIGHT, make_payload, make_site, make_template, process_and_keep

type Kept = dict[str, dict[str, np.ndarray]]
"""Product → image, variance, mask as the worker had them."""
OBS = "XC_O_20261120_000001"
NS = "{http://www.ivoa.net/xml/UWS/v1.0}"


@pytest.fixture(scope="module")
def processed(postgres_dsn, tmp_path_factory) -> Iterator[tuple[WebService, SiteAccess, Kept]]:
    """A site with one processed image, and the pixels as the worker had them."""
    with fresh_database(postgres_dsn) as database:
        site = make_site(tmp_path_factory.mktemp("again") / "site")
        make_template(site)
        payload = make_payload(site, database.dsn)
        folder = tmp_path_factory.mktemp("kept")
        # as the engine starts its workers: processes of one thread
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), one_thread) as worker:
            worker.submit(process_and_keep, payload, str(folder / "as")).result()
        kept = {kind: dict(np.load(folder / f"as_{kind}.npz")) for kind in ("calibrated", "difference")}
        clock = Clock.starting_at(NIGHT + 3600, rate=1e-9)
        mounted = SiteAccess(site=site, bus=None, clock=clock, db=database)
        web = WebService(site=site, bus=None, clock=clock, db=database, mounted=[mounted])
        image, visit = payload["image"], payload["visit"]
        mounted.catalogue.register(
            [Image(f"raw/{OBS}/R00_S00", "raw", 1, CAMERA.name, OBS, 0, "R00_S00", image["path"], 1024, 1024,
                   begin_tai=NIGHT + 60, end_tai=NIGHT + 90, boresight_ra=visit["ra"], boresight_dec=visit["dec"],
                   rotation=0.0, ra=visit["ra"], dec=visit["dec"], pixel_arcsec=0.6)]
        )  # fmt: skip
        try:
            mounted.step()
            yield web, mounted, kept
        finally:
            web.close()


@pytest.fixture
def clients(processed) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """The administrator, and somebody unknown."""
    root = processed[1]._site.root
    url = (root / "run" / "web.url").read_text().strip()
    token = (root / "run" / "admin.token").read_text().strip()
    with (
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {token}"}) as insider,
        httpx.Client(base_url=url, timeout=60) as anybody,
    ):
        yield insider, anybody


def job(client: httpx.Client, **parameters) -> tuple[str, dict[str, str], str]:
    """Phase, results and error of a cutout job."""
    url = client.post("/soda/async", data=parameters | {"PHASE": "RUN"}).headers["location"]
    for _ in range(20):
        text = client.get(url, params={"WAIT": 10}).text
        root = ElementTree.fromstring(text)
        if root.findtext(f"{NS}phase") in ("COMPLETED", "ERROR"):
            break
    found = root.find(f"{NS}results")
    results = {
        e.get("id"): e.get("{http://www.w3.org/1999/xlink}href") for e in ([] if found is None else found)
    }
    return root.findtext(f"{NS}phase"), results, text


def test_both_images_come_back_bit_for_bit(processed, clients):
    insider, anybody = clients
    kept = processed[2]
    links = parse_single_table(
        io.BytesIO(insider.get("/datalink/links", params={"ID": f"raw/{OBS}/R00_S00"}).content)
    )
    made = [row["access_url"] for row in links.array if row["semantics"] == "#derivation"]
    assert [url.rpartition("%3F")[2] for url in made] == [f"{kind}%2F{OBS}%2FR00_S00" for kind in kept]
    about = parse_single_table(io.BytesIO(insider.get(made[0]).content)).array[0]
    assert (about["service_def"], about["semantics"]) == ("soda-async", "#this")
    assert "ask for it as a job" in insider.get("/soda/sync", params={"ID": f"calibrated/{OBS}/R00_S00"}).text

    for kind, original in kept.items():
        phase, results, said = job(insider, ID=f"{kind}/{OBS}/R00_S00", CUTOUTDETAIL="MaskedImage")
        assert phase == "COMPLETED", said
        report = insider.get(results[f"provenance_{kind}_{OBS}_R00_S00"]).json()
        assert report["is_identical"] is True
        assert set(report["provenance"]["inputs"]) == {"calibrations", "template", "reference"}
        hdus = fits.open(io.BytesIO(insider.get(results["cutout_1"]).content), checksum=True)
        for name, plane in original.items():
            assert hdus[name].data.astype(plane.dtype).tobytes() == plane.tobytes(), (kind, name)
    assert not np.array_equal(kept["calibrated"]["image"], kept["difference"]["image"])

    # now it is here: at once, in parts, as a file
    wcs = PlaneWcs.from_header(hdus["IMAGE"].header)
    ra, dec = (float(v) for v in wcs.pix2sky(500, 400))
    cut = insider.get("/soda/sync", params={"ID": f"difference/{OBS}/R00_S00", "CIRCLE": f"{ra} {dec} 0.005"})
    (hdu,) = fits.open(io.BytesIO(cut.content))
    x0, y0 = (round(-hdu.header[key]) for key in ("LTV1", "LTV2"))
    ny, nx = hdu.data.shape
    assert np.array_equal(hdu.data, kept["difference"]["image"][y0 : y0 + ny, x0 : x0 + nx], equal_nan=True)
    assert insider.get(f"/files/difference/{OBS}/R00_S00").status_code == 200
    # the raw file is under embargo, and so is what is made of it
    for path in (f"/files/difference/{OBS}/R00_S00", f"/soda/sync?ID=difference/{OBS}/R00_S00"):
        assert anybody.get(path).status_code == 404
    assert "NotFoundFault" in anybody.get(f"/datalink/links?ID=difference/{OBS}/R00_S00").text
    assert job(anybody, ID=f"difference/{OBS}/R00_S00")[0] == "ERROR"


def test_another_calibration_does_not_change_what_was(processed, clients):
    """The inputs of then are used even when the site has others now; what is gone or changed is said."""
    insider, _ = clients
    _, mounted, _ = processed
    root = mounted._site.root
    from cumbre.payloads.calibration import Calibrations

    Calibrations(flat=np.full((1024, 1024), 2.0, np.float32)).save(
        root / "archive" / "calibs" / CAMERA.name / "r_R00_S00.fits"
    )
    record = record_path(root, OBS, "R00_S00")
    about = json.loads(record.read_bytes())
    record.write_text(json.dumps(about | {"note": "another record, another making"}))
    phase, results, said = job(insider, ID=f"calibrated/{OBS}/R00_S00")
    assert phase == "COMPLETED", said
    assert insider.get(results[f"provenance_calibrated_{OBS}_R00_S00"]).json()["is_identical"] is True
    # a record that names another flat gives other pixels, and the report says so
    names = [path.name for path in (root / "archive" / "provenance" / INPUTS).iterdir()]
    assert len(names) == 3
    kept = root / "archive" / "provenance" / INPUTS / about["inputs"]["calibrations"]
    content = kept.read_bytes()
    try:
        for damage, word in ((b"damaged", "changed in place"), (None, "not kept any more")):
            record.write_text(json.dumps(about | {"note": word}))
            kept.unlink()
            if damage:
                kept.write_bytes(damage)
            phase, _, said = job(insider, ID=f"calibrated/{OBS}/R00_S00")
            assert phase == "ERROR"
            assert word in said
    finally:
        kept.write_bytes(content)
