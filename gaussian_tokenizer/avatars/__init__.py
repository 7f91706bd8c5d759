"""Face-anchored Gaussians: anchoring, skinning, motions and the files they are read from and exported to."""
