"""A trained model as a small file: quantization, packing, entropy coding, on the host in numpy."""
