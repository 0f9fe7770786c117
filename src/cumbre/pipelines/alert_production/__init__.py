"""Alert production: ``pipeline.yaml`` and its tasks in the exclusive subsets preload, prompt and afterburner."""
