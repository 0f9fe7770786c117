"""Reliability of detections on a difference image: eleven measured features and a logistic model.

Every feature is 0 for a clean point source and grows with what makes a detection doubtful; each is clipped to
0…``LIMIT`` so that one number alone cannot run away. The reliability is ``1 / (1 + exp(−logit))`` with
``logit = BIAS − Σ weight · feature``.

The weights were fitted (``benchmarks/reliability.py --train``, none negative) to detections on 50 simulated images
of five skies, together with the planted sources of a pair of real images; variables and transients are treated
alike. Those of ``host`` and ``wide`` are lower bounds, because the simulated skies are too empty to teach them.

============== =======================================================================
feature        meaning
============== =======================================================================
misfit         ln of the PSF fit's reduced χ² (a generous error of the PSF tolerated)
shape          (1 − correlation of stamp and PSF) beyond what the noise explains, × 10
residual       how far a few per cent of the template's light at the place explain the signal
host           the same for the brightest light nearby, of weight only for faint detections
mask           part of the PSF's light on bad or saturated pixels, × 10
elongation     excess of the axis ratio over the PSF's, × 3
wide           how much less compact than the PSF (ln of light in the core / in the aperture), × 5
chance         ln(1 + noise peaks expected in this image at least as significant)
core           ln of the core's reduced χ² with a small error of the PSF, where the template is bright
peak           excess of the brightest pixel over the fitted PSF, where the template is dark, × 5
hit            root of the part of the PSF's light on cosmic-ray pixels, × 6
============== =======================================================================

Hard rules give 0: a streak that is not far outshone, a cosmic ray or a saturated pixel at the centre, a dipole, a
flux that is not finite or of the other sign than its peak.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cumbre.payloads.kernels.measure import Measurement

VERSION = "cumbre-logistic-2"
BIAS = 3.44
LIMIT = 4.0
WEIGHTS = (0.23, 1.19, 0.54, 1.30, 1.95, 0.41, 0.40, 5.37, 0.72, 0.24, 4.08)


@dataclass(frozen=True, slots=True)
class Features:
    """The features in the order of :data:`WEIGHTS`; see the module's table."""

    misfit: float
    shape: float
    residual: float
    host: float
    mask: float
    elongation: float
    wide: float
    chance: float
    core: float
    peak: float
    hit: float

    def values(self) -> tuple[float, ...]:
        """In the order of :data:`WEIGHTS`."""
        return (
            self.misfit, self.shape, self.residual, self.host, self.mask, self.elongation, self.wide, self.chance,
            self.core, self.peak, self.hit,
        )  # fmt: skip


def features_of(
    source: Measurement,
    *,
    snr: float,
    template_flux: float,
    template_here: float,
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
    template_here
        The template's flux at the place itself.
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
    least = max(snr, 1.0)
    noise_loss = 1.0 - 1.0 / np.sqrt(1.0 + source.n_pixels / least**2)
    own = max(abs(source.flux), 1e-12)
    near, here = max(template_flux, 0.0) / own, max(template_here, 0.0) / own
    ratio = source.compactness / psf_compactness if psf_compactness > 0 and source.compactness > 0 else 0.2
    width = float(np.log(max(ratio, 0.05)))
    width_noise = 2.0 / least + 0.1
    # Where the template is dark nothing but a cosmic ray, a trail or a bleed imitates a source; where it is bright
    # the subtraction of its light leaves structure of its own.
    dark = 1.0 / (1.0 + near**2)
    core = float(np.log(max(source.core_chi2, 1.0)))
    return Features(
        misfit=float(np.log(max(source.chi2, 1.0))),
        shape=10.0 * max(0.0, 1.0 - source.correlation - noise_loss - 0.02),
        residual=4.0 * match_error * here,
        host=float(np.log1p(10.0 * match_error * near)) * min(1.0, (6.0 / least) ** 2),
        mask=10.0 * masked_light,
        elongation=3.0 * max(0.0, source.elongation / max(psf_elongation, 1.0) - 1.25 - 2.0 / least),
        wide=5.0 * max(0.0, -width - width_noise),
        chance=float(np.log1p(max(noise_above, 0.0))),
        core=(1.0 - dark) * core,
        peak=5.0 * dark * source.peak,
        hit=6.0 * float(np.sqrt(source.hit)),
    )


def reliability(features: Features, *, is_rejected: bool = False) -> float:
    """Probability-like score 0…1 that the source is a real change of the sky."""
    values = np.array(features.values())
    if is_rejected or not np.isfinite(values).all():
        return 0.0
    logit = BIAS - float(np.dot(WEIGHTS, np.clip(values, 0.0, LIMIT)))
    return float(1.0 / (1.0 + np.exp(-logit)))
