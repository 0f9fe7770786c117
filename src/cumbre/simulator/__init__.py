"""An honest observatory without a telescope: sky with known truth, weather, camera pixels.

In: a seed, a site and an instrument description. Out: a truth catalogue (parquet), a reference catalogue, raw
pixels in the camera's own layout, camera events, and for every exposure the list of what was variable in it.
Everything is a function of (seed, time, obs_id, detector): the same seed gives the same night bit for bit, in
any order of calls. Topics: consumes the command ``Camera.takeImages``; publishes ``Camera.*`` and ``Image.hop``
(exposed, read_out). Serves the tests, the demonstration and the night report's completeness; nothing but
``cli``, ``site`` and tests imports it. Also sun and moon, Kepler orbits, and light curves of its own.
"""
