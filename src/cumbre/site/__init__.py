"""A site: roles as processes under a supervisor, profiles, preparation of a night, the night report.

In: a folder with ``site.yaml``. Out: running services, their addresses and logs, and reports. Serves H1, H3.
"""
