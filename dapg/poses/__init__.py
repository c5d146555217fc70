"""Poses, PN-GAN and the generated images of the alignment (sec. II-B)."""
