"""Contrastive pre-training: the robustness training, the alignment, and the baselines of Tables I and II."""
