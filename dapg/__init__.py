"""DAPG: diffusion augmentation and pose generation based pre-training for visible-infrared re-identification."""
