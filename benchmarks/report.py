"""placeholder until owner A's lands"""
import statistics, json as j
def median_and_spread(s): return statistics.median(s), [min(s), max(s)]
def write_report(path, figures, spread, seed, extra=None): path.write_text(j.dumps(dict(figures=figures, spread=spread, seed=seed, extra=extra)))
