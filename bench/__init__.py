"""Benchmarks: cases, rivals, runs and their results."""
