"""Reliability of detections on a difference image: nine measured features and a logistic model.

Every feature is 0 for a clean point source and grows with what makes a detection doubtful; each is clipped to
0…``LIMIT`` so that one number alone cannot run away. The reliability is ``1 / (1 + exp(−logit))`` with
``logit = BIAS − Σ weight · feature``. The weights were set by hand from what each feature means (a feature at
its "doubtful" value must by itself pull the reliability below one half) and checked on injected sources;
no network was trained, so variables and transients are treated alike.

============== ======================================================================= =========
feature        meaning                                                                 weight
============== ======================================================================= =========
misfit         ln of the PSF fit's reduced χ² (the PSF's own error tolerated)           2.2
shape          (1 − correlation of stamp and PSF) beyond what the noise explains, × 10  1.6
opposite       part of the flux near the source that has the other sign, × 10           1.0
partner        strongest peak of the other sign nearby / own peak, × 5                  1.2
residual       how far a few per cent of the template's star explain the signal         3.0
mask           part of the PSF's light on bad or saturated pixels, × 10                 2.0
elongation     excess of the axis ratio over the PSF's, × 3                             1.2
width          |ln| of compactness (light in the core / in the aperture) over the PSF's, × 5  1.5
chance         ln(1 + noise peaks expected in this image at least as significant)      9.0
============== ======================================================================= =========

Hard rules give 0: a streak that is not far outshone, a cosmic ray or a saturated pixel at the centre, a flux that is not finite.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np

from cumbre.payloads.kernels.detect import Measurement

VERSION = "cumbre-logistic-1"
BIAS = 5.0
LIMIT = 4.0
WEIGHTS = (2.2, 1.6, 1.0, 1.2, 3.0, 2.0, 1.2, 1.5, 9.0)


@dataclass(frozen=True, slots=True)
class Features:
    """The features in the order of :data:`WEIGHTS`; see the module's table."""

    misfit: float
    shape: float
    opposite: float
    partner: float
    residual: float
    mask: float
    elongation: float
    width: float
    chance: float


def features_of(
    source: Measurement,
    *,
    snr: float,
    template_flux: float,
    masked_light: float,
    psf_elongation: float,
    psf_compactness: float,
    noise_above: float,
    match_error: float = 0.04,
) -> Features:
    """Features of one measured source.

    Parameters
    ----------
    snr
        Signal-to-noise of the detection.
    template_flux
        Brightest flux of the template within the PSF's reach, in the difference's units.
    masked_light
        Part (0…1) of the PSF's light on unusable or saturated pixels of either image.
    psf_elongation
        Axis ratio of the PSF measured as the source's is.
    psf_compactness
        Flux in half the aperture's radius over flux in the aperture, of the PSF.
    noise_above
        Noise peaks expected in the whole image at least as significant as this one.
    match_error
        Fraction of a star's flux that PSF matching may leave behind.
    """
    noise_loss = 1.0 - 1.0 / np.sqrt(1.0 + source.n_pixels / max(snr, 1.0) ** 2)
    expected_opposite = min(0.5, 3.0 / max(snr, 1.0))
    leftover = match_error * max(template_flux, 0.0) / max(abs(source.flux), 1e-12)
    ratio = source.compactness / psf_compactness if psf_compactness > 0 and source.compactness > 0 else 0.2
    width_noise = 2.0 / max(snr, 1.0)
    # Where the template is dark nothing but a cosmic ray, a trail or a bleed imitates a source, and those show in
    # width, elongation and mask: there the exact shape counts half.
    trust = 0.5 if template_flux < 0.1 * abs(source.flux) and masked_light < 0.02 else 1.0
    return Features(
        misfit=trust * float(np.log(max(source.chi2, 1.0))),
        shape=trust * 10.0 * max(0.0, 1.0 - source.correlation - noise_loss - 0.02),
        opposite=10.0 * max(0.0, source.opposite - expected_opposite),
        partner=5.0 * max(0.0, source.partner - 3.5 / max(snr, 1.0) - 0.1),
        residual=2.0 * leftover,
        mask=10.0 * masked_light,
        elongation=3.0 * max(0.0, source.elongation / max(psf_elongation, 1.0) - 1.25 - 2.0 / max(snr, 1.0)),
        width=5.0 * max(0.0, abs(float(np.log(max(ratio, 0.05)))) - width_noise - 0.1),
        chance=float(np.log1p(max(noise_above, 0.0))),
    )


def reliability(features: Features, *, is_rejected: bool = False) -> float:
    """Probability-like score 0…1 that the source is a real change of the sky."""
    values = np.array(astuple(features))
    if is_rejected or not np.isfinite(values).all():
        return 0.0
    logit = BIAS - float(np.dot(WEIGHTS, np.clip(values, 0.0, LIMIT)))
    return float(1.0 / (1.0 + np.exp(-logit)))
