"""Searches with Ray Tune and Optuna over any stage's settings.

A space (`space`) and a job (`job`: what a stage lets be searched) become trials (`trial`), each the ordinary
run of a config, under a searcher (`searcher`) and a scheduler (`schedulers`); `sweep` runs and restores them,
the best settings once more on fresh seeds (`finals`); `report` says what came out. These modules import Ray,
so they are imported when a search begins.
"""
