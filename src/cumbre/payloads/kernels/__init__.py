"""Astronomy kernels: pure functions on arrays, compiled with numba where pixels are looped over.

Nothing here reads a file, knows an instrument or keeps state. Pixel coordinates are 0-based (the centre of the
first pixel is 0, 0), arrays are indexed ``[y, x]`` and have shapes ``(ny, nx)``. Images are float32 in
electrons, variances electrons², masks uint16 with the bits of :class:`cumbre.payloads.exposure.MaskPlane`.
"""
