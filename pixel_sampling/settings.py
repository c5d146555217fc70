"""Names that the flags offer: networks, clothes, forms of sampling and of the consistency loss. Knows no torch."""

from common.datasets import prcc

ARCHS = ("bot", "pcb", "mgn", "hpm", "head", "head_body")
UPPER, PANTS = 2, 3
MODES = ("vector", "flat", "random")
CONSISTENCY = ("l2", "sq", "mse", "sigmoid", "none")
QUERIES = {"cross": prcc.CROSS, "same": prcc.SAME}
PROTOCOLS = {"multi": 1, "single10": 10}  # draws of a gallery
SCHP_SIZE = 512  # input side of the parsing network, what it was trained with
CLASSES = {"both": (UPPER, PANTS), "upper": (UPPER,), "pants": (PANTS,)}
