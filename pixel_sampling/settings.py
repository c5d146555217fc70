"""Names that the flags offer: networks, clothes, forms of sampling and of the consistency loss. Knows no torch."""

ARCHS = ("bot", "pcb", "mgn", "hpm", "head", "head_body")
UPPER, PANTS = 2, 3
MODES = ("vector", "flat", "random")
CONSISTENCY = ("l2", "sq", "mse", "sigmoid", "none")
CLASSES = {"both": (UPPER, PANTS), "upper": (UPPER,), "pants": (PANTS,)}
