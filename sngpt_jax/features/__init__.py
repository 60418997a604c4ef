"""What the features of a sparse model stand for, as one HTML page."""
