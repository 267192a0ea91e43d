"""The lm-eval model, its tasks, metering, code grading, and calibration of layers."""
