"""PRSNet: masked self-supervised pre-training for person re-identification (arXiv 2303.06330)."""
