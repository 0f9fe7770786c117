"""The HTTP face of data access: TAP, cone search, SIA, DataLink and SODA as routes that any server mounts.

In: requests. Out: documents by the Virtual Observatory's standards, streamed. :class:`~cumbre.access.http.service.
AccessService` gives the routes and runs the jobs; who asks is told by :mod:`cumbre.access.identity`, what they get
by :mod:`cumbre.access.query` and :mod:`cumbre.access.images`. Systems G1, G2, C3.
"""
