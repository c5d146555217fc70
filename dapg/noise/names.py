"""Names of the corruptions, which flags need before any image does."""

TRAIN15 = tuple(
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
    "brightness contrast elastic_transform pixelate jpeg_compression".split()
)
EXTRA4 = ("speckle_noise", "gaussian_blur", "saturate", "spatter")
BENCH20 = (*TRAIN15, *EXTRA4, "rain")


def allowed_types(exclude: list[str]) -> list[int]:
    """Indices of the training corruptions without `exclude`. Raises: ValueError for unknown names, fewer than three."""
    unknown = sorted(set(exclude) - set(TRAIN15))
    if unknown:
        of_test = " (a type of the test's alone)" if set(unknown) <= set(BENCH20) else ""
        raise ValueError(
            f"--noise-exclude {', '.join(unknown)}: no training noise{of_test}; known are {', '.join(TRAIN15)}"
        )
    kept = [i for i, name in enumerate(TRAIN15) if name not in exclude]
    if len(kept) < 3:
        raise ValueError(f"--noise-exclude leaves {len(kept)} noise types, a group needs three distinct ones")
    return kept
