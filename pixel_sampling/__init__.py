"""Semantic-guided pixel sampling for cloth-changing person re-identification."""
