"""The observatory's control: what is observed next, and the orders that make it happen.

In: the survey's tiles (``survey.json``), the night's order (``night.json``), Camera.endReadout,
ScriptQueue.pause and ScriptQueue.resume. Out: Scheduler.target, ScriptQueue.nextVisit and
nextVisitCanceled, the Camera.takeImages command. State: ``observatory/queue.json`` of the site.
Subrooms: ``component`` (commandable components), ``control`` (the four entities and the control systems).
Systems A2, A3, A4 (header service), A5 (thin script queue), A6 (scheduler).
"""
