"""raysys: remove text regions from image-text corpora and train CLIP on what is left (arXiv:2305.05095), on Ray."""
