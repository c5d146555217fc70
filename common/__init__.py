"""Shared library of the five projects: data, samplers, kernels, evaluation, runtime."""
