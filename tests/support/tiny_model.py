"""Sizes of a point model small enough for seconds."""

TINY = dict(
    n_bins=16,
    n_faces=20,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    sliding_window=32,
    use_vision_encoder=False,
    point_latents=8,
    point_hidden_size=32,
    point_layers=1,
    point_attention_heads=4,
)
