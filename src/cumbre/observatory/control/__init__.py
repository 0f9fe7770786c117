"""Control systems: the four commandable entities, their modes, jobs and prerequisites, and the warm spare.

In: commands to Archiver, CatchUpArchiver, EfdReplicator, AlertProductionCluster and Control;
Camera.startIntegration, ScriptQueue.nextVisit, Replicator.registration and heartbeat, Control.jobResult,
Image.hop. Out: Control.job, Control.system, the entities' states. Tables: schema ``control``.
Systems B2 (archiver), A3 (control systems), D2 (alert production as a commandable entity).
"""
