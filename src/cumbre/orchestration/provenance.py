"""What prompt processing made its images of, so that anybody can make them again: inputs by checksum, parameters.

Images are not stored. Calibrations, template and reference stars are kept under the checksum of their content (hard
links: no bytes are copied, and a file that is replaced later stays here as it was). A record of each detector image
names them, the parameters, the software, and the checksums of the pixels that came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cumbre.core.errors import BadFileError, NotFoundError
from cumbre.stores.files import copy_verified, sha256_of, write_atomic

if TYPE_CHECKING:
    from cumbre.orchestration.inputs import Inputs
    from cumbre.payloads.alert_production import DetectorResult
    from cumbre.payloads.exposure import Exposure
    from cumbre.payloads.raw import RawDetector

FOLDER = "archive/provenance"
INPUTS = "inputs"
FORMAT = "CUMBRE-PROVENANCE-1"
PARAMETERS = ("detection_sigma", "difference_method", "reliability", "injection_fraction")


class Pins:
    """Files kept under the checksum of their content.

    Parameters
    ----------
    folder
        Where they are kept; made when the first one comes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[int, int, int, str], Path] = {}

    def pin(self, path: Path) -> Path:
        """The kept file with the content that ``path`` has now; a path where nothing is comes back as it is."""
        try:
            about = path.stat()
        except FileNotFoundError:
            return path
        key = (about.st_ino, about.st_mtime_ns, about.st_size, path.name)
        if key not in self._known or not self._known[key].exists():
            self._known[key] = self._keep(path)
        return self._known[key]

    def _keep(self, path: Path) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{os.getpid()}-{secrets.token_hex(4)}"
        try:
            # linked before it is read: what is replaced meanwhile cannot get another's checksum
            try:
                os.link(path, temporary)
            except OSError:  # another file system
                copy_verified(path, temporary)
            target = self._folder / f"{sha256_of(temporary).removeprefix('sha256:')}_{path.name}"
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)  # a link of the same file is left where it was
        return target


def record_path(root: Path, obs_id: str, detector_name: str) -> Path:
    """Record of a detector image."""
    return root / FOLDER / obs_id / f"{detector_name}.json"


def pixel_checksum(exposure: Exposure) -> str:
    """``sha256:hex`` over image, variance and mask."""
    digest = hashlib.sha256()
    for plane in (exposure.image, exposure.variance, exposure.mask):
        digest.update(np.ascontiguousarray(plane).data)
    return f"sha256:{digest.hexdigest()}"


def write_record(
    root: Path, *, raws: Sequence[RawDetector], inputs: Inputs, made: DetectorResult, payload: dict[str, Any]
) -> Path:
    """Store what one detector image was made of; returns the record's path.

    Parameters
    ----------
    root
        Folder of the site.
    raws
        The exposures of the visit, the one that gives the record its name first.
    payload
        Of the job: its parameters are kept.
    """
    import cumbre
    from cumbre.observatory.control.software import installed_hash

    raw = raws[0]
    about = {
        "format": FORMAT,
        "obs_id": raw.metadata.obs_id,
        "visit": raw.metadata.exposure_id,
        "detector": raw.detector.id,
        "detector_name": raw.detector.name,
        "instrument": payload["instrument"],
        "raw": {"name": Path(raw.path).name, "sha256": sha256_of(Path(raw.path))},
        "snaps": [
            {"obs_id": one.metadata.obs_id, "name": Path(one.path).name, "sha256": sha256_of(Path(one.path))}
            for one in raws[1:]
        ],
        "inputs": inputs.files,
        "field": {"ra": inputs.field.centre_ra, "dec": inputs.field.centre_dec, "radius": inputs.field.radius_deg},
        "template_tile": inputs.template_tile,
        "parameters": {name: payload[name] for name in PARAMETERS if name in payload},
        "has_fakes": made.injected is not None,
        "software": {"version": cumbre.__version__, "hash": installed_hash()},
        "pixels": {
            "calibrated": pixel_checksum(made.exposure), "difference": pixel_checksum(made.result.exposure),
        },
    }  # fmt: skip
    path = record_path(root, raw.metadata.obs_id, raw.detector.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(about, indent=1, allow_nan=False).encode())
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A stored record.

    Raises
    ------
    NotFoundError
        The image was not processed here, or before records were kept.
    BadFileError
        Not a record.
    """
    try:
        about: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(f"{path.parent.name} {path.stem}: no record of how it was processed") from error
    except ValueError as error:
        raise BadFileError(f"{path}: not a record of processing: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BadFileError(f"{path}: not a record of processing: expected {FORMAT}")
    return about


def snaps_of(record: dict[str, Any]) -> list[str]:
    """Further exposures (obs_id) of which an image was made, in order."""
    return [snap["obs_id"] for snap in record.get("snaps", ())]


def reproduce(root: Path, record: dict[str, Any], *raws: Path) -> DetectorResult:
    """Process an image as its record says, with the inputs of then; nothing is stored.

    Parameters
    ----------
    raws
        Raw files of the record's exposure and of :func:`snaps_of` it.

    Raises
    ------
    NotFoundError
        An input is not kept any more.
    BadFileError
        An input or the raw file is not what it was.
    """
    from cumbre.core.instrument import load_instrument
    from cumbre.payloads.alert_production import produce
    from cumbre.payloads.calibration import Calibrations
    from cumbre.payloads.difference import DifferenceConfig
    from cumbre.payloads.exposure_file import load_exposure
    from cumbre.payloads.injection import InjectionConfig
    from cumbre.payloads.raw import read_raw
    from cumbre.payloads.refcat import RefCat

    then = [record["raw"]["sha256"], *(snap["sha256"] for snap in record.get("snaps", ()))]
    if len(raws) != len(then):
        raise BadFileError(f"{record['obs_id']}: {len(raws)} raw files, expected the {len(then)} of then")
    for path, expected in zip(raws, then, strict=True):
        if (found := sha256_of(path)) != expected:
            raise BadFileError(f"{path}: {found}, expected the raw file of then: {expected}")
    paths = {}
    for name, file in record["inputs"].items():
        path = root / FOLDER / INPUTS / file
        if not path.is_file():
            raise NotFoundError(f"{name} of {record['obs_id']}: {file} is not kept any more")
        if sha256_of(path).removeprefix("sha256:") != file.partition("_")[0]:
            raise BadFileError(f"{path}: its content was changed in place; it cannot be used")
        paths[name] = path
    instrument = load_instrument(record["instrument"])
    field, parameters = record["field"], record["parameters"]
    images = [read_raw(path, instrument) for path in raws]
    if images[0].metadata.exposure_id != record["visit"]:
        images[0] = replace(images[0], metadata=replace(images[0].metadata, exposure_id=record["visit"]))
    return produce(
        images,
        Calibrations.load(paths["calibrations"]),
        load_exposure(paths["template"]),
        RefCat.load(paths["reference"], (field["ra"], field["dec"]), field["radius"]),
        instrument=instrument,
        processed_mjd_tai=0.0,
        config=DifferenceConfig(
            threshold=float(parameters["detection_sigma"]),
            reliable=float(parameters["reliability"]),
            method=parameters.get("difference_method", "alard_lupton"),
        ),
        inject=InjectionConfig() if record["has_fakes"] else None,
    )
