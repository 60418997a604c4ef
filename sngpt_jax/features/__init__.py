"""The study of what the features of sparse codes stand for."""
