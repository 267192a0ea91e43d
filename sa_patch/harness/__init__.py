"""WHAT is measured: the lm-eval model, sweeps, results and reports."""
