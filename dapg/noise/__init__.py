"""The noise library, noise groups of the robustness training (sec. II-A) and AugMix."""
