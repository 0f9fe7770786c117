"""Reliability by a small network: inputs of difference sources, and the scores of the shipped model.

The model (``models/reliability.onnx``, made by ``cumbre train``) is a perceptron on the measured features of
:mod:`cumbre.payloads.kernels.classify` and of :mod:`cumbre.payloads.kernels.stamp_features`. Scores are the mean over
the eight ways to turn and mirror the stamps. ``models/reliability.json`` says what it was trained on and for which
images it may be used (``domain``: width of the PSF, correlation of the noise); others get the logistic model's score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cumbre.core.errors import BadFileError
from cumbre.payloads.difference import UNUSABLE, Difference
from cumbre.payloads.kernels import classify
from cumbre.payloads.kernels.stamp_features import (
    RESIDUAL_CELLS,
    TEMPLATE_CELLS,
    StarChange,
    describe_stamps,
)

if TYPE_CHECKING:
    import onnxruntime

MODELS = Path(__file__).parent / "models"
MODEL_NAME = "reliability"
N_LOGISTIC = len(classify.WEIGHTS)
SCALARS = (
    "log_snr", *(f"logistic_{k}" for k in range(N_LOGISTIC)), "core_chi2", "around_chi2", "excess", "deficit",
    "decorrelation", "level", "log_template", "change_significance", "change_over_error", "part_shift", "part_width",
    "distance", "is_negative", "fwhm", "match_error", "log_aperture", "science_part", "log_science_snr",
)  # fmt: skip
WORST_PSF_RESIDUAL = 0.01
"""rms of stars against their PSF model, of the better image of a pair: 0.001 to 0.006 in what the network was trained on. On
the GOTO pair, 0.014, it finds 14 of 48 planted sources, the logistic model 47."""
N_RESIDUAL, N_LIGHT = RESIDUAL_CELLS**2, TEMPLATE_CELLS**2
N_INPUTS = len(SCALARS) + N_RESIDUAL + N_LIGHT


@dataclass(frozen=True, slots=True)
class Described:
    """Network inputs (n, N_INPUTS), float32, and what was found out about stars that may have varied."""

    inputs: NDArray[np.float32]
    change: StarChange


def describe(
    made: Difference, sources: NDArray[Any], features: NDArray[np.float64], scale: float
) -> Described:
    """Inputs of every source.

    Parameters
    ----------
    made
        The difference.
    sources
        ``processing.SOURCE_DTYPE``.
    features
        Logistic features, the rejection in the last column.
    scale
        Measured rms of the matched filter's significance before normalisation: the noise's correlation.
    """
    exposure, psf = made.exposure, made.psf
    fwhm = float(max(made.science_psf.fwhm_px, made.template_psf.fwhm_px))
    stamps: list[NDArray[np.float32]] = []
    known: dict[int, int] = {}
    which = np.zeros(len(sources), np.int64)
    for k, source in enumerate(sources):
        stamp = psf(float(source["x"]), float(source["y"]))
        if id(stamp) not in known:
            known[id(stamp)] = len(stamps)
            stamps.append(np.asarray(stamp, np.float32))
        which[k] = known[id(stamp)]
    bank = np.stack(stamps) if stamps else np.zeros((1, 15, 15), np.float32)
    kernel_sum = made.solution.metrics["sum"]
    factor = 1.0 / kernel_sum if made.is_science_convolved else kernel_sum
    template = np.where(np.isfinite(made.template.image), made.template.image, 0) * np.float32(factor)
    residual, light, numbers, change = describe_stamps(
        exposure.image, exposure.variance * np.float32(scale**2), (exposure.mask & UNUSABLE) > 0, template,
        sources["x"], sources["y"], sources["psfFlux"], sources["isNegative"], which, bank, fwhm,
    )  # fmt: skip
    own = np.maximum(np.abs(sources["psfFlux"]), 1e-12)
    error = np.hypot(change.flux_err, made.match_error * np.maximum(change.template_flux, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        scalars = np.column_stack(
            [
                np.log10(np.maximum(sources["snr"], 1)),
                np.clip(features[:, :N_LOGISTIC], 0, classify.LIMIT) / 2,
                numbers,
                np.log10(np.clip(np.maximum(change.template_flux, 0) / own, 1e-2, 1e4)),
                np.log10(1 + np.abs(change.flux) / change.flux_err),
                np.log10(np.clip(np.abs(change.flux) / error, 1e-2, 1e3)),
                change.part_shift,
                change.part_width,
                np.hypot(change.x - sources["x"], change.y - sources["y"]) / fwhm,
                sources["isNegative"].astype(float),
                np.full(len(sources), fwhm / 4),
                np.full(len(sources), 20 * made.match_error),
                np.log(np.clip(np.abs(sources["flux"]) / own, 0.1, 10)),
                np.clip(sources["scienceFlux"] / sources["psfFlux"], -3, 3),
                np.log10(np.clip(np.abs(sources["scienceFlux"]) / sources["scienceFluxErr"], 0.1, 1e4)),
            ]
        )
    grids = np.concatenate(
        [np.clip(residual, -1.5, 1.5).reshape(-1, N_RESIDUAL), _compressed(light).reshape(-1, N_LIGHT)],
        axis=1,
    )
    inputs = np.concatenate([np.clip(np.nan_to_num(scalars, nan=0.0), -4, 4), grids], axis=1)
    return Described(np.ascontiguousarray(inputs, np.float32), change)


def is_change_of_flux(change: StarChange, match_error: float) -> NDArray[np.bool_]:
    """Where the template's star changed in brightness rather than in place or width.

    The change must stand out of the noise and of what matching leaves of a star (``match_error`` of its flux), and
    explain most of the signal.
    """
    error = np.hypot(change.flux_err, match_error * np.maximum(change.template_flux, 0))
    return np.asarray((np.abs(change.flux) > 5 * error) & (change.part_flux > 0.6))


def _compressed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithmic beyond one, linear below: galaxies and stars outshine what changed on them."""
    return np.asarray(np.arcsinh(3 * values) / 3)


@lru_cache(maxsize=1)
def symmetries() -> NDArray[np.int64]:
    """(8, N_INPUTS) index arrays: the inputs of the same source in the eight orientations."""
    first = len(SCALARS)
    out = []
    for mirror in (False, True):
        for turns in range(4):
            index = [np.arange(first)]
            start = first
            for cells in (RESIDUAL_CELLS, TEMPLATE_CELLS):
                grid = start + np.arange(cells**2).reshape(cells, cells)
                grid = np.rot90(grid[:, ::-1] if mirror else grid, turns)
                index.append(grid.ravel())
                start += cells**2
            out.append(np.concatenate(index))
    return np.array(out)


class Model:
    """One trained network.

    Parameters
    ----------
    path
        The ONNX file; the provenance (JSON) lies beside it.

    Raises
    ------
    BadFileError
        The file is missing, or made for other inputs.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        about = path.with_suffix(".json")
        if not path.is_file() or not about.is_file():
            raise BadFileError(f"{path}: no reliability model here; make one with `cumbre train`")
        self.about: dict[str, Any] = json.loads(about.read_text())
        self.version: str = self.about["version"]
        self.domain: dict[str, list[float]] = self.about.get("domain", {})
        if self.about["inputs"] != N_INPUTS:
            raise BadFileError(
                f"{path}: made for {self.about['inputs']} inputs, this version gives {N_INPUTS}; train it again"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session: onnxruntime.InferenceSession = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )

    def covers(self, *, fwhm_px: float, noise_correlation: float, psf_residual: float = 0.0) -> bool:
        """Whether the model was trained on images like this one.

        Parameters
        ----------
        fwhm_px
            Of the wider PSF of the pair.
        noise_correlation
            Measured rms of the matched filter's significance before normalisation; 1 for white noise.
        psf_residual
            ``PsfModel.residual`` of the better of the two images.
        """
        if not psf_residual <= WORST_PSF_RESIDUAL:
            return False
        values = {"fwhm_px": fwhm_px, "noise_correlation": noise_correlation}
        return all(low <= values[name] <= high for name, (low, high) in self.domain.items())

    def scores(self, inputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Reliability 0…1 of each row."""
        if len(inputs) == 0:
            return np.zeros(0)
        turned = np.ascontiguousarray(inputs[:, symmetries()].transpose(1, 0, 2)).reshape(-1, inputs.shape[1])
        logit = np.asarray(self._session.run(None, {"inputs": turned})[0], np.float64)
        mean = logit.reshape(8, len(inputs)).mean(axis=0)
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(mean, -50, 50))))


@lru_cache(maxsize=2)
def load_model(path: Path | None = None) -> Model:
    """The shipped model, or another one; kept in memory."""
    return Model(path or MODELS / f"{MODEL_NAME}.onnx")
