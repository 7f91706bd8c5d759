"""Gaussians and cameras to images: gsplat on CUDA, a differentiable rasterizer in PyTorch elsewhere."""
