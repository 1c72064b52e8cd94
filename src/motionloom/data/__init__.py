"""Manifests, media in and out, curation, the latent cache, the loader and ShapeWorld."""
