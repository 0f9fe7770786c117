"""Alert packets and their way out.

In: records of prompt processing, rows of ``level1.alert_outbox``. Out: packets in Rubin's form (Avro schema
v11.1, Confluent header) on ``Alerts.packet``, container files, FITS cutouts, and the hop ``alerted``. Every
packet is published at least once and in order; readers drop repeats by ``diaSourceId``.
"""
