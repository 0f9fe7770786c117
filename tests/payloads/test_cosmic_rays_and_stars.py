"""Point sources keep their pixels, particles lose theirs."""

from __future__ import annotations

import numpy as np
import pytest

from cumbre.payloads.kernels.cosmic_rays import point_sources_among
from cumbre.payloads.kernels.psf import PsfModel

FWHM = 2.05
SIZE = 200
NOISE = 20.0


def moffat(dx, dy, size=15):
    """Moffat of index 3.5 integrated over pixels; its flux is 1."""
    fine = 5
    r = (np.arange(size * fine) - (size * fine - 1) / 2) / fine
    alpha = FWHM / 2 / np.sqrt(2 ** (1 / 3.5) - 1)
    light = (1 + ((r[None] - dx) ** 2 + (r[:, None] - dy) ** 2) / alpha**2) ** -3.5
    stamp = light.reshape(size, fine, size, fine).sum(axis=(1, 3))
    return stamp / stamp.sum()


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(5)
    image = rng.normal(0, NOISE, (SIZE, SIZE))
    stars, hits = [], []
    for k, (gy, gx) in enumerate(np.ndindex(6, 6)):
        x, y = 18 + 32 * gx, 18 + 32 * gy
        if k % 2:
            dx, dy = rng.uniform(-0.5, 0.5, 2)
            image[y - 7 : y + 8, x - 7 : x + 8] += 12000 * moffat(dx, dy)
            stars.append((x, y))
        else:
            # One to three pixels in a row: a particle that crossed the silicon.
            image[y, x : x + 1 + k % 3] += 3000
            hits.append((x, y))
    image = image.astype(np.float32)
    variance = np.full(image.shape, NOISE**2, np.float32)
    # What the Laplacian takes: every pixel of a particle, the brightest pixels of sharp stars.
    found = np.zeros(image.shape, bool)
    for k, (x, y) in enumerate(stars):
        core = image[y - 1 : y + 2, x - 1 : x + 2]
        found[y - 1 : y + 2, x - 1 : x + 2] = core >= np.sort(core.ravel())[-1 - k % 3]
    for x, y in hits:
        found[y, x : x + 3] = image[y, x : x + 3] > 1000
    psf = PsfModel(moffat(0, 0)[None].astype(np.float32), image.shape, FWHM)
    return image, variance, found, psf, stars, hits


def test_stars_taken_for_particles_are_given_back(scene):
    image, variance, found, psf, stars, _ = scene
    left = found & ~point_sources_among(found, image, variance, psf)
    assert sum(left[y - 1 : y + 2, x - 1 : x + 2].any() for x, y in stars) <= 1


def test_particles_stay_found(scene):
    image, variance, found, psf, _, hits = scene
    back = point_sources_among(found, image, variance, psf)
    assert len(hits) == 18
    assert not any(back[y - 1 : y + 2, x - 1 : x + 4].any() for x, y in hits)
