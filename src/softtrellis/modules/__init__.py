"""Linear layers: the trained latent one and the packed inference one."""
