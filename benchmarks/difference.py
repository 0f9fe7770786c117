"""Seconds of difference imaging by step on a simulated field: python benchmarks/difference.py [side]."""

from __future__ import annotations

import json
import os
import platform
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cv2
import numpy as np

from cumbre.payloads.difference import difference
from cumbre.payloads.exposure import Exposure
from cumbre.payloads.processing import process_pair


def field(side: int, sigma: float, noise: float, seed: int) -> Exposure:
    """Stars (3 a 100 x 100 pixels) blurred to a Gaussian PSF, with noise."""
    stars = np.random.default_rng(1)
    image = np.zeros((side, side), dtype=np.float32)
    n = side * side * 3 // 10000
    x, y = stars.integers(5, side - 5, (2, n))
    np.add.at(image, (y, x), 10 ** stars.uniform(3, 5.3, n))
    image = cv2.GaussianBlur(image, (0, 0), sigma)
    rng = np.random.default_rng(seed)
    variance = (noise**2 + image).astype(np.float32)
    noisy = image + rng.standard_normal(image.shape, dtype=np.float32) * np.sqrt(variance)
    return Exposure(
        noisy.astype(np.float32), variance, np.zeros(image.shape, np.uint16), is_background_subtracted=True
    )


def main() -> None:
    cv2.setNumThreads(1)
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 2048
    process_pair(field(512, 1.9, 20, 5), field(512, 1.6, 8, 6))  # compile
    science, template = field(side, 1.9, 20, 2), field(side, 1.6, 8, 3)
    begun = time.process_time()
    made = difference(science, template)
    middle = time.process_time()
    result = process_pair(science, template)
    end = time.process_time()
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "side": side,
                "difference_cpu_s": round(middle - begun, 2),
                "whole_cpu_s": round(end - middle, 2),
                "sources": len(result.sources),
                "reliable": int((result.sources["reliability"] >= 0.5).sum()),
                "stamps": made.metrics["kernel_n_stamps"],
            }
        )
    )


if __name__ == "__main__":
    main()
