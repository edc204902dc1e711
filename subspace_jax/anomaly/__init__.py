"""Anomaly detection: what is unlike a set of normal examples."""
