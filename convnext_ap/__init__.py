"""ConvNeXt-AP: a ConvNeXt with SimAM in every block and refined part pooling (Sun et al., Eng. OA 2(2), 2024)."""
