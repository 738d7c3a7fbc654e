"""The networks of Stable Diffusion 1.5 and IP-Adapter, one a file; model.py holds them together."""
