"""Science payloads: raw pixels and calibrations in, calibrated images, sources and alerts out.

Nothing here knows who runs it: arrays and tables in, arrays and tables out. ``kernels`` holds pure functions
on arrays; the other modules are named by the astronomer's nouns. Serves E2, F3, F5.
"""
