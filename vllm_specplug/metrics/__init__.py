"""Counters of this plugin as Prometheus series."""
