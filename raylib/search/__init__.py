"""Searches with Ray Tune and Optuna over any stage's settings.

`search` runs, or restores, the trials of a `space` for a stage (`config.SearchJob`). Each `trial` is the
ordinary run of a config; `optuna` proposes settings, `schedulers` stop trials that are behind, and the
trials share an object cache. `final_runs` runs the best settings once more on fresh seeds; `report` shows the
results. All but `space` and `config` import Ray, so they are imported when a search begins.
"""
