"""One subject on disk: images, cameras and head parameters, as VHAP, Pixel3DMM and GaussianAvatars leave them."""
